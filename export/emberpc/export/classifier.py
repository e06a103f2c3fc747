"""Fine-tune a classifier with one of the strategies, calibrate it, and export encoder and head as one bundle."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypedDict

from emberpc.bundle import DecisionRule, Head, Manifest, Reference, Task, Variant, finish_bundle, staged_folder
from emberpc.bundle.calibration import FEW_TEXTS, weakness
from emberpc.bundle.evaluation import HeldOut, calibrate, measure
from emberpc.bundle.limits import check_labels
from emberpc.bundle.rejection import MAX_FALSE_REJECTIONS
from emberpc.export.card import model_card
from emberpc.export.classify.cached_encoder import CachedEncoder
from emberpc.export.classify.label_descriptions import described_examples
from emberpc.export.classify.rejection import reject_outside
from emberpc.export.classify.strategies import STRATEGIES, Fitted, Options
from emberpc.export.convert.onnx_runner import OnnxRunner
from emberpc.export.convert.parity import compare, require, torch_vectors
from emberpc.export.data.classifier_data import ClassifierData, read_data
from emberpc.export.data.examples import Examples, conflicting_texts
from emberpc.export.data.stdlib_texts import sample_texts
from emberpc.export.embedding import (
    MODEL_PATH,
    PARITY_TEXTS,
    REFERENCE_TEXTS,
    Converted,
    common_fields,
    convert_encoder,
    write_json,
)
from emberpc.export.errors import ExportError
from emberpc.export.names import EXPORTABLE, FP32, check_rates, check_variants
from emberpc.export.progress import Progress, no_progress
from emberpc.export.source.encoder import SourceEncoder, read_encoder
from emberpc.export.threads import bounded_threads
from emberpc.export.timing import Cost
from emberpc.export.tuning.checkpoint import Checkpoints
from emberpc.export.variants import add_variants

__all__ = ["ClassifierData", "export_classifier", "read_data"]
_LOGGER = logging.getLogger(__name__)


@bounded_threads()
def export_classifier(
    data: ClassifierData,
    base: str | Path,
    target: Path | str,
    *,
    strategy: str = "linear",
    label_texts: bool = True,
    balanced: bool = False,
    epochs: int | None = None,
    rejection_rate: float = 0.01,
    max_false_rejections: float = MAX_FALSE_REJECTIONS,
    checkpoints: Path | None = None,
    variants: Sequence[str] = (FP32,),
    overwrite: bool = False,
    max_tokens: int | None = None,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Manifest:
    """Fine-tune a classifier, export it as a bundle, and check it against PyTorch.

    The temperature, the thresholds, and accuracy and calibration error in `quality` come from held-out texts: those of
    the validation file, or else training texts that the classifier, or classifiers fitted in the same way, were not
    trained on. If no text can be held out, the temperature is 1, there are no thresholds and no rejection threshold,
    and a warning is logged. A warning is also logged for fewer than 100 held-out texts.

    Args:
        data: paths and format of the texts.
        base: the encoder: a folder, an installed package that holds one, or a hub id.
        target: the bundle's folder; it is written atomically.
        strategy: one of `EXPORTABLE`.
        label_texts: whether to train on the label descriptions, too. Without a file of descriptions, the labels' names
            are the descriptions if they help to classify the texts (see `described_examples`). False: a file of
            descriptions is not read. The strategy zero-shot requires True.
        balanced: whether every label has the same total weight in the loss, whatever its number of texts; only for
            strategies that minimize a loss.
        epochs: maximum number of passes over the texts, if the strategy trains the encoder; default: 2 to 8, fewer for
            more texts of each label.
        rejection_rate: share of held-out texts to reject as out of scope, in [0, 1); 0: no text is rejected. It is not
            used if `data` has texts outside all labels, which set the rejection threshold then.
        max_false_rejections: greatest share of held-out texts that may be rejected as out of scope, in [0, 1), if
            `data` has texts outside all labels. These texts then choose the rejection score, too.
        checkpoints: folder for checkpoints, from which a later call with the same arguments continues an interrupted
            training of the encoder. The files are deleted after the bundle is written. None: no checkpoints.
        variants: variants to write in addition to fp32: names, or `auto`; see `emberpc.export.variants`. They are
            measured on the texts of the validation file, or else on training texts that the classifier was not trained
            on, or else on all training texts. The manifest says which texts these were.
        overwrite: whether to replace an existing bundle.
        max_tokens: maximum number of tokens of a text, in training and in the bundle. Default: the base's limit.
        seed: seed of the random choices: held-out texts, folds, and order of texts.
        progress: called with the current step.

    Returns:
        The manifest, with the measured parity and quality.

    Raises:
        ExportError: an argument is invalid, the data or the base cannot be used, label descriptions are missing, the
            training fails, a variant requested by name cannot be made or misses its bound, or outputs differ from
            PyTorch's. NoSpaceError, a subclass: a checkpoint cannot be written.
        BundleError: `target` exists and may not be replaced, no folder can be created beside it, or the labels exceed a
            limit of `emberpc.bundle.limits`.
        OSError: the disk is full, or see `staged_folder`.
    """
    if strategy not in EXPORTABLE:
        raise ExportError(f"there is no strategy {strategy!r} to export; there are: {', '.join(EXPORTABLE)}")
    check_rates(rejection_rate, max_false_rejections)
    check_variants(variants)
    examples, validation, outside = read_data(data)
    descriptions = data.label_descriptions if label_texts else ()
    if strategy == "zero-shot" and not label_texts:
        raise ExportError("the strategy zero-shot needs label texts; do not switch them off")
    check_labels(examples.labels, f"{data.train}: the labels")
    encoder = read_encoder(base, max_tokens=max_tokens, progress=progress)
    kept = Checkpoints(checkpoints)
    with staged_folder(target, overwrite=overwrite) as folder:
        converted = convert_encoder(encoder, folder, progress)
        converted.graph.save(folder / MODEL_PATH)
        cached_encoder = CachedEncoder(encoder, _runner(folder, encoder, converted), progress)
        if label_texts:
            examples = described_examples(examples, descriptions, cached_encoder)
        options = Options(seed, balanced, validation, epochs, kept, progress)
        with Cost() as cost:
            fitted = STRATEGIES[strategy].fit(examples, cached_encoder, options)
        _warn_of_few(len(fitted.held_out), data)
        rate = 0.0 if outside else rejection_rate
        rule = calibrate(fitted.held_out, multi_label=examples.multi_label, rejection_rate=rate)
        rejection = None
        if outside and len(fitted.held_out):
            progress("fitting the rejection", 0, 1)
            rejection, scope = reject_outside(fitted, examples, validation, outside, max_false_rejections, seed)
            rule = replace(rule, rejection_threshold=rejection.threshold, rejection_score=rejection.score)
            if scope is not None:
                scope.write(folder)
        quality = {
            "train_texts": float(len(examples.texts)),
            "labels": float(len(examples.labels)),
            "label_texts": float(len(examples.descriptions)),
            "conflicting_texts": float(conflicting_texts(examples)),
            **({"max_false_rejections": max_false_rejections} if outside else {"rejection_rate": rejection_rate}),
            "fit_seconds": kept.spent.seconds + cost.seconds,
            "fit_cpu_seconds": kept.spent.cpu_seconds + cost.cpu_seconds,
            **fitted.figures,
            **_measured(fitted, rule),
            **(rejection.figures if rejection is not None else {}),
        }
        manifest = _write(folder, encoder, converted, fitted, examples, rule, quality, strategy, progress)
        manifest = replace(manifest, rejection_measured_on=rejection.measured_on if rejection else "")
        manifest = add_variants(
            folder,
            manifest,
            variants,
            **_to_measure_on(examples, validation, fitted.held_out),
            training=examples.texts,
            progress=progress,
        )
        (folder / "README.md").write_text(model_card(manifest), encoding="utf-8")
        manifest = finish_bundle(folder, manifest)
    kept.remove()
    return manifest


def _warn_of_few(held_out: int, data: ClassifierData) -> None:
    """Log a warning if there are no held-out texts, or fewer than `FEW_TEXTS`.

    Args:
        held_out: number of held-out texts.
        data: the files, for the warning: it names the validation file if there is one, else the training texts.
    """
    source = data.train if data.validation is None else data.validation
    remedy = ", or a validation file" if data.validation is None else ""
    if not held_out:
        _LOGGER.warning(
            "%s: there are too few texts to hold any out, so no temperature could be fitted: the probabilities are "
            "not calibrated; give more texts%s",
            source,
            remedy,
        )
    elif few := weakness(held_out):
        _LOGGER.warning(
            "%s: the calibration of probabilities is rough: %s; give at least %d texts%s",
            source,
            few,
            FEW_TEXTS,
            remedy,
        )


class _Measuring(TypedDict):
    examples: Examples
    measured_on: str


def _to_measure_on(examples: Examples, validation: Examples | None, held_out: HeldOut) -> _Measuring:
    """Choose the texts to measure variants on.

    These are the texts of the validation file; without one, the training texts that the classifier was not trained on;
    if there are none, as after a cross-validation, all training texts.

    Args:
        examples: the training texts.
        validation: the texts of the validation file; None without such a file.
        held_out: the held-out texts of the fit.

    Returns:
        Keyword arguments for `add_variants`: the chosen texts, and what they are, in words.
    """
    if validation is not None:
        return {"examples": validation, "measured_on": "the texts of the validation file"}
    if held_out.from_final_classifier and len(held_out.rows):
        return {"examples": examples.take(held_out.rows), "measured_on": "training texts that were held out"}
    fitted_to = "training texts that the classifier was fitted to, so the accuracy of each variant is too high"
    return {"examples": examples, "measured_on": fitted_to}


def _measured(fitted: Fitted, rule: DecisionRule) -> dict[str, float]:
    """Return figures of a classifier on its held-out texts, and their number; empty if there are none."""
    held_out = fitted.held_out
    figures = measure(held_out.logits, held_out.targets, rule) if len(held_out) else {}
    return {"held_out_texts": float(len(held_out)), **figures} if figures else {}


def _write(
    folder: Path,
    encoder: SourceEncoder,
    converted: Converted,
    fitted: Fitted,
    examples: Examples,
    rule: DecisionRule,
    quality: dict[str, float],
    strategy: str,
    progress: Progress,
) -> Manifest:
    """Write graph, config, head and reference outputs of a classifier's bundle; compare the classifier with PyTorch.

    `convert_encoder` must have made `converted` from `encoder`, with the tokenizer's files in `folder`. If `fitted` has
    a tuned encoder, that encoder is converted and written instead. The graph, of the tuned encoder or of `converted`,
    is changed: it gets the head of `fitted`.

    Returns:
        The manifest, with fp32 as the only variant and without a list of files.

    Raises:
        ExportError: the strategy made no linear head, the tuned encoder cannot be converted, or outputs differ from
            PyTorch's.
        BundleError: the labels exceed a limit of `emberpc.bundle.limits`.
        OSError: the disk is full.
    """
    if fitted.head is None:
        raise ExportError(f"the result of {strategy} is not a linear head; choose another strategy")
    with tuned_encoder(encoder, fitted, folder) as (source, tuned):
        if tuned is not None:
            converted = convert_encoder(tuned, folder, progress)
        converted.graph.classify(
            fitted.head.weights, fitted.head.bias, rule.temperature, multi_label=examples.multi_label
        )
        converted.graph.save(folder / MODEL_PATH)
        _write_config(folder, encoder.config, examples)
        progress("comparing with PyTorch", 0, 1, f"{PARITY_TEXTS} texts")
        variant = _compare(folder, fitted.head, source, _runner(folder, encoder, converted))
    return Manifest(
        task=Task.CLASSIFICATION,
        variants=(variant,),
        labels=examples.labels,
        strategy=strategy,
        quality=quality,
        **rule.manifest_fields(),
        **{**common_fields(encoder, converted), "weights_sha256": source.weights_sha256},
    )


@contextmanager
def tuned_encoder(
    encoder: SourceEncoder, fitted: Fitted, folder: Path
) -> Iterator[tuple[SourceEncoder, SourceEncoder | None]]:
    """Yield the tuned encoder twice or, if the fit trained no encoder, `encoder` and None.

    The first item is the encoder that the head belongs to. A tuned encoder is written to a temporary folder in
    `folder`; the temporary folder is removed after the block, so do not use the tuned encoder later. Writing it
    restores the original weights of `fitted.tuned.trainable_encoder`.

    Args:
        encoder: the encoder before the fit.
        fitted: the result of the fit.
        folder: existing folder for the temporary folder.

    Raises:
        ExportError: the tuned encoder cannot be written or read.
        OSError: the disk is full.
    """
    if fitted.tuned is None:
        yield encoder, None
        return
    with tempfile.TemporaryDirectory(dir=folder) as raw:
        fitted.tuned.save(Path(raw))
        tuned = read_encoder(raw, name=encoder.name, max_tokens=encoder.max_tokens)
        yield tuned, tuned


def _runner(folder: Path, encoder: SourceEncoder, converted: Converted) -> OnnxRunner:
    return OnnxRunner(folder / MODEL_PATH, folder / "tokenizer.json", encoder.max_tokens, converted.pad_token_id)


def _compare(folder: Path, head: Head, source: SourceEncoder, runner: OnnxRunner) -> Variant:
    """Compare the exported classifier with PyTorch, write the head and the reference outputs, and return fp32's entry.

    The expected logits are those of the head for the encoder's vectors by PyTorch. The texts are those of
    `sample_texts`, such as docstrings, and none of the user's: a bundle must not give training texts away.

    Args:
        folder: the bundle's folder.
        head: the linear head.
        source: the encoder that the head belongs to; PyTorch runs it.
        runner: runner of the exported classifier.

    Returns:
        The variant fp32 for the manifest.

    Raises:
        ExportError: PyTorch cannot run the encoder, or the outputs differ.
    """
    texts: Sequence[str] = sample_texts(PARITY_TEXTS)
    vectors = torch_vectors(str(source.folder), texts, source.max_tokens, stated=source.max_tokens_stated)
    logits = head.logits(vectors)
    parity = compare(logits, runner.run(texts, "logits"), labels=True)
    require("the classifier", parity, logits)
    kept = slice(REFERENCE_TEXTS)
    Reference(tuple(texts[kept]), vectors[kept], logits[kept]).write(folder)
    head.write(folder)
    return Variant("fp32", MODEL_PATH, parity)


def _write_config(folder: Path, config: dict[str, object], examples: Examples) -> None:
    """Write the config.json of a classifier's bundle: `config` of the encoder, changed for transformers.

    The architecture, the labels and the kind of classification are set.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as ARCHITECTURES

    architecture = ARCHITECTURES.get(str(config.get("model_type")))
    write_json(
        folder / "config.json",
        {
            **config,
            "architectures": [architecture] if architecture else config.get("architectures"),
            "id2label": {str(i): label for i, label in enumerate(examples.labels)},
            "label2id": {label: i for i, label in enumerate(examples.labels)},
            "problem_type": f"{'multi' if examples.multi_label else 'single'}_label_classification",
        },
    )


def __getattr__(name: str) -> object:
    """Return `ClassifierData` for its former name `Data`, with a DeprecationWarning; AttributeError for other names."""
    if name == "Data":  # the next release removes the name `Data`
        warnings.warn("Data is now ClassifierData; import that name", DeprecationWarning, stacklevel=2)
        return ClassifierData
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
