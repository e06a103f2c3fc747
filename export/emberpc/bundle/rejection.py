"""Choose a rejection score and its threshold by texts that have a label and texts that have none of the labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from emberpc.bundle.decision import Scores
from emberpc.bundle.scope import RejectionScore

#: Minimum number of inside texts, and of outside texts, of each of the two halves that choose and measure. With fewer
#: texts, all of them do both.
_PART_TEXTS = 20
#: Default of the maximum share of inside texts that may be rejected.
MAX_FALSE_REJECTIONS = 0.05


@dataclass(frozen=True)
class Rejection:
    """A rejection score with its threshold, and its figures by name.

    `separate_texts`: whether the figures were measured on texts that chose neither the score nor the threshold.
    """

    score: RejectionScore
    threshold: float
    figures: dict[str, float]
    separate_texts: bool

    @property
    def measured_on(self) -> str:
        """Description of the texts that the error rates were measured on."""
        if self.separate_texts:
            return "held-out texts and out-of-scope texts that chose neither the rejection score nor the threshold"
        return (
            "the texts that chose the rejection score and the threshold, since there are fewer than 40 held-out or "
            "out-of-scope texts: the error rates are too low"
        )


def auroc(inside: Scores, outside: Scores) -> float:
    """Return the AUROC: the probability that an inside text has a higher score than an outside text.

    Equal scores count half.

    Args:
        inside: scores of texts that have a label, float (texts,); at least one.
        outside: scores of texts that have none of the labels, float (texts,); at least one.
    """
    ranked = np.sort(inside)
    above = len(ranked) - np.searchsorted(ranked, outside, side="right")
    equal = len(ranked) - np.searchsorted(ranked, outside, side="left") - above
    return float((above + equal / 2).mean() / len(ranked))


def quantile_threshold(inside: Scores, rate: float) -> float | None:
    """Return a threshold for inside scores, float (texts,): their quantile `rate`, in [0, 1]; None without scores."""
    return float(np.quantile(inside, rate)) if len(inside) else None


def capped_threshold(inside: Scores, outside: Scores, maximum: float) -> float:
    """Return the threshold that rejects the most outside texts while few inside texts are rejected.

    Of N inside texts, at most `maximum` * (N + 1) - 1 are rejected, and none if that is negative. Then the expected
    share of rejected texts among new inside texts is at most `maximum`, unless `maximum` is below 1 / (N + 1) (split
    conformal prediction; Vovk et al., "Algorithmic Learning in a Random World", 2005). Of the thresholds that reject
    the same outside texts, this is the middle between the last score that must be rejected and the next higher score.
    If no outside text can be rejected, it is the lowest of all scores, which rejects nothing.

    Args:
        inside: scores of texts that have a label, float (texts,); at least one.
        outside: scores of texts that have none of the labels, float (texts,); at least one.
        maximum: greatest share of rejected inside texts, in [0, 1).
    """
    ranked = np.sort(np.asarray(inside, dtype=np.float64))
    # The small number makes up for the rounding of a product such as 0.07 * 100.
    highest = ranked[max(0, int(maximum * (len(ranked) + 1) + 1e-9) - 1)]
    below = outside[outside < highest]
    if not len(below):
        return float(min(ranked[0], np.min(outside)))
    last = float(below.max())
    higher = ranked[ranked > last][0]
    middle = (last + higher) / 2
    return float(middle if last < middle < higher else higher)


def fit_rejection(
    inside: Mapping[RejectionScore, Scores],
    outside: Mapping[RejectionScore, Scores],
    max_false_rejections: float = MAX_FALSE_REJECTIONS,
    seed: int = 0,
) -> Rejection:
    """Choose the score with the best AUROC and its threshold on one half of the texts, and measure on the other half.

    With fewer than 40 inside texts or fewer than 40 outside texts, all texts choose and measure. Then the figures are
    too good. Of scores with the same AUROC, the first of `RejectionScore` is chosen.

    Args:
        inside: scores of held-out texts that have a label, by score, each float (texts,); at least one text.
        outside: scores of texts that have none of the labels, for the same keys; at least one text.
        max_false_rejections: greatest share of inside texts to reject, in [0, 1); see `capped_threshold`.
        seed: seed of the halves.

    Returns:
        The score and the threshold. The figures are `false_rejection_rate` (the share of inside texts that are
        rejected), `false_acceptance_rate` (the share of outside texts that are not), `out_of_scope_auroc` of the chosen
        score and `auroc_NAME` of each score, and the numbers of texts that they were measured on:
        `rejection_texts` and `rejection_out_of_scope_texts`.
    """
    names = [name for name in RejectionScore if name in inside]
    generator = np.random.default_rng(seed)
    rows = generator.permutation(len(inside[names[0]])), generator.permutation(len(outside[names[0]]))
    separate_texts = min(map(len, rows)) >= 2 * _PART_TEXTS
    choosing = tuple(part[::2] if separate_texts else part for part in rows)
    measuring = tuple(part[1::2] if separate_texts else part for part in rows)

    def aurocs(part: tuple[np.ndarray, ...]) -> dict[RejectionScore, float]:
        return {name: auroc(inside[name][part[0]], outside[name][part[1]]) for name in names}

    chosen = aurocs(choosing)
    best = max(names, key=chosen.__getitem__)
    threshold = capped_threshold(inside[best][choosing[0]], outside[best][choosing[1]], max_false_rejections)
    measured = aurocs(measuring)
    figures = {
        "false_rejection_rate": float((inside[best][measuring[0]] < threshold).mean()),
        "false_acceptance_rate": float((outside[best][measuring[1]] >= threshold).mean()),
        "out_of_scope_auroc": measured[best],
        **{f"auroc_{name.value}": figure for name, figure in measured.items()},
        "rejection_texts": float(len(measuring[0])),
        "rejection_out_of_scope_texts": float(len(measuring[1])),
    }
    return Rejection(best, threshold, figures, separate_texts)
