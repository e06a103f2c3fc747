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
#: A label is suspect only if the classifiers that disagree with it have at least this mean confidence.
_LEAST_CONFIDENCE = 0.5


@dataclass(frozen=True)
class Confusion:
    """Test texts of one label (or set of labels) that a classifier gave another label."""

    label: str
    given: str
    #: Share of the label's test texts, in [0, 1].
    share: float
    #: Number of texts, the mean over the seeds.
    count: float
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Suspect:
    """A text whose label is probably wrong: most classifiers agree on another label."""

    #: `train` or `test`.
    part: str
    #: Index in the file, from 0.
    row: int
    text: str
    label: str
    suggested: str
    #: Mean confidence of the classifiers that suggest the label, in [0, 1].
    confidence: float
    #: Number of classifiers that suggest the label, and number of classifiers asked.
    votes: int
    voters: int


def confusions(summary: Summary, point: Point) -> list[Confusion]:
    """Return the pairs of labels that a point confuses most on the test texts, the most frequent pair first.

    Args:
        summary: the comparison.
        point: the strategy and budget to look at.

    Returns:
        At most 12 pairs, each with at most 4 texts.
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
    """Return texts whose label is probably wrong, the most certain first; at most 40.

    Each strategy votes at the largest budget, on texts that it was not fitted to: its vote is the label that it gives
    most often over its seeds. A text is suspect if more than half of the votes are for one other label, and their mean
    confidence is at least 0.5. This is disagreement with the label in confidence, as in Northcutt et al.,
    "Confident Learning", 2021, but by several models.
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
