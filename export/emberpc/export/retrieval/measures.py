"""How well passages are found by the vectors of queries and passages, searched exactly."""

from __future__ import annotations

import numpy as np

from emberpc.bundle import unit
from emberpc.export.linear import Matrix
from emberpc.export.retrieval.data import Queries

#: What decides between models.
DECIDING = "ndcg_at_10"
#: Queries whose scores are in memory at once.
_BLOCK = 256


def measure(asked: Matrix, found: Matrix, queries: Queries, candidates: np.ndarray | None = None) -> dict[str, float]:
    """Measure a search by cosine among all candidates; means over the queries.

    Args:
        asked: the queries' vectors, float32 (queries, dimensions).
        found: the candidates' vectors, float32 (candidates, dimensions).
        queries: what answers them.
        candidates: which passage each candidate is, int (candidates,); default: all passages in their order.

    Returns:
        `ndcg_at_10`, with a gain of 1 for each passage that is relevant (Järvelin and Kekäläinen, "Cumulated
        gain-based evaluation of IR techniques", 2002), and `recall_at_10` and `recall_at_100`, the share of the
        relevant passages among the first.
    """
    names = np.arange(len(found)) if candidates is None else candidates
    column = {int(name): i for i, name in enumerate(names)}
    units = unit(found)
    gains = 1 / np.log2(np.arange(2, 12))
    totals = np.zeros(3)
    for start in range(0, len(queries), _BLOCK):
        scores = unit(asked[start : start + _BLOCK]) @ units.T
        for row, known in zip(scores, range(start, start + len(scores)), strict=True):
            if (own := column.get(queries.own[known])) is not None:
                row[own] = -np.inf
            # Stable: of equal scores, the first passage is first on every host.
            best = names[np.argsort(-row, kind="stable")[:100]]
            relevant = queries.relevant[known]
            hits = np.array([int(name) in relevant for name in best])
            totals += (
                (hits[:10] * gains[: len(hits[:10])]).sum() / gains[: len(relevant)].sum(),
                hits[:10].sum() / len(relevant),
                hits.sum() / len(relevant),
            )
    return dict(zip((DECIDING, "recall_at_10", "recall_at_100"), (totals / len(queries)).tolist(), strict=True))
