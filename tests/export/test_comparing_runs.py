"""Comparisons that are interrupted, reach their time limit, or have a strategy that fails."""

from __future__ import annotations

import csv
import importlib
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from emberpc.export import timing
from emberpc.export.classifier import ClassifierData
from emberpc.export.classify.strategies import STRATEGIES, contrastive
from emberpc.export.compare import base_encoders, comparison, comparison_key, comparison_run, time_limit
from emberpc.export.compare import plots as plots_module
from emberpc.export.compare.base_encoders import open_base
from emberpc.export.compare.comparison_run import run
from emberpc.export.compare.comparison_settings import ComparisonSettings
from emberpc.export.compare.outcomes import ALL
from emberpc.export.compare.planner import Planner
from emberpc.export.compare.recommendation import recommendation
from emberpc.export.compare.serving_cost import ServingCosts
from emberpc.export.errors import ExportError
from emberpc.export.tuning.trainable_encoder import TrainableEncoder


class StopError(Exception):
    """Raised by a test to stop a comparison."""


@pytest.fixture
def settings(tiny_source: Path, tmp_path: Path) -> ComparisonSettings:
    """Texts whose first letter is their label, and a quick comparison of them."""
    for name, numbers in (("train.csv", range(10)), ("test.csv", range(10, 16))):
        with (tmp_path / name).open("w", newline="", encoding="utf-8") as file:
            rows = [(f"{letter} {'cdefghijklmnopqrs'[i]}", letter) for letter in "ab" for i in numbers]
            csv.writer(file).writerows([("text", "label"), *rows])
    return ComparisonSettings(
        ClassifierData(tmp_path / "train.csv"), tmp_path / "test.csv", (str(tiny_source),), budgets=(ALL,), seeds=1,
        strategies=("top-layers",),
    )  # fmt: skip


def test_a_finished_training_is_kept_until_its_outcome_is_stored(settings: ComparisonSettings, tmp_path: Path) -> None:
    details: list[str] = []
    reported: list[str] = []

    def stop(stage: str, done: int, total: int, detail: str = "") -> None:
        details.append(detail)
        # Both trainings are finished. The outcome is stored after the time of serving was measured.
        if detail.startswith("timing"):
            raise StopError

    with pytest.raises(StopError):
        run(settings, tmp_path / "report", stop)
    assert any(detail.startswith("training on all texts") for detail in details)

    def tell(stage: str, done: int, total: int, detail: str = "") -> None:
        reported.append(detail)

    compared = run(settings, tmp_path / "report", tell)
    assert not [detail for detail in reported if detail.startswith("training")]
    (outcome,) = compared.outcomes
    assert outcome.figures["held_out_texts"] > 0
    assert list((tmp_path / "report" / "checkpoints").iterdir()) == []


def test_a_failing_strategy_is_skipped_with_its_reason(
    settings: ComparisonSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contrastive, "supervised_contrastive", lambda vectors, _together: vectors.sum() * torch.nan)
    settings = replace(settings, strategies=("linear", "contrastive", "top-layers"))
    summary = comparison.compare(settings, tmp_path / "report").summary
    assert {point.way.strategy for point in summary.points} == {"linear", "top-layers"}
    (skipped,) = summary.result.skipped
    assert skipped.cell.strategy == "contrastive"
    assert skipped.reason == "it failed: the loss is nan in epoch 1; try another seed or strategy"
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert "the loss is nan in epoch 1" in page
    assert "with more time" not in page


def test_an_encoder_that_cannot_be_trained_is_loaded_once(
    settings: ComparisonSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[TrainableEncoder] = []

    def refuse(self: TrainableEncoder) -> Any:
        loaded.append(self)
        raise ExportError("it has no list of layers; use the strategy linear")

    monkeypatch.setattr(TrainableEncoder, "_find_layers", refuse)
    compared = run(replace(settings, strategies=("linear", "top-layers", "full"), seeds=2), tmp_path / "report")
    assert {outcome.cell.strategy for outcome in compared.outcomes} == {"linear"}
    assert len(compared.skipped) == 2 * 2
    assert {skipped.reason for skipped in compared.skipped} == {
        "it failed: it has no list of layers; use the strategy linear"
    }
    assert len(loaded) == 1
    with pytest.raises(ExportError, match="nothing could be measured; full: it failed: it has no list of layers"):
        comparison.compare(replace(settings, strategies=("full",)), tmp_path / "other")


def test_a_full_disk_ends_a_comparison(settings: ComparisonSettings, tmp_path: Path) -> None:
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "checkpoints").write_text("no folder")
    with pytest.raises(ExportError, match="the checkpoint .* cannot be written"):
        run(settings, tmp_path / "report")


def test_zero_shot_without_label_texts_is_listed_as_skipped(settings: ComparisonSettings, tmp_path: Path) -> None:
    settings = replace(settings, strategies=("zero-shot", "linear"), label_texts=False)
    (skipped,) = run(settings, tmp_path / "report").skipped
    assert skipped.cell.strategy == "zero-shot"
    assert "these are switched off" in skipped.reason


#: Seconds of a conversion by the clock below; it cannot be interrupted.
CONVERSION = 8.0
#: Seconds by the clock of the other steps of a slow host that cannot be interrupted, by module, class and name: steps
#: that are repeated, steps that are done once, and steps of the report.
REPEATED = {
    ("emberpc.export.convert.onnx_runner", "OnnxRunner", "_batch"): 0.5,
    ("emberpc.export.tuning.trainable_encoder", "TrainableEncoder", "forward"): 0.5,
    ("sklearn.linear_model", "LogisticRegression", "fit"): 0.5,
}
ONCE = {
    ("emberpc.export.tuning.trainable_encoder", "TrainableEncoder", "__init__"): 3.0,
    ("emberpc.export.compare.serving_cost", "", "export_head"): 3.0,
}
REPORT = {
    ("matplotlib.figure", "Figure", "savefig"): 1.0,
    ("emberpc.export.compare.uncertainty", "Bootstrap", "samples"): 0.1,
}


class Clock:
    """Replaces `perf_counter`: each progress report takes one second, and a conversion takes `CONVERSION` seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        for module in (comparison, comparison_run, time_limit, timing):
            monkeypatch.setattr(module, "perf_counter", lambda: self.now)
        self.slow_down(monkeypatch, base_encoders, "convert_encoder", CONVERSION)

    def progress(self, stage: str, done: int, total: int, detail: str = "") -> None:
        self.now += 1.0

    def slow_down(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, seconds: float) -> None:
        """Let each call of a function take that many seconds more."""
        function = getattr(owner, name)

        def slowly(*arguments: Any, **named: Any) -> Any:
            self.now += seconds
            return function(*arguments, **named)

        monkeypatch.setattr(owner, name, slowly)


class SlowHost(Clock):
    """A host on which some steps are slow, and reports of progress take no time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, steps: dict[tuple[str, str, str], float]) -> None:
        super().__init__(monkeypatch)
        #: Time of the last report of progress, and the longest time between two reports of the measurements.
        self.reported, self.longest = 0.0, 0.0
        for (module, owner, name), seconds in steps.items():
            owned = importlib.import_module(module)
            self.slow_down(monkeypatch, getattr(owned, owner) if owner else owned, name, seconds)

    def progress(self, stage: str, done: int, total: int, detail: str = "") -> None:
        if stage[0].isdigit():
            self.longest = max(self.longest, self.now - self.reported)
        self.reported = self.now


@pytest.mark.parametrize("limit", [10, 40, *(pytest.param(limit, marks=pytest.mark.slow) for limit in (90, 200, 600))])
def test_a_comparison_ends_within_its_time_limit(
    settings: ComparisonSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: float
) -> None:
    clock = Clock(monkeypatch)
    strategies = ("linear", "top-layers", "full")
    settings = replace(settings, strategies=strategies, budgets=(2, 4, ALL), seeds=2, time_limit=limit)
    compared = run(settings, tmp_path / "report", clock.progress)
    # Only the opening of the encoder cannot be interrupted; it happens before any measurement.
    assert clock.now <= max(limit, CONVERSION + 1) + 1
    full = [outcome for outcome in compared.outcomes if not outcome.cell.quick]
    assert len(full) + len(compared.skipped) == 3 * 3 * 2
    assert all(skipped.for_time for skipped in compared.skipped)


@pytest.mark.parametrize(
    ("separator", "limit"),
    [
        *((None, 60), (";", 15)),
        *(pytest.param(None, limit, marks=pytest.mark.slow) for limit in (15, 30, 120, 400)),
        *(pytest.param(";", limit, marks=pytest.mark.slow) for limit in (30, 60, 120, 400)),
    ],
)
def test_no_step_of_a_comparison_on_a_slow_host_passes_the_time_limit(
    settings: ComparisonSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: float, separator: str | None
) -> None:
    host = SlowHost(monkeypatch, REPEATED | ONCE | REPORT)
    data = replace(settings.data, separator=separator)
    settings = replace(settings, data=data, strategies=tuple(STRATEGIES), budgets=(2, ALL), time_limit=limit)
    try:
        comparison.compare(settings, tmp_path / "report", progress=host.progress)
    except ExportError as error:
        assert "left no time for any measurement" in str(error)
    else:
        assert "was not drawn" not in (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    # The trial of the report draws two plots after the conversion.
    assert host.now <= max(1.05 * limit, CONVERSION + 3)


def test_all_strategies_report_their_progress_at_each_step(
    settings: ComparisonSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Few held-out texts stop a training early, so that it is scored after each epoch.
    monkeypatch.setattr("emberpc.export.classify.strategies.base._MIN_TO_STOP", 2)
    monkeypatch.setattr("emberpc.export.tuning.trainable_encoder._BATCH", 2)
    host = SlowHost(monkeypatch, REPEATED)
    settings = replace(settings, strategies=tuple(STRATEGIES))
    compared = run(settings, tmp_path / "report", host.progress)
    assert {outcome.cell.strategy for outcome in compared.outcomes} == {*STRATEGIES}
    # A text is embedded and classified between two reports, or a training's step and the first batch of a score.
    assert host.longest <= 2 * max(REPEATED.values())


def test_a_second_encoder_is_not_opened_without_time_for_it(
    settings: ComparisonSettings, tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    other = shutil.copytree(tiny_source, tmp_path / "other-bert")
    several = replace(settings, bases=(*settings.bases, str(other)), time_limit=12)
    with pytest.raises(ExportError, match=r"limit of 12 s left no time to open all 2 encoders: 1 took"):
        run(several, tmp_path / "report", clock.progress)
    assert clock.now <= 12


def test_plots_that_the_time_limit_has_no_time_for_are_left_out(
    settings: ComparisonSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    settings = replace(settings, strategies=("linear",), time_limit=1000)
    comparison.compare(settings, tmp_path / "report", progress=clock.progress)
    plots = {"learning-curves", "confusions", "accuracy-cost", "reliability"}
    assert {path.stem for path in (tmp_path / "report").glob("*.png")} == plots
    clock.now = 0.0
    # The trial of the report is quick, and then the host becomes slow.
    clock.slow_down(monkeypatch, comparison, "write_report", 985.0)
    clock.slow_down(monkeypatch, plots_module, "draw", 30.0)
    comparison.compare(settings, tmp_path / "report", progress=clock.progress)
    assert clock.now <= 1.05 * 1000 + 30
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert page.count("This plot was not drawn") == 3
    assert [path.stem for path in (tmp_path / "report").glob("*.png")] == ["learning-curves"]


def test_an_outcome_is_kept_if_the_time_passes_while_serving_is_measured(
    settings: ComparisonSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)

    def progress(stage: str, done: int, total: int, detail: str = "") -> None:
        clock.now += 1000.0 * detail.startswith("timing")

    settings = replace(settings, strategies=("centroids", "linear"), time_limit=1000)
    found = comparison.compare(settings, tmp_path / "report", cost="serving", progress=progress)
    assert [outcome.cell.strategy for outcome in found.summary.result.outcomes] == ["centroids"]
    assert found.summary.result.serving == ()


def test_serving_is_not_measured_if_it_takes_most_of_the_time_left(
    settings: ComparisonSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    monkeypatch.setattr(ServingCosts, "estimate", lambda *_: 500.0)
    settings = replace(settings, strategies=("centroids", "linear", "nearest"), time_limit=1000)
    compared = run(settings, tmp_path / "report", clock.progress)
    assert {outcome.cell.strategy for outcome in compared.outcomes} == {"centroids", "linear", "nearest"}
    assert compared.serving == ()


def test_a_file_of_descriptions_is_read_once_and_before_the_encoder_is_opened(
    settings: ComparisonSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "labels.csv"
    described = replace(settings, data=replace(settings.data, descriptions=path), strategies=("linear", "zero-shot"))
    path.write_text("label,description\na,the first\nc,the third\n", encoding="utf-8")
    with monkeypatch.context() as patched:
        patched.setattr(comparison_run, "open_base", lambda *_: pytest.fail("the encoder was opened"))
        with pytest.raises(ExportError, match=r"labels.csv, line 3: no training text has the label 'c'"):
            run(described, tmp_path / "report")
    path.write_text("label,description\na,the first\nb,the second\n", encoding="utf-8")

    def removed(*arguments: Any) -> Any:
        path.unlink(missing_ok=True)
        return open_base(*arguments)

    monkeypatch.setattr(comparison_run, "open_base", removed)
    compared = run(replace(described, budgets=(2, ALL), seeds=2), tmp_path / "report")
    assert not compared.skipped
    assert {outcome.cell.strategy for outcome in compared.outcomes} == {"linear", "zero-shot"}


def test_the_file_of_test_texts_is_read_once(settings: ComparisonSettings, tmp_path: Path) -> None:
    data, path = replace(settings.data), tmp_path / "copy.csv"
    path.write_bytes(settings.test.read_bytes())
    found = data.test_texts(path)
    path.unlink()
    compared = run(replace(settings, data=data, test=path, strategies=("linear",), budgets=(2,), seeds=1), tmp_path)
    assert compared.test is found


def test_the_error_for_a_too_short_time_limit_states_the_needed_limit(
    settings: ComparisonSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    settings = replace(settings, strategies=("linear", "top-layers"))
    with pytest.raises(ExportError, match=r"limit of 10 s left no time for any .* a limit of about \d+ s$") as short:
        comparison.compare(replace(settings, time_limit=10), tmp_path / "report", progress=clock.progress)
    stated = int(str(short.value).split()[-2])
    assert 10 < stated < 60
    clock.now = 0.0
    # Four times as long: the estimate does not know that each report of progress takes a second by this clock.
    compared = run(replace(settings, time_limit=4 * stated), tmp_path / "report", clock.progress)
    assert compared.outcomes
    assert clock.now <= 1.05 * 4 * stated


def test_the_first_estimate_of_time_includes_shared_work(
    settings: ComparisonSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    extra: list[float] = []
    choose = Planner.choose

    def watched(self: Any, cells: Any, done: Any, left: Any) -> Any:
        extra.append(self.estimate(cells[0], done) - self._own_seconds(cells[0], done))
        return choose(self, cells, done, left)

    monkeypatch.setattr(Planner, "choose", watched)
    run(replace(settings, seeds=2), tmp_path / "report", clock.progress)
    # The shared work: loading the encoder for training, which takes about as long as opening the base.
    assert extra[0] >= CONVERSION
    assert extra[1] == 0


def test_a_later_run_with_fewer_strategies_and_budgets_keeps_stored_outcomes(
    settings: ComparisonSettings, tmp_path: Path
) -> None:
    first = run(replace(settings, strategies=("centroids", "linear"), budgets=(2, ALL)), tmp_path / "report")
    fewer = replace(settings, strategies=("linear",), budgets=(4,))
    second = run(fewer, tmp_path / "report")
    assert {outcome.cell for outcome in first.outcomes} < {outcome.cell for outcome in second.outcomes}
    assert second.per_label == {2: 2.0, 4: 4.0, ALL: 10.0}
    summary = comparison.compare(fewer, tmp_path / "report").summary
    assert {(point.way.strategy, point.budget) for point in summary.points} == {
        ("centroids", 2), ("centroids", ALL), ("linear", 2), ("linear", 4), ("linear", ALL),
    }  # fmt: skip


def test_with_two_bases_sentences_name_the_base_and_tf_idf_is_fitted_once(
    settings: ComparisonSettings, tiny_source: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(tiny_source, tmp_path / "other-bert")
    several = replace(settings, bases=(*settings.bases, str(other)), strategies=("tf-idf", "centroids"))
    for bases in (several.bases, several.bases[::-1]):
        found = comparison.compare(replace(several, bases=bases), tmp_path / "report")
        assert [(point.way.base, point.way.strategy) for point in found.summary.points] == [
            ("other-bert", "tf-idf"), ("other-bert", "centroids"), ("tiny-bert", "centroids"),
        ]  # fmt: skip
    said = " ".join(recommendation(found))
    assert "centroids on frozen vectors of tiny-bert" in said.lower()
    assert "centroids on frozen vectors of other-bert" in said.lower()


def test_two_base_encoders_with_the_same_name_are_refused(settings: ComparisonSettings, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="two bases have the name 'tiny-bert'"):
        run(replace(settings, bases=settings.bases * 2), tmp_path / "report")


def test_a_folder_of_outcomes_by_other_code_is_refused(
    settings: ComparisonSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(settings, strategies=("linear",))
    run(settings, tmp_path / "report")
    run(settings, tmp_path / "report")
    monkeypatch.setattr(comparison_key, "code_version", lambda: "other")
    with pytest.raises(ExportError, match="holds a comparison of other data"):
        run(settings, tmp_path / "report")
