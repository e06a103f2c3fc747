"""Find problems in the data: labels that are confused with each other, and texts whose label is probably wrong."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from typing import NamedTuple

import numpy as np

from emberpc.export.compare.outcomes import Decisions
from emberpc.export.compare.summary import Point, Summary
from emberpc.export.data.examples import Examples

#: Stands for no label.
_NONE = "(none)"
_MAX_PAIRS = 12
_MAX_TEXTS = 4
_MAX_SUSPECTS = 40
#: Minimum probability, in [0, 1], that the label of a listed text is wrong.
_MIN_PROBABILITY = 0.5
#: Limits of confidence, in [0, 1]. Disagreement from the first limit on and below the second one is mostly an error of
#: the strategy. From the second limit on it may show a wrong label; texts from the third limit on are a group of their
#: own.
_CONFIDENCES = (0.7, 0.9, 0.97)
#: Share of wrong labels that is expected among confident disagreements, and its weight as a number of texts. With
#: wrong labels put into four data sets, the probabilities that result are about right
#: (docs/decisions/measurements/0024).
_PRIOR_SHARE, _PRIOR_TEXTS = 0.2, 10.0
#: Minimum difference of the rates at which the words agree with right and with wrong suggestions.
_MIN_CONTRAST = 0.2


@dataclass(frozen=True)
class Confusion:
    """Test texts of one label that a classifier gave another label.

    `label` is the right label, `given` the classifier's. If the texts may have several labels, `label` is one that the
    classifier missed, and `given` is one that it gave although the text does not have it; `(none)` if it gave no wrong
    label. `texts` are some of the texts.
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
    """A text whose label `label` is probably wrong; `suggested` is probably right."""

    #: The file that has the text: `train` or `test`.
    part: str
    #: Index of the text in its file, from 0.
    row: int
    text: str
    label: str
    suggested: str
    #: Confidence in [0, 1] with which the best strategy suggests `suggested`.
    confidence: float
    #: Estimated probability in [0, 1] that `label` is wrong.
    probability: float


def confusions(summary: Summary, point: Point) -> list[Confusion]:
    """Return the pairs of labels that a strategy confuses most on the test texts, the most frequent pair first.

    If the texts may have several labels, a text counts for each pair of a missed label and a wrongly given one. A label
    that is wrongly given, while none is missed, is in no pair.

    Args:
        summary: the comparison.
        point: the strategy, base encoder and budget whose decisions are counted.

    Returns:
        At most 12 pairs, each with at most 4 texts, the most frequently confused texts first.
    """
    test = summary.result.test
    sizes = dict(zip(test.labels, test.targets.sum(axis=0).tolist(), strict=True))
    counts: Counter[tuple[str, str]] = Counter()
    texts: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for outcome in point.outcomes:
        for row, labels in zip(outcome.test.rows, outcome.test.labels, strict=True):
            own, given = set(np.flatnonzero(test.targets[row]).tolist()), set(labels)
            instead = [test.labels[label] for label in sorted(given - own)] or [_NONE]
            for missed in sorted(own - given):
                for wrong in instead:
                    pair = test.labels[missed], wrong
                    counts[pair] += 1
                    texts[pair][test.texts[row]] += 1
    return [
        Confusion(
            label,
            given,
            count / point.seeds / sizes[label],
            count / point.seeds,
            tuple(text for text, _ in texts[label, given].most_common(_MAX_TEXTS)),
        )
        for (label, given), count in counts.most_common(_MAX_PAIRS)
    ]


def suspects(summary: Summary) -> list[Suspect]:
    """Return at most 40 texts whose label is wrong with a probability of at least 0.5, the most probable first.

    The evidence is of two kinds: the best strategy that uses the encoder, and the words alone (the strategy tf-idf).
    Both decide on texts that they were not trained on: the test texts and, if the largest budget is all texts, held-out
    training texts. Only texts are considered to which the first gives another label with a confidence of at least 0.9.
    `_probability` estimates how many of these labels are wrong. Strategies on one encoder share their errors, so their
    agreement alone proves nothing. The list is empty if one of the two kinds was not measured with the largest budget.
    """
    strong = max(filter(None, (summary.tuned, summary.frozen)), key=lambda point: point.score.value, default=None)
    # The strategy uses no encoder, so its decisions are the same for each base.
    lexical = next((point for point in summary.at(summary.largest) if point.way.strategy == "tf-idf"), None)
    if strong is None or lexical is None:
        return []
    frozen = summary.frozen or strong
    parts = (("test", summary.result.test), ("train", summary.result.train))
    votes = [
        vote
        for part, examples in parts
        for vote in _votes(
            part, examples, _decisions(part, frozen) | _decisions(part, strong), _decisions(part, lexical)
        )
    ]
    minimum, between, maximum = _CONFIDENCES
    doubtful = [vote for vote in votes if minimum <= vote.suspect.confidence < between]
    found = []
    for low, high in ((between, maximum), (maximum, 1.1)):
        group = [vote for vote in votes if low <= vote.suspect.confidence < high]
        probability = _probability(group, doubtful)
        found += [
            replace(vote.suspect, probability=probability) for vote in group if vote.disagrees and vote.words_agree
        ]
    kept = [suspect for suspect in found if suspect.probability >= _MIN_PROBABILITY]
    return sorted(kept, key=lambda suspect: (-suspect.probability, -suspect.confidence))[:_MAX_SUSPECTS]


class _Vote(NamedTuple):
    """What the two kinds of evidence say about the label of one text; the probability in `suspect` is not set yet."""

    suspect: Suspect
    #: Whether the encoder suggests another label.
    disagrees: bool
    #: Whether the words alone suggest the same label as the encoder.
    words_agree: bool


def _probability(group: Sequence[_Vote], doubtful: Sequence[_Vote]) -> float:
    """Estimate the probability that a label is wrong if encoder and words agree on another one.

    The words agree with a right suggestion as often as they do where the label is the suggested one, and with a wrong
    suggestion as often as they do where the encoder disagrees with the label at a low confidence: these are mostly
    errors of the encoder. The rate at which they agree with the suggestions of `group` shows the share of right ones
    among these (a mixture of two rates). With few texts this share is uncertain, so two of the rates are taken one
    standard error less favourable, and the share is drawn towards 0.2 with the weight of 10 texts: the probability is
    rather too low. Then Bayes' rule gives the probability for texts on which the words agree. It is 0 if the rates with
    right and wrong suggestions differ by less than 0.2: the words then say little.

    Args:
        group: votes of similar confidence.
        doubtful: votes of low confidence.
    """
    disagreeing = [vote.words_agree for vote in group if vote.disagrees]
    agreeing = [vote.words_agree for vote in group if not vote.disagrees]
    errors = [vote.words_agree for vote in doubtful if vote.disagrees]
    if not (disagreeing and agreeing and errors):
        return 0.0
    if_right, if_wrong, rate = (sum(each) / len(each) for each in (agreeing, errors, disagreeing))
    if_wrong += sqrt(if_wrong * (1 - if_wrong) / len(errors))
    rate -= sqrt(rate * (1 - rate) / len(disagreeing))
    if if_right - if_wrong < _MIN_CONTRAST:
        return 0.0
    share = max(0.0, min(1.0, (rate - if_wrong) / (if_right - if_wrong)))
    share = (share * len(disagreeing) + _PRIOR_SHARE * _PRIOR_TEXTS) / (len(disagreeing) + _PRIOR_TEXTS)
    return share * if_right / (share * if_right + (1 - share) * if_wrong)


def _decisions(part: str, point: Point) -> dict[int, tuple[list[int], float]]:
    """Return the labels and the confidence by row, of the first seed."""
    decisions: Decisions = point.outcomes[0].test if part == "test" else point.outcomes[0].held_out
    return {
        row: (labels, confidence)
        for row, labels, confidence in zip(decisions.rows, decisions.labels, decisions.confidence, strict=True)
    }


def _votes(
    part: str,
    examples: Examples,
    encoder: Mapping[int, tuple[list[int], float]],
    words: Mapping[int, tuple[list[int], float]],
) -> Iterator[_Vote]:
    for row, (labels, confidence) in encoder.items():
        if row in words:
            own = np.flatnonzero(examples.targets[row]).tolist()
            suspect = Suspect(
                part, row, examples.texts[row], _name(examples, own), _name(examples, labels), confidence, 0.0
            )
            yield _Vote(suspect, own != labels, words[row][0] == labels)


def _name(examples: Examples, labels: list[int]) -> str:
    return ", ".join(examples.labels[label] for label in labels) or _NONE
