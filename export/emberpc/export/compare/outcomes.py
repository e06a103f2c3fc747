"""Cells of a comparison and their outcomes: a cell is one classifier, fitted with one budget and one seed."""

from __future__ import annotations

import hashlib
import json
import random
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from emberpc.export.classify.strategies import STRATEGIES
from emberpc.export.data.examples import Examples, Rows
from emberpc.export.errors import ExportError
from emberpc.export.files import write_text

#: Budget of a strategy that learns from no training text.
NO_TEXTS = 0
#: Budget that means all training texts.
ALL = -1


class Way(NamedTuple):
    """A strategy on a base encoder, both by name."""

    base: str
    strategy: str

    @property
    def tunes(self) -> bool:
        """Whether the strategy trains the encoder's weights."""
        return STRATEGIES[self.strategy].tunes

    @property
    def exportable(self) -> bool:
        """Whether the strategy's result can be exported as a bundle."""
        return STRATEGIES[self.strategy].exportable

    @property
    def served(self) -> bool:
        """Whether the strategy can be served; the others are baselines."""
        return STRATEGIES[self.strategy].served


@dataclass(frozen=True, order=True)
class Cell:
    """A classifier to fit: base encoder and strategy by name, budget, seed and profile.

    `budget` is the number of training texts of each label, or `NO_TEXTS` or `ALL`. `seed` decides which texts
    these are, and is the seed of the fit. `quick` says whether the fit is the quick profile of a strategy that trains
    the encoder (`Options.quick`), and not the full profile, with which a bundle is exported.
    """

    base: str
    strategy: str
    budget: int
    seed: int
    quick: bool = False

    @property
    def way(self) -> Way:
        """Base and strategy of the cell."""
        return Way(self.base, self.strategy)

    @property
    def title(self) -> str:
        """Text for progress messages: strategy, profile, budget and seed of the cell."""
        return f"{self.strategy}{', quick' * self.quick}, {budget_name(self.budget)}, seed {self.seed}"

    @property
    def file_name(self) -> str:
        """Name of the file that stores the cell's outcome; different cells have different names."""
        base = re.sub(r"[^A-Za-z0-9.]+", "-", self.base).strip("-.")
        # The hash tells `a/b` from `a-b`, and `A` from `a` where the case of file names is ignored.
        base += "-" + hashlib.sha256(self.base.encode()).hexdigest()[:8]
        budget = budget_name(self.budget).replace(" ", "-")
        return f"{base}_{self.strategy}_{budget}_{self.seed}{'_quick' * self.quick}.json"


def budget_name(budget: int) -> str:
    """Return a budget as words: `no texts`, `all texts` or `N a label`."""
    return {NO_TEXTS: "no texts", ALL: "all texts"}.get(budget, f"{budget} a label")


@dataclass(frozen=True)
class Decisions:
    """Decisions of a classifier on texts that it was not trained on.

    `rows` are the indexes of the texts in their file. `labels` are the indexes of the labels given to each text.
    `confidence` is the probability of each text's best label. If multi-label, it is the minimum probability, over all
    labels, of the decision to give the label to the text or not.
    """

    rows: list[int]
    labels: list[list[int]]
    confidence: list[float]


@dataclass(frozen=True)
class Outcome:
    """Result of fitting and measuring one cell; `test` has the decisions on the test texts."""

    cell: Cell
    #: Number of training texts, without label descriptions.
    texts: int
    #: Figures by name: `accuracy`, `macro_f1`, `ece`, `out_of_scope_auroc` and others in [0, 1]; `seconds` and
    #: `cpu_seconds` of the training, in wall and CPU seconds, as if nothing were cached; `wall_seconds` of fitting and
    #: measuring the cell.
    figures: dict[str, float]
    test: Decisions
    #: Decisions on training texts that were held out or cross-validated; empty unless the budget is `ALL`.
    held_out: Decisions
    #: For each bin of confidence on the test texts: mean confidence, share of right decisions, number of decisions.
    reliability: list[tuple[float, float, int]]


class OutcomeStore:
    """Stores the outcomes of a comparison in its folder, each in a file of its own.

    Args:
        folder: folder of the comparison; it is created if it does not exist.
        key: key of the comparison from `comparison_key.key_of`; it is written to the folder.

    Raises:
        ExportError: the folder holds a comparison with another key.
        OSError: the folder cannot be written to.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self._folder = folder / "cells"
        self._key_path = folder / "comparison.key"
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._key_path.exists() and self._key_path.read_text(encoding="utf-8") != key:
            raise ExportError(
                f"{folder} holds a comparison of other data, bases or options, or by other versions of emberpc or its "
                "libraries; give another folder, or remove this one"
            )
        write_text(self._key_path, key)

    def read(self) -> dict[Cell, Outcome]:
        """Return all stored outcomes; leave out a file that cannot be read, or whose strategy does not exist."""
        found = {}
        for path in sorted(self._folder.glob("*.json")):
            try:
                outcome = _outcome(json.loads(path.read_text(encoding="utf-8")))
            except (OSError, ValueError, KeyError, TypeError):
                continue
            if outcome.cell.file_name == path.name and outcome.cell.strategy in STRATEGIES:
                found[outcome.cell] = outcome
        return found

    def write(self, outcome: Outcome) -> None:
        """Write an outcome to the file of its cell, in place of an earlier outcome.

        Raises:
            OSError: the file cannot be written.
        """
        write_text(self._folder / outcome.cell.file_name, json.dumps(asdict(outcome)))


def _outcome(data: dict[str, object]) -> Outcome:
    """Return the outcome that parsed JSON describes; raise KeyError or TypeError for missing or unknown fields.

    The types of most values are not checked.
    """
    parts = {
        "cell": Cell(**data["cell"]),  # type: ignore[arg-type]  # wrong fields raise TypeError
        "test": Decisions(**data["test"]),  # type: ignore[arg-type]
        "held_out": Decisions(**data["held_out"]),  # type: ignore[arg-type]
        "reliability": [tuple(bin_) for bin_ in data["reliability"]],  # type: ignore[attr-defined]
    }
    return Outcome(**{**data, **parts})  # type: ignore[arg-type]


def take_budget(examples: Examples, budget: int, seed: int) -> Examples:
    """Draw a number of texts of each label at random. With the same seed, a larger budget includes the smaller ones.

    A text with several labels counts for each of them, and is drawn as long as one of them has too few texts. Texts
    without labels are drawn like the texts of one more label.

    Args:
        examples: texts to draw from.
        budget: number of texts of each label, or `ALL`, or `NO_TEXTS`. A label with fewer texts gives all of them.
        seed: seed of the draw.

    Returns:
        The drawn texts in the order of `examples`.
    """
    if budget == ALL:
        return examples
    taken = np.zeros(len(examples.labels) + 1, dtype=np.int64)
    rows: list[int] = []
    order = list(range(len(examples.texts)))
    random.Random(seed).shuffle(order)  # noqa: S311 - a reproducible draw, not a secret
    for row in order:
        own: Rows = np.flatnonzero(examples.targets[row])
        own = own if len(own) else np.array([len(examples.labels)])
        if (taken[own] < budget).any():
            taken[own] += 1
            rows.append(row)
    return examples.take(np.sort(np.array(rows, dtype=np.int64)))
