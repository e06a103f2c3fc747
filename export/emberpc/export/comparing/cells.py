"""The cells of a comparison: one classifier, fitted to so many texts and measured on the test texts, and kept."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from emberpc.export.errors import ExportError
from emberpc.export.examples import Examples, Rows
from emberpc.export.files import write_text

#: The budget of a strategy that learns from no text.
NO_TEXTS = 0
#: The budget that is all texts there are.
ALL = -1


@dataclass(frozen=True, order=True)
class Cell:
    """A classifier to fit: `budget` is the texts of each label that it learns from, or `NO_TEXTS` or `ALL`."""

    base: str
    strategy: str
    budget: int
    seed: int

    @property
    def title(self) -> str:
        """What it is, in a few words."""
        return f"{self.strategy}, {budget_name(self.budget)}, seed {self.seed}"

    @property
    def file_name(self) -> str:
        """Name of the file with its outcome."""
        base = re.sub(r"[^A-Za-z0-9.]+", "-", self.base).strip("-.")
        return f"{base}_{self.strategy}_{budget_name(self.budget).replace(' ', '-')}_{self.seed}.json"


def budget_name(budget: int) -> str:
    """Return how a budget is spoken of."""
    return {NO_TEXTS: "no texts", ALL: "all texts"}.get(budget, f"{budget} a label")


@dataclass(frozen=True)
class Decisions:
    """What a classifier made of texts it had not seen.

    `rows` are their indexes in the file; `labels` the indexes of the labels
    given to each; `confidence` the probability that the decision has, in [0, 1].
    """

    rows: list[int]
    labels: list[list[int]]
    confidence: list[float]


@dataclass(frozen=True)
class Outcome:
    """How a cell came out."""

    cell: Cell
    #: Texts that it learnt from.
    texts: int
    #: `accuracy`, `macro_f1`, `ece`, `out_of_scope_auroc`, `seconds` and `cpu_seconds` of the training, and so on.
    figures: dict[str, float]
    test: Decisions
    #: The training texts that were held out or cross-validated.
    held_out: Decisions
    #: Confidence, share that is right, and count, for each bin: see `calibration.reliability`.
    reliability: list[tuple[float, float, int]]


class Store:
    """The outcomes of a comparison, a file each, in its folder.

    Args:
        folder: of the comparison; it is made if need be.
        key: of all that outcomes depend on apart from the cell.

    Raises:
        ExportError: the folder has outcomes of other data or options.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self._folder = folder / "cells"
        self._key_path = folder / "comparison.key"
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._key_path.exists() and self._key_path.read_text(encoding="utf-8") != key:
            raise ExportError(
                f"{folder} holds a comparison of other data, bases or options; give another folder, or remove this one"
            )
        write_text(self._key_path, key)

    def read(self, cells: Iterable[Cell]) -> dict[Cell, Outcome]:
        """Return the outcomes that are there; a file that cannot be read is as none."""
        found = {}
        for cell in cells:
            try:
                data = json.loads((self._folder / cell.file_name).read_text(encoding="utf-8"))
                found[cell] = _outcome(data)
            except (OSError, ValueError, KeyError, TypeError):
                continue
        return found

    def write(self, outcome: Outcome) -> None:
        """Keep an outcome."""
        write_text(self._folder / outcome.cell.file_name, json.dumps(asdict(outcome)))


def _outcome(data: dict[str, object]) -> Outcome:
    """Turn what JSON has of an outcome into one; ValueError, KeyError or TypeError if it is none."""
    parts = {
        "cell": Cell(**data["cell"]),  # type: ignore[arg-type]  # what does not fit raises TypeError
        "test": Decisions(**data["test"]),  # type: ignore[arg-type]
        "held_out": Decisions(**data["held_out"]),  # type: ignore[arg-type]
        "reliability": [tuple(bin_) for bin_ in data["reliability"]],  # type: ignore[attr-defined]
    }
    return Outcome(**{**data, **parts})  # type: ignore[arg-type]


def take_budget(examples: Examples, budget: int, seed: int) -> Examples:
    """Return so many texts of each label, drawn at random; with one seed, a larger budget holds the smaller ones.

    A text of several labels counts for each; those of none are drawn as if that were a label, too.

    Args:
        examples: all there are.
        budget: texts of each label, or `ALL`; a label with fewer gives what it has. `NO_TEXTS` takes none.
        seed: of the draw.
    """
    if budget == ALL:
        return examples
    taken = np.zeros(len(examples.labels) + 1, dtype=np.int64)
    rows: list[int] = []
    order = list(range(len(examples.texts)))
    random.Random(seed).shuffle(order)  # noqa: S311 - a draw that can be repeated, not a secret
    for row in order:
        own: Rows = np.flatnonzero(examples.targets[row])
        own = own if len(own) else np.array([len(examples.labels)])
        if (taken[own] < budget).any():
            taken[own] += 1
            rows.append(row)
    return examples.take(np.sort(np.array(rows, dtype=np.int64)))
