"""Mine hard negatives with an HNSW graph: passages that are near a query and do not answer it."""

from __future__ import annotations

from collections.abc import Sequence

import hnswlib
import numpy as np

from emberpc.bundle import unit
from emberpc.export.convert.onnx_runner import Matrix
from emberpc.export.errors import ExportError
from emberpc.export.retrieval.queries import Queries

#: Parameters of the HNSW graph, hnswlib's defaults. A graph serves one pass over the queries, so tuning these would not
#: pay.
_M, _EF_CONSTRUCTION = 16, 200
#: Number of passages nearest to a query from which its negatives are picked. `mine` searches for more, since it skips
#: known answers.
_NEAREST = 50
#: A negative's cosine to the query must be below this share of the nearest known answer's (Moreira et al.,
#: "NV-Retriever", 2024, found 0.95 to be the best). A passage that is nearer may be an unmarked answer.
_MARGIN = 0.95


class PassageGraph:
    """An HNSW graph of passages, to be searched by cosine. Vectors are checked, since hnswlib crashes on bad ones.

    Args:
        vectors: vectors of the passages, float32 (passages, dimensions), of any length.

    Raises:
        ExportError: there are no passages, or a vector is not finite.
    """

    def __init__(self, vectors: Matrix) -> None:
        self._units = _checked(vectors)
        self._index = hnswlib.Index(space="ip", dim=self._units.shape[1])
        self._index.init_index(len(self._units), M=_M, ef_construction=_EF_CONSTRUCTION, random_seed=0)
        # Use one thread: with several, hnswlib would build different graphs from the same vectors at different runs.
        self._index.add_items(self._units, np.arange(len(self._units)), num_threads=1)

    def nearest(self, queries: Matrix, count: int) -> tuple[np.ndarray, Matrix]:
        """Return the passages nearest to each query, the nearest first.

        The search is exact if `count` is more than half of the number of passages, and approximate otherwise.

        Args:
            queries: float32 (queries, dimensions), of any length.
            count: number of passages to find for each query; at least 1.

        Returns:
            Indexes of passages, int64 (queries, n), and their cosines, float32 (queries, n), where n is the smaller of
            `count` and the number of passages.

        Raises:
            ExportError: there are no queries, or a vector is not finite.
            ValueError: dimensions differ from those of the passages, or `count` is below 1.
        """
        units = _checked(queries)
        if units.shape[1] != self._units.shape[1] or count < 1:
            raise ValueError(f"queries of shape {units.shape}, count {count}, passages of shape {self._units.shape}")
        if 2 * count > len(self._units):
            # Search exactly if more than half of the passages are wanted: hnswlib raises and leaks memory if the links
            # of the graph reach fewer passages than wanted.
            scores = units @ self._units.T
            best = np.argsort(-scores, axis=1, kind="stable")[:, :count]
            return best, np.take_along_axis(scores, best, axis=1)
        self._index.set_ef(4 * count)
        labels, distances = self._index.knn_query(units, k=count, num_threads=1)
        return labels.astype(np.int64), np.asarray(1 - distances, dtype=np.float32)


def mine(
    query_vectors: Matrix, passage_vectors: Matrix, queries: Queries, count: int, minable: Sequence[int] | None = None
) -> list[list[int]]:
    """Return hard negatives of each query: passages near it that are not known to answer it, the nearest first.

    Passages whose cosine is at least the nearest known answer's less 5 % are left out: they may be answers, too.

    Args:
        query_vectors: float32 (queries, dimensions), of any length.
        passage_vectors: float32 (passages, dimensions), of any length.
        queries: the queries, each with at least one relevant passage. A query's relevant passages and its own passage
            are never returned for it.
        count: maximum number of negatives for each query; fewer are returned if fewer of the nearest 50 to 100 passages
            are suitable. 0: none.
        minable: indexes of the passages to choose from; default: all passages.

    Returns:
        Indexes of passages for each query.

    Raises:
        ExportError: there are no passages to choose from, or a vector is not finite.
        ValueError: the dimensions of queries and passages differ.
    """
    if not count:
        return [[] for _ in range(len(queries))]
    # A query's relevant passages and its own passage are mostly near the query, and are skipped below. So search for
    # `_NEAREST` passages and as many more as are skipped for a query at most, but for no more than twice `_NEAREST`.
    maximum = max(len(known) for known in queries.relevant) + 1
    rows = np.arange(len(passage_vectors)) if minable is None else np.array(minable, dtype=np.int64)
    best, scores = PassageGraph(passage_vectors[rows]).nearest(
        query_vectors, min(len(rows), _NEAREST + min(maximum, _NEAREST))
    )
    best = rows[best]
    passage_units, query_units = unit(passage_vectors), unit(query_vectors)
    mined = []
    for row, (nearest, near) in enumerate(zip(best, scores, strict=True)):
        known = queries.relevant[row]
        answer = float((passage_units[sorted(known)] @ query_units[row]).max())
        limit = answer - (1 - _MARGIN) * abs(answer)
        excluded = known | {queries.own[row]}
        kept = [int(i) for i, score in zip(nearest, near, strict=True) if score < limit and int(i) not in excluded]
        mined.append(kept[:count])
    return mined


def _checked(vectors: Matrix) -> Matrix:
    """Return vectors scaled to length 1; raise ExportError if there are no vectors or a vector is not finite.

    `vectors` does not change.
    """
    if vectors.ndim != 2 or not vectors.size:
        raise ExportError("there are no vectors to search; give at least one passage")
    if not np.isfinite(vectors).all():
        raise ExportError("the encoder returns vectors that are not finite; choose another encoder")
    return np.ascontiguousarray(unit(vectors), dtype=np.float32)
