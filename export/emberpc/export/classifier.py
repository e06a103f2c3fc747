"""Fine-tune a classification head on an encoder, and export both as one bundle.

The encoder stays as it is: every text is embedded once, a linear head
(multinomial logistic regression) is fitted to the vectors, and the head is
folded into the graph. One pass gives logits and embedding.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
import numpy.typing as npt

from emberpc.bundle import Manifest, Reference, Task, Variant, finish_bundle, staged_folder
from emberpc.export.calibration import expected_calibration_error, fit_temperature, softmax
from emberpc.export.card import model_card
from emberpc.export.datasets import LabelledTexts, read_labelled
from emberpc.export.embedding import (
    MODEL_PATH,
    PARITY_TEXTS,
    REFERENCE_TEXTS,
    common_fields,
    convert_encoder,
    write_json,
)
from emberpc.export.encoder import read_encoder
from emberpc.export.errors import ExportError
from emberpc.export.parity import compare, require, torch_embeddings
from emberpc.export.progress import Progress, no_progress
from emberpc.export.runner import Matrix, Runner
from emberpc.export.stdlib_texts import sample_texts

#: Inverse strengths of regularisation to choose from: few examples want a large one, many a small one.
_GRID = (1.0, 10.0, 100.0, 1000.0)
_FOLDS = 5
#: Share of the texts that is held out to measure on where no validation file is given.
_HELD_OUT = 0.2
_MAX_ITERATIONS = 1000
#: Where every label has one example, nothing can be chosen by measuring; large ones were the best for few examples.
_FEW_EXAMPLES_C = 100.0

_LOGGER = logging.getLogger(__name__)

Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Head:
    """A linear head: logits = vectors @ weights + bias; float32 (dimensions, labels) and (labels,)."""

    weights: Matrix
    bias: Matrix
    c: float

    def logits(self, vectors: Matrix) -> Matrix:
        """Return float32 (texts, labels) for float32 (texts, dimensions)."""
        return np.asarray(vectors @ self.weights + self.bias, dtype=np.float32)


def export_classifier(
    train: Path | str,
    base: str | Path,
    target: Path | str,
    *,
    validation: Path | str | None = None,
    text_column: str = "text",
    label_column: str = "label",
    overwrite: bool = False,
    max_tokens: int | None = None,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Manifest:
    """Fine-tune a single-label classifier, export it, and check it against PyTorch.

    The figures in `quality` are measured on the validation file or, without
    one, on a fifth of each label's texts that a first head does not see; the
    head that is exported is then fitted to all of them. The temperature is
    fitted to logits of texts that their head did not see (cross-validation).
    A label may have a single example; it is then not measured. Texts that are there
    with several labels are counted (`conflicting_texts`) and logged as a warning.

    Args:
        train: CSV, TSV, JSONL or Parquet with texts and labels.
        base: the encoder: a folder, an installed package that holds one, or a hub id.
        target: the bundle's folder; whole at the end, or not there.
        validation: a file like `train`, only to measure on.
        text_column: the column with the texts.
        label_column: the column with the labels.
        overwrite: whether to replace a bundle that is there.
        max_tokens: the most tokens of a text, longer ones are cut in training; default: what the base says.
        seed: of the splits.
        progress: told what is being done.

    Returns:
        The manifest, with the parity and the quality measured.

    Raises:
        ExportError: the data or the base cannot be used, or the outcome does not give what PyTorch gives.
        BundleError: `target` is taken.
    """
    data = read_labelled(train, text_column=text_column, label_column=label_column)
    labels = _labels(data)
    if conflicts := data.conflicts():
        text, given = next(iter(conflicts.items()))
        _LOGGER.warning(
            "%s: %d texts have several labels, such as %s for %.60r; the head cannot get them all right",
            data.path,
            len(conflicts),
            " and ".join(sorted(given)),
            text,
        )
    held_out = read_labelled(validation, text_column=text_column, label_column=label_column) if validation else None
    if held_out:
        _check_known(held_out, labels)
    encoder = read_encoder(base, max_tokens=max_tokens, progress=progress)
    with staged_folder(target, overwrite=overwrite) as folder:
        converted = convert_encoder(encoder, folder, progress)
        converted.graph.save(folder / MODEL_PATH)
        runner = Runner(folder / MODEL_PATH, folder / "tokenizer.json", encoder.max_tokens, converted.pad_token_id)
        prompt = encoder.prompts.passage
        start = perf_counter()
        vectors = runner.run([prompt + text for text in data.texts], "sentence_embedding", progress=progress)
        embedded = perf_counter() - start
        progress("fitting the head", 0, 1)
        numbers = np.array([labels.index(label) for label in data.labels], dtype=np.int64)
        head = fit_head(vectors, numbers, seed)
        temperature = _temperature(vectors, numbers, head, seed)
        quality = {
            "train_texts": float(len(data.texts)),
            "labels": float(len(labels)),
            "conflicting_texts": float(len(data.conflicts())),
            "regularisation_c": head.c,
        }
        quality["embed_seconds"], quality["fit_seconds"] = embedded, perf_counter() - start - embedded
        if held_out:
            numbers_out = np.array([labels.index(label) for label in held_out.labels], dtype=np.int64)
            out = runner.run([prompt + text for text in held_out.texts], "sentence_embedding", progress=progress)
            quality |= measure(head.logits(out), numbers_out, temperature)
        else:
            quality |= _measure_split(vectors, numbers, seed)
        converted.graph.classify(head.weights, head.bias)
        converted.graph.save(folder / MODEL_PATH)
        _write_config(folder, encoder.config, labels)
        progress("comparing with PyTorch", 0, 1)
        manifest = Manifest(
            task=Task.CLASSIFICATION,
            variants=(_compare(folder, head, encoder.max_tokens, str(encoder.folder), converted.pad_token_id),),
            labels=tuple(labels),
            temperature=temperature,
            quality=quality,
            **common_fields(encoder, converted),
        )
        (folder / "README.md").write_text(model_card(manifest), encoding="utf-8")
        return finish_bundle(folder, manifest)


def fit_head(vectors: Matrix, labels: Labels, seed: int, *, c: float | None = None) -> Head:
    """Fit multinomial logistic regression.

    Args:
        vectors: float32 (texts, dimensions).
        labels: int (texts,), every one from 0 to the greatest at least once.
        seed: of the cross-validation.
        c: inverse strength of regularisation; default: chosen by cross-validated likelihood.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    if c is None:
        c = _choose_c(vectors, labels, seed)
    # The grid is for vectors of about length 1; others are fitted as if they were, and the weights scaled back.
    length = float(np.linalg.norm(vectors, axis=1).mean())
    with warnings.catch_warnings():
        # A weakly regularised head goes on improving for ever; cross-validation has the last word on it.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = LogisticRegression(C=c, max_iter=_MAX_ITERATIONS).fit(vectors / length, labels)
    weights, bias = model.coef_.T / length, model.intercept_
    if weights.shape[1] == 1:
        # Of two labels scikit-learn gives one column, the logit of the second against the first.
        weights, bias = np.hstack([-weights / 2, weights / 2]), np.concatenate([-bias / 2, bias / 2])
    return Head(np.ascontiguousarray(weights, dtype=np.float32), bias.astype(np.float32), c)


def _choose_c(vectors: Matrix, labels: Labels, seed: int) -> float:
    """Return the C under which texts that the head did not see have the likeliest labels."""
    losses = {}
    for candidate in _GRID:
        rows, logits = _unseen_logits(vectors, labels, candidate, seed)
        if not len(rows):
            return _FEW_EXAMPLES_C
        likelihood = softmax(logits)[np.arange(len(rows)), labels[rows]]
        losses[candidate] = -np.log(np.maximum(likelihood, 1e-12)).mean()
    return min(losses, key=lambda candidate: losses[candidate])


def _unseen_logits(vectors: Matrix, labels: Labels, c: float, seed: int) -> tuple[Labels, Matrix]:
    """Give texts logits by heads that did not see them, in cross-validation.

    The only example of a label is never left out, so that every head knows every label.

    Returns:
        The texts' indexes, and float32 (those texts, labels); both empty if every label has one example only.
    """
    folds = _stratify(labels, seed)
    rows, parts = [], []
    for fold in range(int(folds.max()) + 1):
        unseen = np.flatnonzero(folds == fold)
        seen = folds != fold
        rows.append(unseen)
        parts.append(fit_head(vectors[seen], labels[seen], seed, c=c).logits(vectors[unseen]))
    if not rows:
        return np.zeros(0, dtype=np.int64), np.zeros((0, int(labels.max()) + 1), dtype=np.float32)
    return np.concatenate(rows), np.concatenate(parts)


def _stratify(labels: Labels, seed: int) -> Labels:
    """Divide texts into folds, each label's as evenly as may be; -1 for the only example of a label."""
    generator = np.random.default_rng(seed)
    folds = np.full(len(labels), -1, dtype=np.int64)
    start = 0
    for label in range(int(labels.max()) + 1):
        rows = generator.permutation(np.flatnonzero(labels == label))
        if len(rows) > 1:
            folds[rows] = (start + np.arange(len(rows))) % _FOLDS
            start += len(rows)  # else the first folds would get the odd ones of every label
    # Few texts may leave a fold empty: number those that there are.
    used = np.unique(folds[folds >= 0])
    folds[folds >= 0] = np.searchsorted(used, folds[folds >= 0])
    return folds


def measure(logits: Matrix, labels: Labels, temperature: float) -> dict[str, float]:
    """Measure a head on texts that it did not see; logits (texts, labels), labels (texts,)."""
    from sklearn.metrics import f1_score

    predicted = logits.argmax(axis=1)
    return {
        "held_out_texts": float(len(labels)),
        "accuracy": float((predicted == labels).mean()),
        "macro_f1": float(f1_score(labels, predicted, average="macro")),
        "ece_uncalibrated": expected_calibration_error(softmax(logits), labels),
        "ece": expected_calibration_error(softmax(logits, temperature), labels),
    }


def _measure_split(vectors: Matrix, labels: Labels, seed: int) -> dict[str, float]:
    """Measure a head on a fifth of each label's texts, which it does not see.

    Labels of fewer than five texts are not measured; nothing is if all are such.
    """
    unseen = np.zeros(len(labels), dtype=bool)
    generator = np.random.default_rng(seed)
    for label in range(int(labels.max()) + 1):
        rows = np.flatnonzero(labels == label)
        unseen[generator.permutation(rows)[: int(len(rows) * _HELD_OUT)]] = True
    if not unseen.any():
        return {}
    head = fit_head(vectors[~unseen], labels[~unseen], seed)
    return measure(
        head.logits(vectors[unseen]), labels[unseen], _temperature(vectors[~unseen], labels[~unseen], head, seed)
    )


def _temperature(vectors: Matrix, labels: Labels, head: Head, seed: int) -> float:
    """Fit the temperature to logits of texts that their head did not see; 1 where there are none."""
    rows, logits = _unseen_logits(vectors, labels, head.c, seed)
    return fit_temperature(logits, labels[rows]) if len(rows) else 1.0


def _compare(folder: Path, head: Head, max_tokens: int, source: str, pad_token_id: int) -> Variant:
    """Compare the exported classifier with PyTorch, and keep some texts with their outputs as its reference.

    None of the user's texts: what they trained on is not to travel in the bundle.
    """
    texts = sample_texts(PARITY_TEXTS)
    embeddings = torch_embeddings(source, texts, max_tokens)
    logits = head.logits(embeddings)
    runner = Runner(folder / MODEL_PATH, folder / "tokenizer.json", max_tokens, pad_token_id)
    parity = compare(logits, runner.run(texts, "logits"), labels=True)
    require("the classifier", parity, logits)
    kept = slice(REFERENCE_TEXTS)
    Reference(tuple(texts[kept]), embeddings[kept], logits[kept]).write(folder)
    return Variant("fp32", MODEL_PATH, parity)


def _labels(data: LabelledTexts) -> list[str]:
    labels = sorted(set(data.labels))
    if len(labels) < 2:
        raise ExportError(f"{data.path} has the label {labels[0]!r} only; a classifier needs at least two")
    return labels


def _check_known(validation: LabelledTexts, labels: list[str]) -> None:
    unknown = sorted(set(validation.labels) - set(labels))
    if unknown:
        raise ExportError(f"{validation.path} has labels that the training file has not: {', '.join(unknown)}")


def _write_config(folder: Path, config: dict[str, object], labels: list[str]) -> None:
    """Write config.json so that others load the bundle as a classifier."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as ARCHITECTURES

    architecture = ARCHITECTURES.get(str(config.get("model_type")))
    write_json(
        folder / "config.json",
        {
            **config,
            "architectures": [architecture] if architecture else config.get("architectures"),
            "id2label": {str(i): label for i, label in enumerate(labels)},
            "label2id": {label: i for i, label in enumerate(labels)},
            "problem_type": "single_label_classification",
        },
    )
