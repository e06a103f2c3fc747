"""Fusion: join a dense and a lexical ranking of the same query."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from emberpc.server.collections.types import Fusion, StoredRecord

#: Offset of reciprocal rank fusion, which is added to a rank (from 1) before its reciprocal is taken. It is that of the
#: original paper (Cormack, Clarke and Büttcher, 2009), and common since.
_RANK_OFFSET = 60

#: Scores whose difference is less than this share of the best one are equal: they differ by rounding.
_ROUNDING = 1e-6

Hits = Sequence[tuple[StoredRecord, float]]


@dataclass(frozen=True)
class ScoreLimits:
    """What is known about the scores of two rankings besides those of their hits.

    Attributes:
        dense: score of a record that is equal to the query; None: such a score does not exist, as for dot products.
        lexical: BM25 score that no text can exceed for the words of the query.
        all_lexical: whether the lexical ranking has all records with a word of the query, so that the others have the
            score 0.
    """

    dense: float | None
    lexical: float
    all_lexical: bool


def fused(
    dense: Hits, lexical: Hits, dense_weight: float, fusion: Fusion, limits: ScoreLimits
) -> list[tuple[StoredRecord, float]]:
    """Fuse two rankings.

    `BOUNDS` scales scores by their limits (Bruch, Gai and Ingber 2023, https://arxiv.org/abs/2210.11934): the last hit
    of the dense ranking becomes 0 and a record that is equal to the query 1; a BM25 score becomes its share of the
    greatest possible one. So a text with few of the words of the query has a low score, even if no other text has more
    of them. `SCORES` scales each ranking so that its best hit becomes 1 and its last one 0, or a BM25 score of 0 under
    `limits.all_lexical`. `RANKS` uses reciprocal ranks. docs/decisions/0028-hybrid-search.md compares the rules.

    Args:
        dense: hits of the dense search, best first.
        lexical: hits of the lexical search, best first.
        dense_weight: weight of `dense`, 0 to 1.
        fusion: the rule.
        limits: limits of the scores.

    Returns:
        Each record that is in one or both rankings, with its fused score, greatest first; equal scores in the order of
        ids. The fused score is the weighted sum of a record's scaled scores or reciprocal ranks; a ranking without the
        record counts 0.
    """
    if fusion is Fusion.RANKS:
        worths = [_by_rank(dense), _by_rank(lexical)]
    elif fusion is Fusion.SCORES:
        worths = [_scaled(dense), _scaled(lexical, lowest=0.0 if limits.all_lexical else None)]
    else:
        worths = [_scaled(dense, greatest=limits.dense), _scaled(lexical, lowest=0.0, greatest=limits.lexical)]
    records: dict[str, StoredRecord] = {}
    scores: dict[str, float] = {}
    for hits, worth, weight in zip((dense, lexical), worths, (dense_weight, 1 - dense_weight), strict=True):
        for (record, _), each in zip(hits, worth, strict=True):
            records[record.id] = record
            scores[record.id] = scores.get(record.id, 0.0) + weight * each
    return [(records[key], score) for key, score in sorted(scores.items(), key=lambda item: (-item[1], item[0]))]


def _by_rank(hits: Hits) -> list[float]:
    return [1 / (_RANK_OFFSET + rank) for rank in range(1, len(hits) + 1)]


def _scaled(hits: Hits, *, lowest: float | None = None, greatest: float | None = None) -> list[float]:
    """Return the scores of hits, best first, scaled linearly: the score `lowest` becomes 0, and `greatest` 1.

    If `lowest` is None, the score of the last hit becomes 0. If `greatest` is None, or less than the best score because
    of rounding, the best score becomes 1. All are 1 if the two differ by rounding only.
    """
    if not hits:
        return []
    low = hits[-1][1] if lowest is None else lowest
    best = hits[0][1] if greatest is None else max(greatest, hits[0][1])
    if best - low <= _ROUNDING * abs(best):
        return [1.0] * len(hits)
    return [(score - low) / (best - low) for _, score in hits]
