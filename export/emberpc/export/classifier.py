"""Fine-tune a classifier by one of the strategies, calibrate it, and export encoder and head as one bundle."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypedDict

from emberpc.bundle import Head, Manifest, Reference, Task, Variant, finish_bundle, staged_folder
from emberpc.export.calibration import FEW_TEXTS, weakness
from emberpc.export.card import model_card
from emberpc.export.datasets import read_labelled, read_texts
from emberpc.export.describing import described_examples
from emberpc.export.embedding import (
    MODEL_PATH,
    PARITY_TEXTS,
    REFERENCE_TEXTS,
    Converted,
    common_fields,
    convert_encoder,
    write_json,
)
from emberpc.export.encoder import Encoder, read_encoder
from emberpc.export.errors import ExportError
from emberpc.export.evaluation import Calibration, HeldOut, calibrate, measure, measure_scope
from emberpc.export.examples import Examples, held_out_examples, training_examples
from emberpc.export.linear import Matrix
from emberpc.export.parity import compare, require, torch_embeddings
from emberpc.export.progress import Progress, no_progress
from emberpc.export.runner import Runner
from emberpc.export.stdlib_texts import sample_texts
from emberpc.export.strategies import EXPORTABLE, STRATEGIES, Fitted, Options
from emberpc.export.tuning.checkpoint import Checkpoints
from emberpc.export.variants import FP32, add_variants, check_names
from emberpc.export.workbench import Cost, Workbench

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Data:
    """Where the texts of a classifier are.

    All are CSV, TSV, JSONL or Parquet. `validation` is for stopping early and
    calibration, `outside` holds texts that have none of the labels, and
    `descriptions` says in words what each label means.
    """

    train: Path | str
    validation: Path | str | None = None
    outside: Path | str | None = None
    descriptions: Path | str | None = None
    text_column: str = "text"
    label_column: str = "label"
    #: What stands between the labels of a text that may have several; None: every text has one.
    separator: str | None = None
    #: Fewest texts that a label must have.
    min_examples: int = 2


def export_classifier(
    data: Data,
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
    """Fine-tune a classifier, export it, and check it against PyTorch.

    Temperature, thresholds and the figures in `quality` come from texts that
    the classifier, or one fitted the same way, had not seen: those of the
    validation file, or training texts that are held out or cross-validated.

    Args:
        data: where the texts are.
        base: the encoder: a folder, an installed package that holds one, or a hub id.
        target: the bundle's folder; whole at the end, or not there.
        strategy: one of `EXPORTABLE`.
        label_texts: whether to learn from what labels are called or from their descriptions, too; names that do not
            tell the texts apart, such as numbers, are left.
        balanced: whether every label counts alike, however many texts it has.
        epochs: passes over the texts; default: fewer the more texts there are.
        rejection_rate: the share of texts with labels that may be rejected as out of scope, in [0, 1), where there
            are no texts that have none of the labels; 0: nothing is rejected.
        checkpoints: where a training keeps what it needs to go on after an interruption.
        variants: what to write beside fp32: names, or `auto`; see `emberpc.export.variants`. They are measured on the
            validation file, else on training texts that were held out for good, else on those learnt from; the manifest
            says which.
        overwrite: whether to replace a bundle that is there.
        max_tokens: the most tokens of a text, longer ones are cut in training; default: what the base says.
        seed: of splits and order.
        progress: told what is being done.

    Returns:
        The manifest, with the parity and the quality measured.

    Raises:
        ExportError: the data or the base cannot be used, or the outcome does not give what PyTorch gives.
        BundleError: `target` is taken.
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
        workbench = Workbench(encoder, _runner(folder, encoder, converted), progress)
        if label_texts:
            examples = described_examples(examples, data.descriptions, workbench)
        elif strategy == "zero-shot":
            raise ExportError("zero-shot goes by what labels are called; leave their texts in")
        options = Options(seed, balanced, validation, epochs, kept, progress)
        with Cost() as cost:
            fitted = STRATEGIES[strategy].fit(examples, workbench, options)
        _warn_of_few(len(fitted.held_out), data.train)
        beyond = fitted.classify(outside) if outside else None
        calibration = calibrate(
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
            **_measured(fitted, calibration, beyond),
        }
        manifest = _write(folder, encoder, converted, fitted, examples, calibration, quality, strategy, progress)
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
    """Warn that the probabilities are not calibrated, or that few held-out texts support them."""
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


def read_data(data: Data) -> tuple[Examples, Examples | None, list[str]]:
    """Read the training texts, those to validate on, and those outside all labels."""
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
    """Choose the texts to measure variants on: such as the classifier has not seen, if there are any."""
    if validation is not None:
        return {"examples": validation, "measured_on": "the texts of the validation file"}
    if held_out.unseen and len(held_out.rows):
        return {"examples": examples.take(held_out.rows), "measured_on": "training texts that were held out"}
    fitted_to = "training texts that the classifier was fitted to: accuracy flatters, fp32's as much as a variant's"
    return {"examples": examples, "measured_on": fitted_to}


def _conflicts(examples: Examples) -> int:
    """Count the texts that are there with different labels."""
    given: dict[str, set[bytes]] = {}
    for text, targets in zip(examples.texts, examples.targets, strict=True):
        given.setdefault(text, set()).add(targets.tobytes())
    return sum(len(different) > 1 for different in given.values())


def _measured(fitted: Fitted, calibration: Calibration, beyond: Matrix | None) -> dict[str, float]:
    """Measure on the texts that were held out; nothing where there are none."""
    held_out = fitted.held_out
    if not len(held_out):
        return {}
    found = {"held_out_texts": float(len(held_out)), **measure(held_out.logits, held_out.targets, calibration)}
    if beyond is not None:
        found |= measure_scope(held_out.logits, beyond, calibration)
    return found


def _write(
    folder: Path,
    encoder: Encoder,
    converted: Converted,
    fitted: Fitted,
    examples: Examples,
    calibration: Calibration,
    quality: dict[str, float],
    strategy: str,
    progress: Progress,
) -> Manifest:
    """Put the head on the graph, compare it with PyTorch, write what else belongs to it, and say what it is."""
    if fitted.head is None:
        raise ExportError(f"the outcome of {strategy} is no linear head; choose another strategy")
    with tuned_encoder(encoder, fitted, folder) as (source, tuned):
        if tuned is not None:
            converted = convert_encoder(tuned, folder, progress)
        converted.graph.classify(
            fitted.head.weights, fitted.head.bias, calibration.temperature, multi_label=examples.multi_label
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
        thresholds=calibration.thresholds,
        temperature=calibration.temperature,
        rejection_logit=calibration.rejection_logit,
        strategy=strategy,
        quality=quality,
        **{**common_fields(encoder, converted), "weights_sha256": source.weights_sha256},
    )


@contextmanager
def tuned_encoder(encoder: Encoder, fitted: Fitted, folder: Path) -> Iterator[tuple[Encoder, Encoder | None]]:
    """Give the encoder whose vectors the head is for, and that again if it was tuned, written to a temporary folder."""
    if fitted.tuned is None:
        yield encoder, None
        return
    with tempfile.TemporaryDirectory(dir=folder) as raw:
        fitted.tuned.save(Path(raw))
        tuned = read_encoder(raw, name=encoder.name, max_tokens=encoder.max_tokens)
        yield tuned, tuned


def _runner(folder: Path, encoder: Encoder, converted: Converted) -> Runner:
    return Runner(folder / MODEL_PATH, folder / "tokenizer.json", encoder.max_tokens, converted.pad_token_id)


def _compare(folder: Path, head: Head, source: Encoder, runner: Runner) -> Variant:
    """Compare the exported classifier with PyTorch, and keep some texts with their outputs as its reference.

    None of the user's texts: what they trained on is not to travel in the bundle.
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
    """Write config.json so that others load the bundle as a classifier."""
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
