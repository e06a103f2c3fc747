"""The interface of strategies, and functions that several of them use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil, log2
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from emberpc.bundle import DecisionRule, Head
from emberpc.bundle.calibration import fit_thresholds
from emberpc.bundle.decision import probabilities
from emberpc.bundle.evaluation import HeldOut
from emberpc.export.classify.cached_encoder import CachedEncoder
from emberpc.export.classify.linear import Matrix, right, stratify
from emberpc.export.data.examples import Examples, Rows
from emberpc.export.progress import Progress, no_progress
from emberpc.export.tuning.checkpoint import Checkpoints

if TYPE_CHECKING:
    import torch

    from emberpc.export.tuning.trainable_encoder import TrainableEncoder

#: Without a validation file, one of this many folds of the training texts is held out for early stopping and
#: calibration.
_HELD_OUT_FOLDS = 5
#: Number of training texts from which on the model is not trained a second time on all texts. Fewer texts are held out
#: then, one of `_FEW_HELD_OUT_FOLDS` folds: a second training costs as much as the first, and a tenth more texts would
#: gain a quarter of a point (docs/decisions/measurements/0026).
_REFIT_BELOW = 2000
_FEW_HELD_OUT_FOLDS = 10
#: Maximum number of training texts that are held out.
_MAX_HELD_OUT = 500
#: Minimum number of held-out texts that may stop a training early. Fewer texts would stop it by chance: of 6 texts, a
#: single one changes the accuracy by more than its standard error.
_MIN_TO_STOP = 50
#: Minimum number of epochs of a training.
_MIN_EPOCHS = 2
#: A training of few texts learns from at least this many texts, repetitions included (50 steps of 16 texts), but has no
#: more epochs for that than `_FEW_TEXTS_EPOCHS`.
_MIN_TRAINED = 800
_FEW_TEXTS_EPOCHS = 8
#: Number of texts, repetitions included, that a quick training learns from: 100 steps of 16 texts.
_QUICK_TEXTS = 1600
#: Number of layers of many small encoders; for estimates of times where the number is not known or hardly counts.
TYPICAL_LAYERS = 6
#: Cost of training on a text, as a multiple of a pass forward: the pass backward costs about two passes forward.
_TRAINED_PASSES = 3.0


@dataclass(frozen=True)
class Options:
    """Options of a fit. `seed` decides held-out texts, folds and order; `progress` is called with the current step."""

    seed: int = 0
    #: Whether every label has the same total weight in the loss, whatever its number of texts.
    balanced: bool = False
    #: Texts for calibration and, if the encoder is trained, for early stopping. None: training texts serve for this,
    #: some that are held out, or, by cross-validation, almost all.
    validation: Examples | None = None
    #: Maximum number of passes over the texts of a strategy that trains the encoder; None: 2 to 8, fewer for many
    #: texts.
    epochs: int | None = None
    #: Where trainings store their checkpoints; default: nowhere. The caller removes the checkpoints once the result of
    #: the fit is stored.
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    progress: Progress = no_progress
    #: Whether a strategy that trains the encoder makes one short training only (`fit_and_hold_out` says how); other
    #: strategies ignore this.
    quick: bool = False


@dataclass(frozen=True)
class Tuned:
    """Trained weights of an encoder by parameter name.

    `top` is the number of upper layers that were trained. `trainable_encoder` is the encoder in PyTorch that was
    trained.
    """

    weights: Mapping[str, torch.Tensor]
    top: int
    trainable_encoder: TrainableEncoder

    def save(self, folder: Path) -> None:
        """Write the tuned encoder to `folder` in the format of sentence-transformers.

        This restores the original weights of `trainable_encoder`.

        Raises:
            ExportError: the folder cannot be written.
            OSError: the disk is full.
        """
        self.trainable_encoder.save(self.weights, self.top, folder)


@dataclass(frozen=True)
class Fitted:
    """Result of a strategy.

    `classify` returns the logits of texts, float32 (texts, labels). `held_out` has logits of texts by classifiers that
    were not trained on them: by this classifier, or by others fitted in the same way; `held_out` may be empty. `head`
    is the linear head on the encoder's vectors that gives the same logits as `classify`, or None if no linear head can.
    `tuned` has the trained weights of the encoder, or None if the encoder was not trained. `embed` returns the vectors
    of texts that the head takes, float32 (texts, dimensions); None if there is no head. `held_out_by` is the classifier
    that the logits of `held_out` are from; None: this one, or several, fitted to other texts each.
    """

    classify: Callable[[Sequence[str]], Matrix]
    held_out: HeldOut
    head: Head | None = None
    tuned: Tuned | None = None
    embed: Callable[[Sequence[str]], Matrix] | None = None
    held_out_by: Fitted | None = None
    #: Whether the logits are `COSINE_SCALE` times a cosine. The sign of such a logit says nothing, so a multi-label
    #: classifier needs thresholds.
    cosines: bool = False
    #: Figures of the fit by name, such as the chosen number of epochs or strength of regularization.
    figures: dict[str, float] = field(default_factory=dict)


class Strategy(Protocol):
    """A method to make a classifier from labelled texts."""

    @property
    def name(self) -> str:
        """Name of the strategy, as given on the command line."""

    @property
    def exportable(self) -> bool:
        """Whether the strategy's result is a linear head on an encoder, which can be exported as one ONNX graph."""

    @property
    def tunes(self) -> bool:
        """Whether the strategy trains the weights of the encoder."""

    @property
    def served(self) -> bool:
        """Whether the strategy can be served, as a bundle or from a collection; the others are baselines."""

    @property
    def uses_encoder(self) -> bool:
        """Whether the strategy uses the encoder. If not, its outcomes are the same with each encoder."""

    def passes(self, examples: Examples, layers: int, *, quick: bool = False) -> float:
        """Return an estimate of the work that training the encoder takes; 0 if the encoder is not trained.

        The unit is one pass of one text forward through all layers; a pass backward counts as two passes forward. Early
        stopping is not considered, so the estimate is rather too high.

        Args:
            examples: the training texts.
            layers: number of layers of the encoder.
            quick: whether `Options.quick` is set.
        """

    def fit(self, examples: Examples, cached_encoder: CachedEncoder, options: Options) -> Fitted:
        """Fit a classifier to labelled texts.

        Args:
            examples: texts, targets, and label descriptions if there are any.
            cached_encoder: the encoder, with cached tokens and vectors.
            options: options of the fit.

        Returns:
            The classifier, with logits of texts that it or a classifier fitted in the same way was not trained on.

        Raises:
            ExportError: the classifier cannot be fitted, for example because label descriptions are missing.
        """


def with_head(
    head: Head,
    embed: Callable[[Sequence[str]], Matrix],
    held_out: HeldOut,
    *,
    tuned: Tuned | None = None,
    cosines: bool = False,
    figures: dict[str, float] | None = None,
) -> Fitted:
    """Return the result of a strategy whose classifier is a linear head on vectors.

    Args:
        head: the head.
        embed: returns the vectors of texts, float32 (texts, dimensions).
        held_out: logits of held-out texts.
        tuned: the trained weights of the encoder; None if it was not trained.
        cosines: whether the logits are `COSINE_SCALE` times a cosine.
        figures: figures of the fit by name.
    """
    return Fitted(
        lambda texts: head.logits(embed(texts)), held_out, head, tuned, embed, cosines=cosines, figures=figures or {}
    )


def accuracy(logits: Matrix, examples: Examples, *, cosines: bool = False) -> float:
    """Return the share of right decisions by logits, float32 (texts, labels), on the examples, in [0, 1].

    A decision is a text's best label; if multi-label, each label of each text. The threshold of a label is then 0.5, or
    with `cosines`, which says that the logits are cosines times a factor, the one with the best F1 on the examples.
    """
    if cosines and examples.multi_label:
        thresholds = fit_thresholds(probabilities(logits, multi_label=True), examples.targets)
        decided = DecisionRule(thresholds=thresholds, multi_label=True).labels(logits)
        return float((decided == examples.targets).mean())
    return float(right(logits, examples.targets, examples.multi_label).mean())


def standard_error(held_out: Examples | None) -> float:
    """Return the binomial standard error of an accuracy of 0.9 (a typical one) on the held-out texts; 0 without any."""
    return float((0.1 * 0.9 / len(held_out.texts)) ** 0.5) if held_out else 0.0


def no_texts(examples: Examples) -> HeldOut:
    """Return a `HeldOut` without texts and with the labels of the examples, for a fit that held out no text."""
    return HeldOut(np.zeros((0, len(examples.labels)), dtype=np.float32), examples.targets[:0])


def hold_out(
    classify: Callable[[Examples, Sequence[str]], Matrix], examples: Examples, options: Options, *, once: bool = False
) -> HeldOut:
    """Return logits of held-out texts: of the validation texts, or by cross-validation of the examples.

    Cross-validation never holds out a text that is the only one of its label; it trains on this text in every fold.

    Args:
        classify: fits a classifier to the examples given, and returns its logits of the texts given.
        examples: the training texts.
        options: options of the fit.
        once: whether to hold out the texts of `split` in place of a cross-validation, to save time.
    """
    if options.validation is not None:
        return HeldOut(classify(examples, options.validation.texts), options.validation.targets)
    folds = stratify(examples.targets, options.seed)
    parts = [split(examples, options.seed)[1]] if once else [folds == fold for fold in np.unique(folds[folds >= 0])]
    rows, logits = [np.zeros(0, dtype=np.int64)], [no_texts(examples).logits]
    everything = np.arange(len(examples.texts))
    for part in parts:
        held_out = everything[part]
        rows.append(held_out)
        known = examples.take(np.setdiff1d(everything, held_out))
        logits.append(classify(known, [examples.texts[row] for row in held_out]))
    return HeldOut(np.concatenate(logits), examples.targets[np.concatenate(rows)], np.concatenate(rows))


def _held_out_folds(texts: int) -> int:
    """Return the number of folds of a number of training texts. One fold is held out."""
    return _HELD_OUT_FOLDS if texts < _REFIT_BELOW else _FEW_HELD_OUT_FOLDS


def split(examples: Examples, seed: int) -> tuple[Rows, Rows]:
    """Return the indexes of the texts to train on and of those to hold out.

    About a fifth of each label's texts is held out, from 2,000 texts on a tenth, at most 500 texts in all. Of a label
    with fewer texts than there are folds, sometimes none is held out. A label's only text is never held out, so the
    second array may be empty.
    """
    folds = stratify(examples.targets, seed, _held_out_folds(len(examples.texts)))
    held_out = np.flatnonzero(folds == 0)
    if len(held_out) > _MAX_HELD_OUT:
        held_out = np.sort(np.random.default_rng(seed).permutation(held_out)[:_MAX_HELD_OUT])
    return np.setdiff1d(np.arange(len(examples.texts)), held_out), held_out


def default_epochs(examples: Examples) -> int:
    """Return the default number of epochs: 7 for a mean of 4 texts a label, 6 for 16, 5 for 64, 3 for 1,000.

    The number is at least 2, and with up to 100 texts in all it is 8. Labels with many texts each are learned in few
    epochs: more epochs cost time and gain nothing (docs/decisions/measurements/0026).
    """
    by_label = round(8.5 - 0.55 * log2(max(examples.per_label, 1)))
    by_texts = min(_FEW_TEXTS_EPOCHS, _epochs_for(_MIN_TRAINED, examples))
    return max(_MIN_EPOCHS, by_label, by_texts)


def quick_epochs(examples: Examples) -> int:
    """Return the number of epochs of a quick training: enough for 1,600 texts, at most the default number."""
    return min(default_epochs(examples), _epochs_for(_QUICK_TEXTS, examples))


def _epochs_for(texts: int, examples: Examples) -> int:
    """Return the number of epochs in which a training learns from at least `texts` texts, repetitions included."""
    return ceil(texts / max(1, len(examples.texts)))


def passes_of(examples: Examples, share: float, scored: int, *, quick: bool) -> float:
    """Return the estimate of `Strategy.passes` for trainings by `fit_and_hold_out`.

    Args:
        examples: the training texts.
        share: share of the layers that is trained, in (0, 1]; the other layers run once for each text.
        scored: number of training texts that a score after an epoch embeds, in addition to the held-out texts.
        quick: whether `Options.quick` is set.
    """
    texts = len(examples.texts)
    held_out = min(texts // _held_out_folds(texts), _MAX_HELD_OUT)
    if quick:
        trained = quick_epochs(examples) * (texts - held_out)
        return texts * (1 - share) + share * (_TRAINED_PASSES * trained + held_out)
    epochs = default_epochs(examples)
    trained = epochs * (texts - held_out + (texts if texts < _REFIT_BELOW else 0))
    embedded = epochs * (held_out + scored) if held_out >= _MIN_TO_STOP else held_out
    return texts * (1 - share) + share * (_TRAINED_PASSES * trained + embedded)


def fit_and_hold_out(
    fit: Callable[[Examples, Examples | None, int | None, str], tuple[Fitted, int]],
    examples: Examples,
    options: Options,
) -> Fitted:
    """Fit a classifier, and compute logits of held-out texts with a classifier that was not trained on them.

    The texts of `options.validation` are the held-out texts, and a single training makes the result. Without them, some
    training texts are held out, and a training on the other texts finds the best epoch. With fewer than 2,000 training
    texts, a second training on all texts makes the result; otherwise the first one does. Fewer than 50 held-out texts
    stop no training: both trainings have the maximum number of epochs. If no text can be held out, since no label has
    two texts, a single training on all texts makes the result.

    With `options.quick`, the texts that are not held out are trained on once, for `quick_epochs` epochs and without
    early stopping.

    Args:
        fit: trains a classifier. Its arguments are the training texts, the texts for early stopping (or None), the
            number of epochs (or None for the default number) and the name of the training for the progress. It returns
            the classifier and the best epoch.
        examples: all training texts.
        options: options of the fit.

    Returns:
        The classifier, with the logits of the held-out texts if there are any.
    """
    if options.validation is not None:
        fitted, _ = fit(examples, options.validation, options.epochs, "training")
        return _with_held_out(fitted, fitted, options.validation, np.zeros(0, dtype=np.int64))
    trained_rows, held_out_rows = split(examples, options.seed)
    if not len(held_out_rows):
        fitted, _ = fit(examples, None, options.epochs, "training")
        return fitted
    held_out = examples.take(held_out_rows)
    if options.quick:
        quick, _ = fit(examples.take(trained_rows), None, quick_epochs(examples), "quick training")
        return _with_held_out(quick, quick, held_out, held_out_rows)
    refit = len(examples.texts) < _REFIT_BELOW
    stops = len(held_out_rows) >= _MIN_TO_STOP
    search = "training to find the best epoch" if stops else "training without the held-out texts"
    stage = search if refit else "training"
    first, epochs = fit(examples.take(trained_rows), held_out if stops else None, options.epochs, stage)
    if not refit:
        return _with_held_out(first, first, held_out, held_out_rows)
    fitted, _ = fit(examples, None, epochs, "training on all texts")
    return _with_held_out(fitted, first, held_out, held_out_rows)


def _with_held_out(fitted: Fitted, by: Fitted, held_out: Examples, rows: Rows) -> Fitted:
    """Return `fitted` with the logits of the held-out texts by the classifier `by`, which was not trained on them.

    `rows` has the indexes of the held-out texts among the training texts; it is empty for texts of a validation file.
    """
    logits = by.classify(held_out.texts)
    found = HeldOut(logits, held_out.targets, rows, from_final_classifier=by is fitted)
    return replace(fitted, held_out=found, held_out_by=None if by is fitted else by)
