"""The interface of strategies, and functions that several of them use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from emberpc.bundle import Head
from emberpc.export.classify.cached_encoder import CachedEncoder
from emberpc.export.classify.evaluation import HeldOut
from emberpc.export.classify.linear import Matrix, right, stratify
from emberpc.export.data.examples import Examples, Rows
from emberpc.export.progress import Progress, no_progress
from emberpc.export.tuning.checkpoint import Checkpoints

if TYPE_CHECKING:
    import torch

    from emberpc.export.tuning.backbone import Backbone

#: The held-out texts serve early stopping and calibration where no validation file is given: one fold of this many,
#: and at most this number of texts.
_HELD_OUT_FOLDS = 5
_MOST_HELD_OUT = 500
#: From this number of texts on, the held-out texts are few enough to do without: the model is not trained again on all
#: texts.
_REFIT_BELOW = 5000


@dataclass(frozen=True)
class Options:
    """Options of a fit."""

    seed: int = 0
    #: Whether every label has the same weight, whatever its number of texts.
    balanced: bool = False
    #: Texts for early stopping and calibration; default: some of the training texts are held out.
    validation: Examples | None = None
    #: Passes over the texts; default: the more texts, the fewer passes.
    epochs: int | None = None
    #: Where trainings store their checkpoints. The caller removes them once the outcome is stored.
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    progress: Progress = no_progress


@dataclass(frozen=True)
class Tuned:
    """Trained weights of an encoder by parameter name, and the number of upper layers that they belong to."""

    weights: Mapping[str, torch.Tensor]
    top: int
    backbone: Backbone

    def save(self, folder: Path) -> None:
        """Write the tuned encoder in the format of sentence-transformers."""
        self.backbone.save(self.weights, self.top, folder)


@dataclass(frozen=True)
class Fitted:
    """Result of a strategy.

    `classify` returns the logits of texts, float32 (texts, labels). `head` is the linear head on the encoder's vectors
    that gives the same logits, or None if no linear head can. `tuned` has the trained weights of the encoder, or None
    if the encoder was not trained. `held_out` has logits of texts, from models that were fitted in the same way but not
    on these texts.
    """

    classify: Callable[[Sequence[str]], Matrix]
    held_out: HeldOut
    head: Head | None = None
    tuned: Tuned | None = None
    #: Figures such as the epochs or the strength of regularization that were chosen.
    figures: dict[str, float] = field(default_factory=dict)


class Strategy(Protocol):
    """A method to make a classifier from labelled texts."""

    @property
    def name(self) -> str:
        """Name on the command line."""

    @property
    def exportable(self) -> bool:
        """Whether its result is a linear head on an encoder."""

    @property
    def tunes(self) -> bool:
        """Whether it trains the weights of the encoder."""

    def fit(self, examples: Examples, cached_encoder: CachedEncoder, options: Options) -> Fitted:
        """Fit a classifier to labelled texts.

        Args:
            examples: texts, targets, and label descriptions if there are any.
            cached_encoder: the encoder, with cached tokens and vectors.
            options: options of the fit.

        Raises:
            ExportError: it cannot be fitted, for example because label descriptions are missing.
        """


def accuracy(logits: Matrix, examples: Examples) -> float:
    """Return the share of texts whose labels the logits give exactly, in [0, 1]; `logits`: float32 (texts, labels)."""
    return float(right(logits, examples.targets, examples.multi_label).mean())


def standard_error(held_out: Examples | None) -> float:
    """Return the standard error of an accuracy of 0.9 (binomial) on the held-out texts; 0 without held-out texts."""
    return float((0.1 * 0.9 / len(held_out.texts)) ** 0.5) if held_out else 0.0


def no_texts(examples: Examples) -> HeldOut:
    """Return an empty `HeldOut` with the labels of the examples, for a fit that held out no text."""
    return HeldOut(np.zeros((0, len(examples.labels)), dtype=np.float32), examples.targets[:0])


def split(examples: Examples, seed: int) -> tuple[Rows, Rows]:
    """Return the indexes of the texts to train on and of those to hold out.

    A fifth of each label's texts is held out, at most 500 texts in all. A label's only text is never held out, so the
    second array may be empty.
    """
    folds = stratify(examples.targets, seed, _HELD_OUT_FOLDS)
    unseen = np.flatnonzero(folds == 0)
    if len(unseen) > _MOST_HELD_OUT:
        unseen = np.sort(np.random.default_rng(seed).permutation(unseen)[:_MOST_HELD_OUT])
    return np.setdiff1d(np.arange(len(examples.texts)), unseen), unseen


def fit_and_hold_out(
    fit: Callable[[Examples, Examples | None, int | None, str], tuple[Fitted, int]],
    examples: Examples,
    options: Options,
) -> Fitted:
    """Fit a classifier, and compute logits of held-out texts with a model that was not trained on them.

    With a validation file, its texts are the held-out ones. Otherwise some training texts are held out. A first
    training on the others finds the best epoch. With fewer than 5,000 texts, a second training on all texts makes the
    result.

    Args:
        fit: trains on examples. It gets the examples, the texts for early stopping (or None), the number of epochs (or
            None for its default) and the name of the training for the progress. It returns the result and the best
            epoch.
        examples: all training texts.
        options: options of the fit.
    """
    if options.validation is not None:
        fitted, _ = fit(examples, options.validation, options.epochs, "training")
        return _with_held_out(fitted, fitted, options.validation, np.zeros(0, dtype=np.int64))
    seen, unseen = split(examples, options.seed)
    if not len(unseen):
        fitted, _ = fit(examples, None, options.epochs, "training")
        return fitted
    held_out = examples.take(unseen)
    refit = len(examples.texts) < _REFIT_BELOW
    stage = "training to find the best epoch" if refit else "training"
    first, epochs = fit(examples.take(seen), held_out, options.epochs, stage)
    if not refit:
        return _with_held_out(first, first, held_out, unseen)
    fitted, _ = fit(examples, None, epochs, "training on all texts")
    return _with_held_out(fitted, first, held_out, unseen)


def _with_held_out(fitted: Fitted, by: Fitted, held_out: Examples, rows: Rows) -> Fitted:
    """Return `fitted` with the logits of the held-out texts by the classifier `by`, which was not trained on them."""
    logits = by.classify(held_out.texts)
    return replace(fitted, held_out=HeldOut(logits, held_out.targets, rows, unseen=by is fitted))
