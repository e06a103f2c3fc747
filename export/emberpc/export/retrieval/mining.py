"""Hard negatives: passages near a query that do not answer it, found by an HNSW index."""

from __future__ import annotations

from collections.abc import Sequence

import hnswlib
import numpy as np

from emberpc.bundle import unit
from emberpc.export.errors import ExportError
from emberpc.export.linear import Matrix
from emberpc.export.retrieval.data import Queries

#: hnswlib's own usual parameters; the index serves one pass of queries.
_M, _EF_CONSTRUCTION = 16, 200
#: Nearest passages that negatives are picked from.
_NEAREST = 50
#: A passage nearly as near as the best known answer may well be one that nobody marked: what is kept is below this
#: share of the answer's cosine (Moreira et al., "NV-Retriever", 2024, found 0.95 the best).
_MARGIN = 0.95


class Neighbours:
    """An HNSW index over passages by cosine; it guards hnswlib, which crashes on what it does not check.

    Args:
        vectors: the passages', float32 (passages, dimensions).

    Raises:
        ExportError: there are none, or they are not finite numbers.
    """

    def __init__(self, vectors: Matrix) -> None:
        self._units = _checked(vectors)
        self._index = hnswlib.Index(space="ip", dim=self._units.shape[1])
        self._index.init_index(len(self._units), M=_M, ef_construction=_EF_CONSTRUCTION, random_seed=0)
        # With one thread, the same vectors give the same graph.
        self._index.add_items(self._units, np.arange(len(self._units)), num_threads=1)

    def nearest(self, queries: Matrix, count: int) -> tuple[np.ndarray, Matrix]:
        """Return the nearest passages' indexes, int64 (queries, n), and cosines, float32; n is `count` or all of them.

        Args:
            queries: float32 (queries, dimensions).
            count: how many to find; at least 1.
        """
        units = _checked(queries)
        if units.shape[1] != self._units.shape[1] or count < 1:
            raise ValueError(f"{units.shape} queries, {count} wanted, {self._units.shape} passages")
        if 2 * count > len(self._units):
            # Most of them: hnswlib raises, and leaks, if its links do not lead to as many.
            scores = units @ self._units.T
            best = np.argsort(-scores, axis=1, kind="stable")[:, :count]
            return best, np.take_along_axis(scores, best, axis=1)
        self._index.set_ef(4 * count)
        labels, distances = self._index.knn_query(units, k=count, num_threads=1)
        return labels.astype(np.int64), np.asarray(1 - distances, dtype=np.float32)


def mine(
    asked: Matrix, found: Matrix, queries: Queries, count: int, minable: Sequence[int] | None = None
) -> list[list[int]]:
    """Find hard negatives for each query, the nearest first.

    Args:
        asked: the queries' vectors, float32 (queries, dimensions).
        found: the passages', float32 (passages, dimensions).
        queries: what is known to answer them; none of it, nor the query itself, is given.
        count: how many are wanted for each; fewer are given if fewer are near.
        minable: indexes of the passages to choose from; default: all.

    Returns:
        Indexes of passages for each query.
    """
    if not count:
        return [[] for _ in range(len(queries))]
    # What answers a query is mostly near it, and is passed over.
    most = max(len(known) for known in queries.relevant) + 1
    rows = np.arange(len(found)) if minable is None else np.array(minable, dtype=np.int64)
    best, scores = Neighbours(found[rows]).nearest(asked, min(len(rows), _NEAREST + min(most, _NEAREST)))
    best = rows[best]
    units, asked_units = unit(found), unit(asked)
    mined = []
    for row, (nearest, near) in enumerate(zip(best, scores, strict=True)):
        known = queries.relevant[row]
        answer = float((units[sorted(known)] @ asked_units[row]).max())
        limit = answer - (1 - _MARGIN) * abs(answer)
        passed = known | {queries.own[row]}
        kept = [int(i) for i, score in zip(nearest, near, strict=True) if score < limit and int(i) not in passed]
        mined.append(kept[:count])
    return mined


def _checked(vectors: Matrix) -> Matrix:
    """Return vectors of length 1 that hnswlib can take without harm."""
    if vectors.ndim != 2 or not vectors.size:
        raise ExportError("there are no vectors to search; give passages")
    if not np.isfinite(vectors).all():
        raise ExportError("the encoder gives vectors that are no finite numbers; choose another one")
    return np.ascontiguousarray(unit(vectors), dtype=np.float32)
