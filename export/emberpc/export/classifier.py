"""Fine-tune a classification head on an encoder, and export both as one bundle.

The encoder stays as it is: every text is embedded once, a linear head
(multinomial logistic regression) is fitted to the vectors, and the head is
folded into the graph. One pass gives logits and embedding.
"""

from __future__ import annotations

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

#: Inverse strengths of regularisation to choose from: few examples want a large one, many a small one.
_GRID = (1.0, 10.0, 100.0, 1000.0)
_FOLDS = 5
#: Share of the texts that is held out to measure on where no validation file is given.
_HELD_OUT = 0.2
_MAX_ITERATIONS = 1000

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
    base: str,
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
    one, on a stratified fifth of the texts that a first head does not see; the
    head that is exported is then fitted to all of them. The temperature is
    fitted to logits of texts that their head did not see (cross-validation).

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
        temperature = fit_temperature(*_unseen_logits(vectors, numbers, head.c, seed))
        quality = {"train_texts": float(len(data.texts)), "labels": float(len(labels)), "regularisation_c": head.c}
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
            variants=(
                _compare(folder, data.texts, head, encoder.max_tokens, str(encoder.folder), converted.pad_token_id),
            ),
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
    from sklearn.linear_model import LogisticRegression

    if c is None:
        losses = {}
        for candidate in _GRID:
            logits, right = _unseen_logits(vectors, labels, candidate, seed)
            chosen = softmax(logits)[np.arange(len(right)), right]
            losses[candidate] = -np.log(np.maximum(chosen, 1e-12)).sum()
        c = min(losses, key=lambda candidate: losses[candidate])
    model = LogisticRegression(C=c, max_iter=_MAX_ITERATIONS).fit(vectors, labels)
    weights, bias = model.coef_.T, model.intercept_
    if weights.shape[1] == 1:
        # Of two labels scikit-learn gives one column, the logit of the second against the first.
        weights, bias = np.hstack([-weights / 2, weights / 2]), np.concatenate([-bias / 2, bias / 2])
    return Head(np.ascontiguousarray(weights, dtype=np.float32), bias.astype(np.float32), c)


def _unseen_logits(vectors: Matrix, labels: Labels, c: float, seed: int) -> tuple[Matrix, Labels]:
    """Return logits by heads that did not see the text: float32 (some texts, labels), and those texts' labels.

    An only example of its label is always seen, and so is not among them.
    """
    from sklearn.model_selection import StratifiedKFold

    counts = np.bincount(labels)
    several = np.flatnonzero(counts[labels] > 1)
    logits = np.zeros((len(several), len(counts)), dtype=np.float32)
    if len(several):
        splitter = StratifiedKFold(min(_FOLDS, int(counts[counts > 1].min())), shuffle=True, random_state=seed)
        for _, chosen in splitter.split(several, labels[several]):
            seen = np.delete(np.arange(len(labels)), several[chosen])
            logits[chosen] = fit_head(vectors[seen], labels[seen], seed, c=c).logits(vectors[several[chosen]])
    return logits, labels[several]


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
    """Measure a head on a stratified fifth of the texts that it does not see; nothing where they are too few."""
    from sklearn.model_selection import train_test_split

    if np.bincount(labels).min() < 2 or len(labels) * _HELD_OUT < labels.max() + 1:
        return {}
    seen, unseen = train_test_split(np.arange(len(labels)), test_size=_HELD_OUT, stratify=labels, random_state=seed)
    head = fit_head(vectors[seen], labels[seen], seed)
    temperature = fit_temperature(*_unseen_logits(vectors[seen], labels[seen], head.c, seed))
    return measure(head.logits(vectors[unseen]), labels[unseen], temperature)


def _compare(folder: Path, texts: list[str], head: Head, max_tokens: int, source: str, pad_token_id: int) -> Variant:
    """Compare the exported classifier with PyTorch on some of the texts, and keep them as its reference."""
    chosen = texts[:: max(1, len(texts) // PARITY_TEXTS)][:PARITY_TEXTS]
    embeddings = torch_embeddings(source, chosen, max_tokens)
    logits = head.logits(embeddings)
    runner = Runner(folder / MODEL_PATH, folder / "tokenizer.json", max_tokens, pad_token_id)
    parity = compare(logits, runner.run(chosen, "logits"), labels=True)
    require("the classifier", parity, logits)
    kept = slice(REFERENCE_TEXTS)
    Reference(tuple(chosen[kept]), embeddings[kept], logits[kept]).write(folder)
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
    architecture = str(config.get("model_type", "")).title().replace("-", "") + "ForSequenceClassification"
    write_json(
        folder / "config.json",
        {
            **config,
            "architectures": [architecture],
            "id2label": {str(i): label for i, label in enumerate(labels)},
            "label2id": {label: i for i, label in enumerate(labels)},
            "problem_type": "single_label_classification",
        },
    )
