"""Find problems in the data: labels that are confused with each other, and texts whose label is probably wrong."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np

from emberpc.export.compare.outcomes import Decisions
from emberpc.export.compare.summary import Point, Summary
from emberpc.export.data.examples import Examples

_MOST_PAIRS = 12
_MOST_TEXTS = 4
_MOST_SUSPECTS = 40
#: Least mean confidence, in [0, 1], of the classifiers that suggest another label for the label to be suspect.
_LEAST_CONFIDENCE = 0.5


@dataclass(frozen=True)
class Confusion:
    """Test texts of one label (or set of labels) that a classifier gave another label (or set).

    `label` is the right label, `given` the classifier's; a set is joined by commas. `texts` are some of the texts.
    """

    label: str
    given: str
    #: Share of the test texts of `label` that got `given`, in [0, 1], as the mean over the seeds.
    share: float
    #: Number of test texts of `label` that got `given`, as the mean over the seeds.
    count: float
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Suspect:
    """A text whose label `label` is probably wrong: most classifiers agree on another one, `suggested`."""

    #: The file that has the text: `train` or `test`.
    part: str
    #: Index of the text in its file, from 0.
    row: int
    text: str
    label: str
    suggested: str
    #: Mean confidence in [0, 1] of the classifiers that suggest `suggested`.
    confidence: float
    #: Number of classifiers that suggest `suggested`.
    votes: int
    #: Number of classifiers that voted.
    voters: int


def confusions(summary: Summary, point: Point) -> list[Confusion]:
    """Return the pairs of labels that a strategy confuses most on the test texts, the most frequent pair first.

    Args:
        summary: the comparison.
        point: the strategy, base and budget whose decisions are counted.

    Returns:
        At most 12 pairs, each with at most 4 texts, the most frequently confused texts first.
    """
    test = summary.result.test
    names = [_name(test, np.flatnonzero(row).tolist()) for row in test.targets]
    sizes = Counter(names)
    counts: Counter[tuple[str, str]] = Counter()
    texts: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for outcome in point.outcomes:
        for row, labels in zip(outcome.test.rows, outcome.test.labels, strict=True):
            given = _name(test, labels)
            if given != names[row]:
                counts[names[row], given] += 1
                texts[names[row], given][test.texts[row]] += 1
    return [
        Confusion(
            label,
            given,
            count / point.seeds / sizes[label],
            count / point.seeds,
            tuple(text for text, _ in texts[label, given].most_common(_MOST_TEXTS)),
        )
        for (label, given), count in counts.most_common(_MOST_PAIRS)
    ]


def suspects(summary: Summary) -> list[Suspect]:
    """Return at most 40 texts whose label is probably wrong, those with the greatest share of votes first.

    Each strategy on each base votes at the largest budget, on texts that it was not fitted to: on the test texts and,
    if the budget is all texts, on held-out training texts. Zero-shot votes only if nothing else was measured. The vote
    is the label that it gives most often over its seeds. A text is suspect if it has at least two votes, more than half
    of them are for one other label, and the mean confidence of these votes is at least 0.5. As in Northcutt et al.,
    "Confident Learning", 2021, confident disagreement with the label counts, but that of several models.
    """
    points = [point for point in summary.at(summary.largest) if point.budget == summary.largest]
    parts = (("test", summary.result.test), ("train", summary.result.train))
    found = [suspect for part, examples in parts for suspect in _suspects(part, examples, points)]
    return sorted(found, key=lambda suspect: (-suspect.votes / suspect.voters, -suspect.confidence))[:_MOST_SUSPECTS]


def _suspects(part: str, examples: Examples, points: list[Point]) -> list[Suspect]:
    votes: dict[int, list[tuple[str, float]]] = defaultdict(list)
    for point in points:
        given: dict[int, list[tuple[str, float]]] = defaultdict(list)
        for outcome in point.outcomes:
            decisions: Decisions = outcome.test if part == "test" else outcome.held_out
            for row, labels, confidence in zip(decisions.rows, decisions.labels, decisions.confidence, strict=True):
                given[row].append((_name(examples, labels), confidence))
        for row, answers in given.items():
            label, _ = Counter(name for name, _ in answers).most_common(1)[0]
            votes[row].append((label, float(np.mean([c for name, c in answers if name == label]))))
    found = []
    for row, cast in votes.items():
        label = _name(examples, np.flatnonzero(examples.targets[row]).tolist())
        suggested, count = Counter(name for name, _ in cast).most_common(1)[0]
        confidence = float(np.mean([c for name, c in cast if name == suggested]))
        agreed = len(cast) > 1 and count > len(cast) / 2
        if suggested != label and agreed and confidence >= _LEAST_CONFIDENCE:
            found.append(Suspect(part, row, examples.texts[row], label, suggested, confidence, count, len(cast)))
    return found


def _name(examples: Examples, labels: list[int]) -> str:
    return ", ".join(examples.labels[label] for label in labels) or "(none)"
