"""Fit and measure the cells of a comparison within its time limit.

A cell is one classifier to fit: a strategy on a base encoder, with one budget and one seed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from math import ceil
from pathlib import Path
from time import perf_counter

from emberpc.export.classify.cached_encoder import CachedEncoder
from emberpc.export.classify.label_descriptions import described_examples
from emberpc.export.classify.strategies import STRATEGIES, Options
from emberpc.export.classify.strategies.base import TYPICAL_LAYERS
from emberpc.export.compare.base_encoders import Base, open_base
from emberpc.export.compare.comparison_key import key_of
from emberpc.export.compare.comparison_settings import ComparisonResult, ComparisonSettings, check
from emberpc.export.compare.measured_outcome import outcome_of
from emberpc.export.compare.outcomes import NO_TEXTS, Cell, Outcome, OutcomeStore, Way, take_budget
from emberpc.export.compare.planner import Planner, Skipped, Work, budgets_of
from emberpc.export.compare.serving_cost import ServingCosts
from emberpc.export.compare.time_limit import OutOfTimeError, ReportTime, TimeLimit
from emberpc.export.data.classifier_data import read_data
from emberpc.export.data.examples import Examples, label_names
from emberpc.export.errors import ExportError, NoSpaceError
from emberpc.export.progress import Progress, no_progress
from emberpc.export.threads import bounded_threads
from emberpc.export.timing import Cost
from emberpc.export.tuning.checkpoint import Checkpoints

#: Maximum number of texts of an encoder that are embedded after the time limit has passed, to estimate the limit that
#: would suffice. They are one batch, which cannot be interrupted.
_SAMPLED_TEXTS = 8
#: Greatest share of the time left that the measurement of the serving cost of a strategy may take. If the estimate of
#: the measurement is above this share, the measurement is left out, and a later cell of the strategy may make it.
_FOR_SERVING = 0.3
_NO_LABEL_TEXTS = "it uses only the texts of the labels, and these are switched off"


@bounded_threads()
def run(
    settings: ComparisonSettings, folder: Path, progress: Progress = no_progress, start: float | None = None
) -> ComparisonResult:
    """Fit and measure all cells of a comparison that its time limit allows.

    Args:
        settings: settings of the comparison.
        folder: folder for outcomes and checkpoints. Outcomes that it has already are read and not computed again.
        progress: called with the current step.
        start: time, in seconds of `time.perf_counter`, from which the time limit counts; default: now.

    Returns:
        The outcomes, also those of earlier calls, and the skipped cells with reasons. A cell whose fit failed counts as
        skipped.

    Raises:
        ExportError: the settings, the data or a base cannot be used, or the folder holds another comparison.
        NoSpaceError: a checkpoint cannot be written.
        OSError: another file of the folder cannot be written.
    """
    start = perf_counter() if start is None else start
    limit = TimeLimit(start, settings.time_limit)
    check(settings)
    train, _, outside = read_data(settings.data)
    descriptions = settings.data.label_descriptions if settings.label_texts else ()
    test = settings.data.test_texts(settings.test)
    with tempfile.TemporaryDirectory() as name:
        bases: dict[str, Base] = {}
        for number, source in enumerate(settings.bases):
            _check_opening(limit, list(bases.values()), settings)
            base = open_base(source, Path(name) / str(number), settings.max_tokens, progress)
            if base.encoder.name in bases:
                raise ExportError(
                    f"two bases have the name {base.encoder.name!r}; give one of them, or rename its folder"
                )
            bases[base.encoder.name] = base
        key = key_of(
            train,
            test,
            outside,
            bases.values(),
            label_texts=settings.label_texts,
            balanced=settings.balanced,
            descriptions=descriptions,
        )
        store = OutcomeStore(folder, key)
        comparison = _Comparison(settings, train, test, outside, descriptions, bases, store, folder, limit, progress)
        done, skipped = comparison.run()
    return ComparisonResult(
        Path(settings.data.train).resolve().parent.name,
        train,
        test,
        tuple(done[cell] for cell in sorted(done)),
        tuple(comparison.serving.known.values()),
        tuple(skipped),
        comparison.per_label,
        dict(zip(bases, settings.bases, strict=True)),
        comparison.needed_seconds,
        comparison.seconds_to_know,
    )


def _check_opening(limit: TimeLimit, opened: Sequence[Base], settings: ComparisonSettings) -> None:
    """Raise ExportError if the time limit leaves no time to open one more encoder; the first is always opened."""
    if not opened or limit.left is None:
        return
    longest = max(base.seconds for base in opened)
    if limit.left < longest:
        needed = limit.spent + longest * (len(settings.bases) - len(opened)) + limit.reserve
        raise ExportError(
            f"the time limit of {settings.time_limit:.0f} s left no time to open all {len(settings.bases)} encoders: "
            f"{len(opened)} took {limit.spent:.0f} s; give more than about {ceil(2 * needed)} s, or fewer --base"
        )


class _Comparison:
    """Fits the cells of one comparison and stores their outcomes."""

    def __init__(
        self,
        settings: ComparisonSettings,
        train: Examples,
        test: Examples,
        outside: Sequence[str],
        descriptions: tuple[str, ...],
        bases: dict[str, Base],
        store: OutcomeStore,
        folder: Path,
        limit: TimeLimit,
        progress: Progress,
    ) -> None:
        self._limit, self.needed_seconds = limit, 0.0
        self.seconds_to_know: dict[Way, float] = {}
        #: Seconds from the start until the first cell could be chosen; a later run needs them again.
        self._opened = 0.0
        self._all_texts = sorted({*train.texts, *test.texts, *outside})
        self._settings, self._train, self._test, self._outside = settings, train, test, outside
        self._bases, self._store, self._progress = bases, store, progress
        self._descriptions = descriptions
        self._report = None if settings.time_limit is None else ReportTime(test.targets, settings.metric)
        self._checkpoints = folder / "checkpoints"
        self.serving = ServingCosts(folder / "serving.json")
        self._samples: dict[tuple[int, int], Examples] = {}
        #: Wall seconds that embedding one text takes, by base.
        self._per_text: dict[str, float] = {}
        self._stored = store.read()
        budgets = budgets_of(settings.budgets, lambda budget: len(self._sample(budget, 0).texts) == len(train.texts))
        known = {cell.budget for cell in self._stored} - {NO_TEXTS}
        self.per_label = {budget: self._sample(budget, 0).per_label for budget in {*budgets, *known}}
        cells = [
            cell
            for base in bases
            for strategy in settings.strategies
            # Without an encoder, the outcome is the same with each base.
            if STRATEGIES[strategy].uses_encoder or base == min(bases)
            for cell in self._grid(base, strategy, budgets)
        ]
        self._left_out = [cell for cell in cells if cell.strategy == "zero-shot" and not settings.label_texts]
        self._cells = [cell for cell in cells if cell not in self._left_out]

    def _grid(self, base: str, strategy: str, budgets: Sequence[int]) -> list[Cell]:
        """Return the cells of a strategy on a base encoder.

        Cells with the quick profile are included only if the comparison has a time limit; they have one seed.
        """
        if strategy == "zero-shot":
            return [Cell(base, strategy, NO_TEXTS, 0)]
        quick = STRATEGIES[strategy].tunes and self._settings.time_limit is not None
        full = [Cell(base, strategy, budget, seed) for budget in budgets for seed in range(self._settings.seeds)]
        return [*full, *(Cell(base, strategy, budget, 0, quick=True) for budget in budgets if quick)]

    def run(self) -> tuple[dict[Cell, Outcome], list[Skipped]]:
        """Fit the cells without a stored outcome, as long as the time limit allows, and store their outcomes.

        Returns:
            All outcomes, also those stored before, and the skipped cells.

        Raises:
            NoSpaceError: a checkpoint cannot be written.
            OSError: an outcome cannot be written.
        """
        done = dict(self._stored)
        self._reserve(done)
        todo = [cell for cell in self._cells if cell not in done]
        skipped = [Skipped(cell, _NO_LABEL_TEXTS) for cell in self._left_out]
        seconds = self._per_text
        planner = Planner(
            {cell: self._work(cell) for cell in {*self._cells, *done}},
            self.per_label,
            seconds,
            self._settings.metric,
            self._shared_seconds,
        )
        try:
            self._embed_all(seconds, self._bases if todo else {})
        except OutOfTimeError:
            others = {name: self._sampled(base) for name, base in self._bases.items() if name not in seconds}
            seconds |= others
            self._opened += sum(others.values()) * len(self._all_texts)
            self.needed_seconds = self._opened + planner.min_seconds(todo, done) + self._limit.reserve
            self._note_unknown(planner, done, set())
            reason = "the time limit passed before all texts were embedded"
            return done, [*skipped, *(Skipped(cell, reason, for_time=True) for cell in todo if not cell.quick)]
        while todo:
            cell = planner.choose(todo, done, self._limit.left)
            if cell is None:
                break
            todo.remove(cell)
            kept = Checkpoints(self._checkpoints)
            try:
                alike = [each in done for each in self._cells if each.quick == cell.quick]
                number = f"{'quick training ' * cell.quick}{sum(alike) + 1} of {len(alike)}"
                outcome = self._fit(cell, number, kept)
                self._store.write(outcome)
            except OutOfTimeError:
                reason = "the time limit passed during its training; with more time it continues from there"
                skipped.append(Skipped(cell, reason, for_time=True))
                continue
            except NoSpaceError:
                raise
            except ExportError as error:
                failed = [cell, *self._fails_too(cell, todo)]
                skipped += [Skipped(other, f"it failed: {error}") for other in failed]
                todo = [other for other in todo if other not in failed]
            else:
                done[cell] = outcome
                self._reserve(done)
            kept.remove()
        self._note_unknown(planner, done, {each.cell for each in skipped if not each.for_time})
        todo = planner.needed(todo, done)
        if rest := [*todo, *(each.cell for each in skipped if each.for_time)]:
            self.needed_seconds = self._limit.spent + planner.min_seconds(rest, done) + self._limit.reserve
        of_full = [each for each in skipped if not each.cell.quick]
        return done, [*of_full, *planner.skipped(todo, done, self._limit.left or 0.0)]

    def _note_unknown(self, planner: Planner, done: Mapping[Cell, Outcome], failed: Collection[Cell]) -> None:
        """Store the time limit with which a later run measures the full profile at the largest budget, by way."""
        for cell in self._cells:
            full = cell.budget == planner.largest and cell.seed == 0 and not cell.quick
            if full and cell not in done and cell not in failed:
                base = self._bases[cell.base]
                # A later run loads the encoder for training again.
                loading = base.seconds * (cell.way.tunes and base.cached_encoder.is_trainable)
                seconds = loading + planner.min_seconds([cell], done)
                self.seconds_to_know[cell.way] = self._opened + seconds + self._limit.reserve

    def _work(self, cell: Cell) -> Work:
        """Return the work of a cell. A tuned encoder also embeds all texts to measure on."""
        sample = self._sample(cell.budget, cell.seed)
        strategy, config = STRATEGIES[cell.strategy], self._bases[cell.base].encoder.config
        layers = int(config.get("num_hidden_layers") or config.get("n_layers") or TYPICAL_LAYERS)
        passes = strategy.passes(sample, layers, quick=cell.quick)
        return Work(len(sample.texts), passes and passes + len(self._test.texts) + len(self._outside))

    def _fails_too(self, cell: Cell, todo: Sequence[Cell]) -> list[Cell]:
        """Return the cells of `todo` that will fail as `cell` did.

        If the encoder of `cell` cannot be loaded for training, these are all cells that train the same encoder.
        Otherwise the list is empty.
        """
        if not STRATEGIES[cell.strategy].tunes or self._bases[cell.base].cached_encoder.is_trainable:
            return []
        return [other for other in todo if other.base == cell.base and STRATEGIES[other.strategy].tunes]

    def _reserve(self, done: Mapping[Cell, Outcome]) -> None:
        """Reserve the time for the report of the outcomes so far and of one more."""
        if self._report is not None:
            self._limit.reserve = self._report.seconds(len(done) + 1)

    def _timed(self, title: str) -> Progress:
        """Return a callback that reports progress of the step `title`, or raises `OutOfTimeError` if time is up."""

        def report(stage: str, done: int, total: int, detail: str = "") -> None:
            self._limit.check()
            self._progress(title, done, total, f"{stage} {detail}".strip())

        return report

    def _shared_seconds(self, cell: Cell) -> float:
        """Estimate the seconds of work that a cell needs, that other cells need too, and that is not done yet.

        This work is loading the encoder for training. The estimate does not contain the measurement of the serving
        cost, since `_fit` leaves this measurement out if too little time is left.

        Args:
            cell: the classifier to fit: base encoder, strategy, budget, seed and profile.
        """
        base = self._bases[cell.base]
        loading = STRATEGIES[cell.strategy].tunes and not base.cached_encoder.is_trainable
        return base.seconds * loading

    def _sample(self, budget: int, seed: int) -> Examples:
        """Return the training texts of a budget; with `NO_TEXTS`, examples without texts but with all labels."""
        if (budget, seed) not in self._samples:
            self._samples[budget, seed] = take_budget(self._train, budget, seed)
        return self._samples[budget, seed]

    def _embed_all(self, seconds: dict[str, float], bases: Mapping[str, Base]) -> None:
        """Embed all texts with each base, and set the seconds for one text in `seconds`; raise `OutOfTimeError`."""
        for name, base in bases.items():
            self._opened = self._limit.spent
            seconds[name] = self._embed(base, self._all_texts, self._timed("embedding all texts"))
        self._opened = self._limit.spent

    def _embed(self, base: Base, texts: Sequence[str], progress: Progress) -> float:
        """Embed texts, so that their vectors are cached; return the mean wall seconds for one text."""
        base.cached_encoder.progress = progress
        with Cost() as cost:
            base.cached_encoder.vectors(texts)
        return cost.seconds / len(texts)

    def _sampled(self, base: Base) -> float:
        """Embed at most 8 texts, even after the time limit has passed; return the mean wall seconds for one text."""
        step = -(-len(self._all_texts) // _SAMPLED_TEXTS)
        return self._embed(base, self._all_texts[::step], no_progress)

    def _fit(self, cell: Cell, number: str, checkpoints: Checkpoints) -> Outcome:
        """Fit and measure one cell, and measure its serving cost; return the outcome.

        The seconds of the outcome include those of interrupted trainings that this one continues.

        Args:
            cell: the cell.
            number: the cell's place among all cells, as text for the progress.
            checkpoints: where trainings store their checkpoints.

        Raises:
            OutOfTimeError: the time limit passed.
            ExportError: the classifier cannot be fitted or converted.
            NoSpaceError: a checkpoint cannot be written.
            OSError: the serving cost cannot be written.
        """
        base, sample = self._bases[cell.base], self._sample(cell.budget, cell.seed)
        report = self._timed(f"{number}: {cell.title}")
        report("beginning", 0, 1)
        cached_encoder = base.cached_encoder
        cached_encoder.progress = report
        if STRATEGIES[cell.strategy].tunes:
            # Load it here: this takes seconds once and is not part of the cell's own time.
            _ = cached_encoder.trainable_encoder
        with Cost() as wall:
            sample = self._described(sample, cached_encoder)
            options = Options(
                cell.seed, self._settings.balanced, quick=cell.quick, checkpoints=checkpoints, progress=report
            )
            with cached_encoder.account() as account, Cost() as cost:
                fitted = STRATEGIES[cell.strategy].fit(sample, cached_encoder, options)
            price = cached_encoder.price(account)
            report("measuring", 0, 1)
            outcome = outcome_of(cell, len(sample.texts), fitted, self._test, self._outside, self._unlabelled(sample))
        before = checkpoints.spent
        serving = self.serving.estimate(base, cell.strategy, len(sample.texts), self._per_text[cell.base])
        if not serving or self._limit.left is None or serving <= _FOR_SERVING * self._limit.left:
            with suppress(OutOfTimeError):  # the outcome is worth keeping without a serving cost
                self.serving.measure(base, cell.strategy, fitted, len(sample.texts), self._test.texts, report)
        outcome.figures.update(
            wall_seconds=wall.seconds + before.seconds,
            seconds=before.seconds + cost.seconds - account.waited.seconds + price.seconds,
            cpu_seconds=before.cpu_seconds + cost.cpu_seconds - account.waited.cpu_seconds + price.cpu_seconds,
        )
        return outcome

    def _described(self, sample: Examples, cached_encoder: CachedEncoder) -> Examples:
        """Return the sample with label descriptions, if label texts are switched on.

        Without a file of descriptions, label names are used if they help to classify the sample's texts. A sample
        without texts, as for zero-shot, always gets label names.
        """
        if not self._settings.label_texts:
            return sample
        if not sample.texts and not self._descriptions:
            return replace(sample, descriptions=label_names(sample.labels))
        return described_examples(sample, self._descriptions, cached_encoder)

    def _unlabelled(self, sample: Examples) -> Sequence[str]:
        """Return the training texts that are not in a sample, for rules that need texts but no labels."""
        return sorted({*self._train.texts} - {*sample.texts}) if sample.multi_label else ()
