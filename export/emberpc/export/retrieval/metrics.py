"""Measure retrieval quality: an exact search by cosine over the vectors of queries and passages."""

from __future__ import annotations

import numpy as np

from emberpc.bundle import unit
from emberpc.export.convert.onnx_runner import Matrix
from emberpc.export.retrieval.queries import Queries

#: Name of the figure by which a training chooses epoch and weights, and which shows whether the training helped. An
#: export checks variants by it, too.
DECIDING = "ndcg_at_10"
#: Number of queries whose scores, one for each candidate, are in memory at the same time.
_BLOCK = 256


def measure(
    query_vectors: Matrix, passage_vectors: Matrix, queries: Queries, candidates: np.ndarray | None = None
) -> dict[str, float]:
    """Return retrieval figures of an exact search by cosine over all candidates, as means over the queries.

    Args:
        query_vectors: float32 (queries, dimensions), of any length.
        passage_vectors: vectors of the candidates, float32 (candidates, dimensions), of any length.
        queries: at least one query, each with at least one relevant passage.
        candidates: for each row of `passage_vectors`, the index of its passage, int (candidates,), each passage once;
            default: row i is passage i. A query's own passage is left out of its ranking. Relevant passages that are no
            candidates count as not found.

    Returns:
        `ndcg_at_10`, with a gain of 1 for each relevant passage (Järvelin and Kekäläinen, "Cumulated gain-based
        evaluation of IR techniques", 2002), and `recall_at_10` and `recall_at_100`, the shares of a query's relevant
        passages that are among its first 10 and 100 candidates. All are in [0, 1].
    """
    names = np.arange(len(passage_vectors)) if candidates is None else candidates
    column = {int(name): i for i, name in enumerate(names)}
    units = unit(passage_vectors)
    gains = 1 / np.log2(np.arange(2, 12))
    totals = np.zeros(3)
    for start in range(0, len(queries), _BLOCK):
        scores = unit(query_vectors[start : start + _BLOCK]) @ units.T
        for row, known in zip(scores, range(start, start + len(scores)), strict=True):
            if (own := column.get(queries.own[known])) is not None:
                row[own] = -np.inf
            # A stable sort keeps passages with equal scores in their order, so that the order of ties is defined.
            best = names[np.argsort(-row, kind="stable")[:100]]
            relevant = queries.relevant[known]
            hits = np.array([int(name) in relevant for name in best])
            totals += (
                (hits[:10] * gains[: len(hits[:10])]).sum() / gains[: len(relevant)].sum(),
                hits[:10].sum() / len(relevant),
                hits.sum() / len(relevant),
            )
    return dict(zip((DECIDING, "recall_at_10", "recall_at_100"), (totals / len(queries)).tolist(), strict=True))
