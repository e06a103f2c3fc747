"""Fit and measure the cells of a comparison, as far as time allows."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from time import perf_counter

import numpy as np

from emberpc.export.calibration import reliability
from emberpc.export.classifier import Data, read_data
from emberpc.export.comparing.bases import Base, open_base
from emberpc.export.comparing.cells import ALL, NO_TEXTS, Cell, Decisions, Outcome, Store, take_budget
from emberpc.export.comparing.planning import Planner, Skipped, budgets_of
from emberpc.export.comparing.serving import ServingCost, ServingCosts
from emberpc.export.datasets import read_labelled
from emberpc.export.describing import described_examples
from emberpc.export.errors import ExportError
from emberpc.export.evaluation import Calibration, calibrate, measure, measure_scope
from emberpc.export.examples import Examples, held_out_examples, label_names
from emberpc.export.linear import Matrix
from emberpc.export.progress import Progress, no_progress
from emberpc.export.strategies import STRATEGIES, Fitted, Options
from emberpc.export.workbench import Cost, Workbench

#: Seconds of a time limit that are kept for the report.
_FOR_REPORT = 15.0


@dataclass(frozen=True)
class Wanted:
    """What to compare.

    `data` says where the training texts are, `test` is a file like that;
    texts outside all labels, if `data` has any, are measured on and not learnt from.
    """

    data: Data
    test: Path
    bases: tuple[str, ...]
    budgets: tuple[int, ...] = (1, 2, 4, 8, 16, 32, ALL)
    strategies: tuple[str, ...] = tuple(STRATEGIES)
    seeds: int = 3
    #: Seconds; None: as long as it takes.
    time_limit: float | None = None
    label_texts: bool = True
    balanced: bool = False
    max_tokens: int | None = None


@dataclass(frozen=True)
class Compared:
    """What a comparison found out."""

    #: What to call the data: the name of the folder that the training texts are in.
    title: str
    train: Examples
    test: Examples
    outcomes: tuple[Outcome, ...]
    serving: tuple[ServingCost, ...]
    skipped: tuple[Skipped, ...]
    #: Mean texts of a label, by budget.
    per_label: dict[int, float]
    #: The sources of the bases, by what they are called.
    sources: dict[str, str]


class _OutOfTimeError(Exception):
    """The time limit was reached in the middle of a cell."""


def run(wanted: Wanted, folder: Path, progress: Progress = no_progress) -> Compared:
    """Fit and measure all cells that there is time for; those that `folder` has already are read.

    Raises:
        ExportError: data or a base cannot be used, or the folder holds another comparison.
    """
    start = perf_counter()
    _check(wanted)
    train, _, outside = read_data(wanted.data)
    test = held_out_examples(
        read_labelled(
            wanted.test,
            text_column=wanted.data.text_column,
            label_column=wanted.data.label_column,
            separator=wanted.data.separator,
        ),
        train,
    )
    with tempfile.TemporaryDirectory() as name:
        bases = {}
        for number, source in enumerate(wanted.bases):
            base = open_base(source, Path(name) / str(number), wanted.max_tokens, progress)
            bases[base.encoder.name] = base
        store = Store(folder, _key(wanted, train, test, outside, list(bases.values())))
        comparison = _Comparison(wanted, train, test, outside, bases, store, folder, start, progress)
        done, skipped = comparison.run()
    return Compared(
        Path(wanted.data.train).resolve().parent.name,
        train,
        test,
        tuple(done[cell] for cell in sorted(done)),
        tuple(comparison.serving.known.values()),
        tuple(skipped),
        comparison.per_label,
        dict(zip(bases, wanted.bases, strict=True)),
    )


def _check(wanted: Wanted) -> None:
    if unknown := [name for name in wanted.strategies if name not in STRATEGIES]:
        raise ExportError(f"there is no strategy {unknown[0]!r}; there are: {', '.join(STRATEGIES)}")
    if not wanted.bases or not wanted.strategies or not wanted.budgets:
        raise ExportError("a comparison needs at least one base, one strategy and one budget")
    if wanted.seeds < 1:
        raise ExportError(f"seeds is {wanted.seeds}; it must be at least 1")
    if bad := [budget for budget in wanted.budgets if budget < 1 and budget != ALL]:
        raise ExportError(f"a budget is {bad[0]}; it must be at least 1, or all")


def _key(wanted: Wanted, train: Examples, test: Examples, outside: Sequence[str], bases: Sequence[Base]) -> str:
    """Return what tells a comparison from one of other data, bases or options."""
    descriptions = wanted.data.descriptions
    parts = {
        "train": [train.texts, train.targets.tolist(), train.labels],
        "test": [test.texts, test.targets.tolist()],
        "outside": list(outside),
        "bases": {base.encoder.name: [base.encoder.weights_sha256, base.encoder.max_tokens] for base in bases},
        "options": [wanted.label_texts, wanted.balanced],
        "descriptions": Path(descriptions).read_text(encoding="utf-8") if descriptions else "",
        "version": version("emberpc"),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class _Comparison:
    """The cells of a comparison, and what fits them."""

    def __init__(
        self,
        wanted: Wanted,
        train: Examples,
        test: Examples,
        outside: Sequence[str],
        bases: dict[str, Base],
        store: Store,
        folder: Path,
        start: float,
        progress: Progress,
    ) -> None:
        self._wanted, self._train, self._test, self._outside = wanted, train, test, outside
        self._bases, self._store, self._progress = bases, store, progress
        self._end = None if wanted.time_limit is None else start + wanted.time_limit - _FOR_REPORT
        self._checkpoints = folder / "checkpoints"
        self.serving = ServingCosts(folder / "serving.json")
        budgets = budgets_of(wanted.budgets, int(train.targets.sum(axis=0).max()))
        self._samples = {
            (budget, seed): take_budget(train, budget, seed) for budget in budgets for seed in range(wanted.seeds)
        }
        self.per_label = {budget: self._samples[budget, 0].per_label for budget in budgets}
        self._cells = [
            Cell(base, strategy, budget, seed)
            for base in bases
            for strategy in wanted.strategies
            if strategy != "zero-shot" or wanted.label_texts  # it has nothing else to go by
            for budget, seed in ([(NO_TEXTS, 0)] if strategy == "zero-shot" else self._samples)
        ]

    def run(self) -> tuple[dict[Cell, Outcome], list[Skipped]]:
        """Fit what is not there yet."""
        done = self._store.read(self._cells)
        todo = [cell for cell in self._cells if cell not in done]
        skipped: list[Skipped] = []
        planner = Planner(
            {cell: len(self._sample(cell).texts) for cell in self._cells},
            self.per_label,
            {name: self._embed(base) for name, base in self._bases.items()} if todo else {},
        )
        while todo:
            cell = planner.choose(todo, done, self._seconds_left())
            if cell is None:
                break
            todo.remove(cell)
            try:
                done[cell] = self._fit(cell, f"{len(done) + 1} of {len(self._cells)}")
                self._store.write(done[cell])
            except _OutOfTimeError:
                skipped.append(Skipped(cell, "the time was up before it was done; more time goes on from there"))
        return done, [*skipped, *planner.skipped(todo, done, self._seconds_left() or 0.0)]

    def _seconds_left(self) -> float | None:
        return None if self._end is None else self._end - perf_counter()

    def _sample(self, cell: Cell) -> Examples:
        """Return what a cell learns from; without texts, all tell at least what labels there are."""
        if cell.budget == NO_TEXTS:
            return self._train.take(np.zeros(0, dtype=np.int64))
        return self._samples[cell.budget, cell.seed]

    def _embed(self, base: Base) -> float:
        """Embed all texts; return the seconds that one takes."""
        texts = {*self._train.texts, *self._test.texts, *self._outside}
        with Cost() as cost:
            base.workbench.vectors(sorted(texts))
        return cost.seconds / len(texts)

    def _fit(self, cell: Cell, number: str) -> Outcome:
        """Fit and measure one cell."""
        base, sample = self._bases[cell.base], self._sample(cell)

        def tell(stage: str, done: int, total: int, detail: str = "") -> None:
            if self._end is not None and perf_counter() > self._end:
                raise _OutOfTimeError
            self._progress(f"{number}: {cell.title}", done, total, f"{stage} {detail}".strip())

        tell("beginning", 0, 1)
        workbench = base.workbench
        workbench.progress = tell
        if STRATEGIES[cell.strategy].tunes:
            _ = workbench.backbone  # which takes seconds to load, once
        with Cost() as wall:
            sample = self._described(sample, workbench)
            options = Options(cell.seed, self._wanted.balanced, checkpoints=self._checkpoints, progress=tell)
            with workbench.account() as account, Cost() as cost:
                fitted = STRATEGIES[cell.strategy].fit(sample, workbench, options)
            price = workbench.price(account)
            outcome = self._measure(cell, sample, fitted)
        self.serving.measure(base, cell.strategy, fitted, len(sample.texts), self._test.texts)
        outcome.figures.update(
            wall_seconds=wall.seconds,
            seconds=cost.seconds - account.waited.seconds + price.seconds,
            cpu_seconds=cost.cpu_seconds - account.waited.cpu_seconds + price.cpu_seconds,
        )
        return outcome

    def _described(self, sample: Examples, workbench: Workbench) -> Examples:
        """Say what the labels mean, if that is wanted."""
        if not self._wanted.label_texts:
            return sample
        if not sample.texts and self._wanted.data.descriptions is None:
            return replace(sample, descriptions=label_names(sample.labels))
        return described_examples(sample, self._wanted.data.descriptions, workbench)

    def _measure(self, cell: Cell, sample: Examples, fitted: Fitted) -> Outcome:
        """Measure what a strategy made on the test texts, calibrated by what it held out."""
        calibration = calibrate(fitted.held_out, multi_label=sample.multi_label)
        logits = fitted.classify(self._test.texts)
        figures = {**fitted.figures, **measure(logits, self._test.targets, calibration)}
        if self._outside:
            figures |= measure_scope(logits, fitted.classify(self._outside), calibration)
        held_out = fitted.held_out
        return Outcome(
            cell,
            len(sample.texts),
            figures,
            _decisions(logits, np.arange(len(logits)), calibration),
            _decisions(held_out.logits, held_out.rows, calibration) if cell.budget == ALL else Decisions([], [], []),
            reliability(calibration.probabilities(logits), self._test.targets, multi_label=sample.multi_label),
        )


def _decisions(logits: Matrix, rows: np.ndarray, calibration: Calibration) -> Decisions:
    decided = calibration.decide(logits)
    probable = calibration.probabilities(logits)
    if calibration.multi_label:
        confidence = np.where(decided, probable, 1 - probable).min(axis=1)
    else:
        confidence = probable.max(axis=1)
    return Decisions(
        [int(row) for row in rows],
        [[int(label) for label in np.flatnonzero(row)] for row in decided],
        [round(float(value), 4) for value in confidence],
    )
