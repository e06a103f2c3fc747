"""Settings and result of a comparison."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from emberpc.export.compare.outcomes import ALL, Outcome, Way
from emberpc.export.compare.planner import Skipped
from emberpc.export.compare.serving_cost import ServingCost
from emberpc.export.data.classifier_data import ClassifierData
from emberpc.export.data.examples import Examples
from emberpc.export.errors import ExportError
from emberpc.export.names import STRATEGY_NAMES, check_strategies

#: Figures by which strategies can be compared.
METRICS = ("accuracy", "macro_f1", "micro_f1")


@dataclass(frozen=True)
class ComparisonSettings:
    """Settings of a comparison.

    `data` names the training texts, and `test` is a file of the same format with the test texts. The texts of
    `data.outside` are used for measuring and not for training, and those of `data.validation` are not used. `bases` are
    encoders: folders, installed packages or hub ids. `budgets` are numbers of training texts of each label, and `seeds`
    is the number of seeds for each budget. `max_tokens` is the maximum number of tokens of a text; None: each encoder's
    limit. `label_texts` and `balanced` have the meaning that they have for `export_classifier`.
    """

    data: ClassifierData
    test: Path
    bases: tuple[str, ...]
    budgets: tuple[int, ...] = (1, 2, 4, 8, 16, 32, ALL)
    strategies: tuple[str, ...] = STRATEGY_NAMES
    seeds: int = 3
    #: Seconds for the whole comparison, its report included; None: no limit.
    time_limit: float | None = None
    label_texts: bool = True
    balanced: bool = False
    max_tokens: int | None = None
    #: Name of the figure by which strategies are compared: one of `METRICS`.
    metric: str = "accuracy"


@dataclass(frozen=True)
class ComparisonResult:
    """Result of a comparison: data, outcomes of the cells that were measured, serving costs, and skipped cells."""

    #: Title of the data: the name of the folder with the training texts.
    title: str
    train: Examples
    test: Examples
    outcomes: tuple[Outcome, ...]
    serving: tuple[ServingCost, ...]
    skipped: tuple[Skipped, ...]
    #: Mean number of training texts of a label, by budget.
    per_label: dict[int, float]
    #: The source of each base (folder, package or hub id), by the base's name.
    sources: dict[str, str]
    #: Estimate of the minimum time limit, in seconds, with which one more cell is measured; 0 if no cell was skipped
    #: for lack of time.
    needed_seconds: float = 0.0
    #: Estimate of the minimum time limit, in seconds, with which a later run measures the full profile with the largest
    #: budget, by way; only ways of this run that were not measured there.
    seconds_to_know: dict[Way, float] = field(default_factory=dict)


def check(settings: ComparisonSettings) -> None:
    """Raise ExportError if the settings name an unknown strategy or metric, lack a part, or have a number below 1."""
    check_strategies(settings.strategies)
    if not settings.bases or not settings.strategies or not settings.budgets:
        raise ExportError("a comparison needs at least one base, one strategy and one budget")
    if settings.metric not in METRICS:
        raise ExportError(f"there is no metric {settings.metric!r}; there are: {', '.join(METRICS)}")
    if settings.seeds < 1:
        raise ExportError(f"seeds is {settings.seeds}; it must be at least 1")
    if bad := [budget for budget in settings.budgets if budget < 1 and budget != ALL]:
        raise ExportError(f"a budget is {bad[0]}; it must be at least 1, or all")
