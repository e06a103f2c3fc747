"""What all strategies have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from emberpc.bundle import Head
from emberpc.export.evaluation import HeldOut
from emberpc.export.examples import Examples, Rows
from emberpc.export.linear import Matrix, right, stratify
from emberpc.export.progress import Progress, no_progress
from emberpc.export.tuning.checkpoint import Checkpoints
from emberpc.export.workbench import Workbench

if TYPE_CHECKING:
    import torch

    from emberpc.export.tuning.backbone import Backbone

#: Share of the texts, and the most of them, held out to stop early and to calibrate where no validation file is given.
_HELD_OUT_FOLDS = 5
_MOST_HELD_OUT = 500
#: With more texts than this, those held out are too few to be missed: the tuned model is not fitted again with them.
_REFIT_BELOW = 5000


@dataclass(frozen=True)
class Options:
    """How to fit."""

    seed: int = 0
    #: Whether every label counts alike, however many texts it has.
    balanced: bool = False
    #: Texts to stop early by and to calibrate on; default: some of the training texts are held out.
    validation: Examples | None = None
    #: Passes over the texts; default: fewer the more texts there are.
    epochs: int | None = None
    #: Where trainings keep what they need to be resumed; whoever stores the outcome removes that.
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    progress: Progress = no_progress


@dataclass(frozen=True)
class Tuned:
    """An encoder's trained parameters by name, and how many of its upper layers they are of."""

    weights: Mapping[str, torch.Tensor]
    top: int
    backbone: Backbone

    def save(self, folder: Path) -> None:
        """Write the tuned encoder, in sentence-transformers' form."""
        self.backbone.save(self.weights, self.top, folder)


@dataclass(frozen=True)
class Fitted:
    """What a strategy made.

    `classify` gives logits, float32 (texts, labels). `head` is the linear head
    on the encoder's vectors that gives the same; None if no linear head can.
    `tuned` is the encoder's new weights; None: it is as it was. `held_out` has
    logits of texts by models fitted the same way that had not seen them.
    """

    classify: Callable[[Sequence[str]], Matrix]
    held_out: HeldOut
    head: Head | None = None
    tuned: Tuned | None = None
    #: Such as the epochs or the strength of regularisation chosen.
    figures: dict[str, float] = field(default_factory=dict)


class Strategy(Protocol):
    """A way to make a classifier."""

    @property
    def name(self) -> str:
        """What it is called on the command line."""

    @property
    def exportable(self) -> bool:
        """Whether its outcome is a linear head on an encoder."""

    @property
    def tunes(self) -> bool:
        """Whether it trains the encoder's weights."""

    def fit(self, examples: Examples, workbench: Workbench, options: Options) -> Fitted:
        """Fit a classifier.

        Raises:
            ExportError: it cannot be fitted, such as for want of label descriptions.
        """


def accuracy(logits: Matrix, examples: Examples) -> float:
    """Return how right logits are, in [0, 1]."""
    return float(right(logits, examples.targets, examples.multi_label).mean())


def standard_error(held_out: Examples | None) -> float:
    """Return by how much an accuracy on held-out texts may be off: that of one in ten wrong (a binomial's)."""
    return float((0.1 * 0.9 / len(held_out.texts)) ** 0.5) if held_out else 0.0


def no_texts(examples: Examples) -> HeldOut:
    """Return what there is where no text was held out."""
    return HeldOut(np.zeros((0, len(examples.labels)), dtype=np.float32), examples.targets[:0])


def split(examples: Examples, seed: int) -> tuple[Rows, Rows]:
    """Return the indexes of texts to learn from and to hold out: a fifth of each label's, and 500 in all at most.

    The only text of a label is learnt from; so nothing may be left to hold out.
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
    """Fit so that some texts' logits come from a model that had not seen them.

    With a validation file these are its texts. Without, some of the training
    texts are held out; a first training on the rest tells when to stop, and
    where texts are few, a second one on all of them gives the outcome.

    Args:
        fit: fits to examples, given others to stop early by (or None), the epochs (or None: its own choice) and what
            to call this training; returns the outcome and the best epoch.
        examples: all training texts.
        options: how.
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
    stage = "training to see when to stop" if refit else "training"
    first, epochs = fit(examples.take(seen), held_out, options.epochs, stage)
    if not refit:
        return _with_held_out(first, first, held_out, unseen)
    fitted, _ = fit(examples, None, epochs, "training on all texts")
    return _with_held_out(fitted, first, held_out, unseen)


def _with_held_out(fitted: Fitted, by: Fitted, held_out: Examples, rows: Rows) -> Fitted:
    """Return what was fitted, with the logits that another fit gave texts that it had not seen."""
    logits = by.classify(held_out.texts)
    return replace(fitted, held_out=HeldOut(logits, held_out.targets, rows, unseen=by is fitted))
