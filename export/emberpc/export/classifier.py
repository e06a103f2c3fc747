"""Fine-tune a classifier with one of the strategies, calibrate it, and export encoder and head as one bundle."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypedDict

from emberpc.bundle import DecisionRule, Head, Manifest, Reference, Task, Variant, finish_bundle, staged_folder
from emberpc.export.card import model_card
from emberpc.export.classify.cached_encoder import CachedEncoder
from emberpc.export.classify.calibration import FEW_TEXTS, weakness
from emberpc.export.classify.evaluation import HeldOut, calibrate, measure, measure_scope
from emberpc.export.classify.label_descriptions import described_examples
from emberpc.export.classify.linear import Matrix
from emberpc.export.classify.strategies import EXPORTABLE, STRATEGIES, Fitted, Options
from emberpc.export.convert.onnx_runner import OnnxRunner
from emberpc.export.convert.parity import compare, require, torch_embeddings
from emberpc.export.data.datasets import read_labelled, read_texts
from emberpc.export.data.examples import Examples, held_out_examples, training_examples
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
from emberpc.export.progress import Progress, no_progress
from emberpc.export.source.encoder import Encoder, read_encoder
from emberpc.export.threads import bounded_threads
from emberpc.export.timing import Cost
from emberpc.export.tuning.checkpoint import Checkpoints
from emberpc.export.variants import FP32, add_variants, check_names

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClassifierData:
    """Paths of the files with a classifier's texts (CSV, TSV, JSONL or Parquet), and their columns.

    `train` has the training texts. `validation` has texts for early stopping and calibration; None: some training texts
    serve for this. `outside` has texts without any of the labels, in the column `text_column`. `descriptions` has the
    columns `label` and `description`, with one row for each label.
    """

    train: Path | str
    validation: Path | str | None = None
    outside: Path | str | None = None
    descriptions: Path | str | None = None
    text_column: str = "text"
    label_column: str = "label"
    #: Separator between the labels of a text; None: every text has one label.
    separator: str | None = None
    #: Fewest training texts that each label must have.
    min_examples: int = 2


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
    checkpoints: Path | None = None,
    variants: Sequence[str] = (FP32,),
    overwrite: bool = False,
    max_tokens: int | None = None,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Manifest:
    """Fine-tune a classifier, export it as a bundle, and check it against PyTorch.

    Temperature, thresholds and the figures in `quality` come from texts that the classifier, or a classifier fitted in
    the same way, was not trained on: those of the validation file, or training texts that are held out or
    cross-validated. With too few texts for this, probabilities are not calibrated, and a warning is logged.

    Args:
        data: paths and format of the texts.
        base: the encoder: a folder, an installed package that holds one, or a hub id.
        target: the bundle's folder; it is written atomically.
        strategy: one of `EXPORTABLE`.
        label_texts: whether to train on the labels' descriptions, too, or on the labels' names if there are no
            descriptions. Names are used only if they help to classify the texts; numbers do not. The strategy zero-shot
            requires True.
        balanced: whether every label has the same weight, whatever its number of texts.
        epochs: the most passes over the texts, if the strategy trains the encoder; default: 5 to 12, fewer for more
            texts.
        rejection_rate: share of texts with labels that may be rejected as out of scope, in [0, 1), if `data` has no
            texts outside all labels; 0: nothing is rejected.
        checkpoints: folder for checkpoints, from which an interrupted training continues; they are removed once the
            bundle is written. None: no checkpoints.
        variants: variants to write in addition to fp32: names, or `auto`; see `emberpc.export.variants`. They are
            measured on the validation file, or else on training texts that the classifier was not trained on, or else
            on texts that it was trained on. The manifest says which texts these were.
        overwrite: whether to replace an existing bundle.
        max_tokens: the most tokens of a text; training truncates longer texts. Default: the base's limit.
        seed: seed of splits and order.
        progress: called with the current step.

    Returns:
        The manifest, with the measured parity and quality.

    Raises:
        ExportError: an argument is invalid, the data or the base cannot be used, label descriptions are missing, a
            variant requested by name misses its bound, or outputs differ from PyTorch's.
        BundleError: `target` exists and may not be replaced.
        OSError: the disk is full.
    """
    if strategy not in EXPORTABLE:
        raise ExportError(f"there is no strategy {strategy!r} to export; there are: {', '.join(EXPORTABLE)}")
    if not 0 <= rejection_rate < 1:
        raise ExportError(f"the rejection rate is {rejection_rate}; it must be at least 0 and less than 1")
    check_names(variants)
    examples, validation, outside = read_data(data)
    encoder = read_encoder(base, max_tokens=max_tokens, progress=progress)
    kept = Checkpoints(checkpoints)
    with staged_folder(target, overwrite=overwrite) as folder:
        converted = convert_encoder(encoder, folder, progress)
        converted.graph.save(folder / MODEL_PATH)
        cached_encoder = CachedEncoder(encoder, _runner(folder, encoder, converted), progress)
        if label_texts:
            examples = described_examples(examples, data.descriptions, cached_encoder)
        elif strategy == "zero-shot":
            raise ExportError("the strategy zero-shot needs label texts; do not switch them off")
        options = Options(seed, balanced, validation, epochs, kept, progress)
        with Cost() as cost:
            fitted = STRATEGIES[strategy].fit(examples, cached_encoder, options)
        _warn_of_few(len(fitted.held_out), data.train)
        beyond = fitted.classify(outside) if outside else None
        rule = calibrate(
            fitted.held_out, multi_label=examples.multi_label, outside=beyond, rejection_rate=rejection_rate
        )
        quality = {
            "train_texts": float(len(examples.texts)),
            "labels": float(len(examples.labels)),
            "label_texts": float(len(examples.descriptions)),
            "conflicting_texts": float(_conflicts(examples)),
            **({} if outside else {"rejection_rate": rejection_rate}),
            "fit_seconds": kept.spent.seconds + cost.seconds,
            "fit_cpu_seconds": kept.spent.cpu_seconds + cost.cpu_seconds,
            **fitted.figures,
            **_measured(fitted, rule, beyond),
        }
        manifest = _write(folder, encoder, converted, fitted, examples, rule, quality, strategy, progress)
        manifest = add_variants(
            folder,
            manifest,
            variants,
            model_type=str(encoder.config.get("model_type", "")),
            **_to_measure_on(examples, validation, fitted.held_out),
            progress=progress,
        )
        (folder / "README.md").write_text(model_card(manifest), encoding="utf-8")
        manifest = finish_bundle(folder, manifest)
    kept.remove()
    return manifest


def _warn_of_few(held_out: int, source: Path | str) -> None:
    """Log a warning if there are no held-out texts, or too few for a good calibration.

    Args:
        held_out: number of held-out texts.
        source: file of the training texts, for the warning.
    """
    if not held_out:
        _LOGGER.warning(
            "%s: there are too few texts to hold any out, so no temperature could be fitted: the probabilities are "
            "not calibrated; give more texts, or a validation file",
            source,
        )
    elif few := weakness(held_out):
        _LOGGER.warning(
            "%s: the calibration of probabilities is rough: %s; give at least %d texts, or a validation file",
            source,
            few,
            FEW_TEXTS,
        )


def read_data(data: ClassifierData) -> tuple[Examples, Examples | None, list[str]]:
    """Read the training texts, the validation texts, and the texts outside all labels.

    Returns:
        The training examples; the validation examples, or None without that file; the texts outside all labels, an
        empty list without that file.

    Raises:
        ExportError: a file cannot be read or its data cannot be used; the error names the file, and the row if one row
            is the cause.
    """
    read = partial(
        read_labelled, text_column=data.text_column, label_column=data.label_column, separator=data.separator
    )
    train = read(data.train)
    examples = training_examples(train, multi_label=data.separator is not None, min_examples=data.min_examples)
    validation = held_out_examples(read(data.validation), examples) if data.validation is not None else None
    outside = read_texts(data.outside, text_column=data.text_column) if data.outside is not None else []
    return examples, validation, outside


class _Measuring(TypedDict):
    examples: Examples
    measured_on: str


def _to_measure_on(examples: Examples, validation: Examples | None, held_out: HeldOut) -> _Measuring:
    """Choose the texts to measure variants on: if possible, texts that the classifier was not trained on.

    Args:
        examples: the training texts.
        validation: the texts of the validation file; None without such a file.
        held_out: the held-out texts of the fit.

    Returns:
        Keyword arguments for `add_variants`: the examples, and their description.
    """
    if validation is not None:
        return {"examples": validation, "measured_on": "the texts of the validation file"}
    if held_out.unseen and len(held_out.rows):
        return {"examples": examples.take(held_out.rows), "measured_on": "training texts that were held out"}
    fitted_to = (
        "training texts that the classifier was fitted to: the accuracy is too high, fp32's as much as a variant's"
    )
    return {"examples": examples, "measured_on": fitted_to}


def _conflicts(examples: Examples) -> int:
    """Return the number of distinct texts that occur with different labels."""
    given: dict[str, set[bytes]] = {}
    for text, targets in zip(examples.texts, examples.targets, strict=True):
        given.setdefault(text, set()).add(targets.tobytes())
    return sum(len(different) > 1 for different in given.values())


def _measured(fitted: Fitted, rule: DecisionRule, beyond: Matrix | None) -> dict[str, float]:
    """Return figures of a classifier on its held-out texts; an empty dict if there are none.

    `beyond` are logits of texts outside all labels, float32 (texts, labels); None: no figures of their rejection.
    """
    held_out = fitted.held_out
    if not len(held_out):
        return {}
    found = {"held_out_texts": float(len(held_out)), **measure(held_out.logits, held_out.targets, rule)}
    if beyond is not None:
        found |= measure_scope(held_out.logits, beyond, rule)
    return found


def _write(
    folder: Path,
    encoder: Encoder,
    converted: Converted,
    fitted: Fitted,
    examples: Examples,
    rule: DecisionRule,
    quality: dict[str, float],
    strategy: str,
    progress: Progress,
) -> Manifest:
    """Write graph, config, head and reference outputs of a classifier's bundle; compare the classifier with PyTorch.

    `folder` must have the tokenizer files that `convert_encoder` writes. The encoder of `converted`, or the tuned
    encoder of `fitted` if there is one, gets the head of `fitted`.

    Returns:
        The manifest, without further variants and without hashes of files.

    Raises:
        ExportError: the strategy made no linear head, or outputs differ from PyTorch's.
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
        progress("comparing with PyTorch", 0, 1)
        variant = _compare(folder, fitted.head, source, _runner(folder, encoder, converted))
    return Manifest(
        task=Task.CLASSIFICATION,
        variants=(variant,),
        labels=examples.labels,
        multi_label=examples.multi_label,
        thresholds=rule.thresholds,
        temperature=rule.temperature,
        rejection_logit=rule.rejection_logit,
        strategy=strategy,
        quality=quality,
        **{**common_fields(encoder, converted), "weights_sha256": source.weights_sha256},
    )


@contextmanager
def tuned_encoder(encoder: Encoder, fitted: Fitted, folder: Path) -> Iterator[tuple[Encoder, Encoder | None]]:
    """Yield the encoder that the head belongs to, and the tuned encoder, or None if the fit trained no encoder.

    A tuned encoder is written to a temporary folder in `folder`, which is removed after the block.

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


def _runner(folder: Path, encoder: Encoder, converted: Converted) -> OnnxRunner:
    return OnnxRunner(folder / MODEL_PATH, folder / "tokenizer.json", encoder.max_tokens, converted.pad_token_id)


def _compare(folder: Path, head: Head, source: Encoder, runner: OnnxRunner) -> Variant:
    """Compare the exported classifier with PyTorch, write the head and the reference outputs, and return fp32.

    The texts of the reference are docstrings of Python's standard library and none of the user's texts: a bundle must
    not give training texts away.

    Args:
        folder: the bundle's folder.
        head: the linear head.
        source: the encoder that the head belongs to, for PyTorch.
        runner: runner of the exported classifier.

    Raises:
        ExportError: the outputs differ from PyTorch's.
    """
    texts: Sequence[str] = sample_texts(PARITY_TEXTS)
    embeddings = torch_embeddings(str(source.folder), texts, source.max_tokens, stated=source.max_tokens_stated)
    logits = head.logits(embeddings)
    parity = compare(logits, runner.run(texts, "logits"), labels=True)
    require("the classifier", parity, logits)
    kept = slice(REFERENCE_TEXTS)
    Reference(tuple(texts[kept]), embeddings[kept], logits[kept]).write(folder)
    head.write(folder)
    return Variant("fp32", MODEL_PATH, parity)


def _write_config(folder: Path, config: dict[str, object], examples: Examples) -> None:
    """Write the config.json of a classifier's bundle: `config` of the encoder, with the labels for transformers."""
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
    """Return `ClassifierData` under its former name `Data`, with a DeprecationWarning; removed in the next release."""
    if name == "Data":
        warnings.warn("Data is now ClassifierData; import that name", DeprecationWarning, stacklevel=2)
        return ClassifierData
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
