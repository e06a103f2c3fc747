"""Find pairs of duplicate records, by the cosine of their vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from emberpc.server.collections.metric import normalized, prepare
from emberpc.server.collections.types import CollectionSpec, Distance, DuplicatePair, Labels, Matrix
from emberpc.server.index.graph.neighbours import Neighbours
from emberpc.server.index.storage.store import Store

#: Maximum number of records of which each is compared with every other: 3 seconds for this many at 384 dimensions. In a
#: COSINE collection with more records, each record is searched for in the graph. Under other distances the graph's
#: scores are not cosines, so all records are compared, however many.
EXACT_LIMIT = 20_000
#: For the search of the graph for a record: number of hits besides the record itself, and ef. If a record has more
#: duplicates than that number, some pairs may be missed.
_NEIGHBOURS, _EF = 20, 200
#: Maximum number of pairs that are returned: those with the greatest scores.
MAX_PAIRS = 100_000
_READ_BATCH = 4000
#: Number of records that are searched for in the graph between two calls of `stop`.
_SEARCHED_AT_ONCE = 256
#: Maximum number of cosines (float32) that are computed at a time: 8 MB. Those of one record are always computed at
#: once.
_BLOCK = 2**21

_Pairs = tuple[Labels, Labels, Matrix]


def find_duplicates(
    spec: CollectionSpec, store: Store, neighbours: Neighbours, min_score: float, stop: Callable[[], bool]
) -> list[DuplicatePair]:
    """Find the pairs of records whose vectors have a cosine of at least `min_score`.

    Among up to 20,000 records, and in collections with another distance than COSINE, all pairs are compared. Otherwise
    each record is searched for in graph and buffer, which may miss pairs. Zero vectors are in no pair. Searches and
    writes of the collection may run meanwhile.

    Args:
        spec: the spec of the collection.
        store: the records of the collection.
        neighbours: the vectors of the collection in memory.
        min_score: minimum cosine of a pair.
        stop: whether to stop; then the pairs found so far are returned. Not called while vectors are read.

    Returns:
        The pairs, greatest score first: the best 100,000 if there are more. Afterwards, pairs with a record that is
        damaged, or was deleted or replaced meanwhile, are left out.

    Raises:
        ServiceError: the store cannot be read, or the call of this thread is cancelled.
    """
    found = _BestPairs()
    # The graph's scores are cosines only in a COSINE collection.
    if store.count() <= EXACT_LIMIT or spec.distance is not Distance.COSINE:
        parts = _compare_all(*_directions(store), min_score, stop)
    else:
        parts = _search_graph(store, neighbours, min_score, stop)
    for part in parts:
        found.add(part)
    first, second, scores = found.result()
    ids = store.ids(np.unique(np.concatenate([first, second])).tolist())
    pairs = [
        DuplicatePair(min(ids[a], ids[b]), max(ids[a], ids[b]), min(score, 1.0))
        for a, b, score in zip(first.tolist(), second.tolist(), scores.tolist(), strict=True)
        if isinstance(ids.get(a), str) and isinstance(ids.get(b), str)  # otherwise deleted meanwhile, or damaged
    ]
    return sorted(pairs, key=lambda pair: pair.order)


class _BestPairs:
    """Collects pairs of labels with scores. `result` returns each pair once, unsorted, at most the best 100,000."""

    def __init__(self) -> None:
        self._parts: list[_Pairs] = []
        self._count = 0

    def add(self, part: _Pairs) -> None:
        self._parts.append(part)
        self._count += len(part[0])
        if self._count > 2 * MAX_PAIRS:
            self._parts = [self.result()]
            self._count = len(self._parts[0][0])

    def result(self) -> _Pairs:
        if not self._parts:
            none = np.empty(0, dtype=np.int64)
            return none, none, np.empty(0, dtype=np.float32)
        first, second, scores = (np.concatenate(column) for column in zip(*self._parts, strict=True))
        # The graph is searched for both records of a pair, so the pair may have been found twice.
        once = np.unique(np.stack([first, second]), axis=1, return_index=True)[1]
        first, second, scores = first[once], second[once], scores[once]
        if len(scores) > MAX_PAIRS:
            best = np.argpartition(-scores, MAX_PAIRS)[:MAX_PAIRS]
            first, second, scores = first[best], second[best], scores[best]
        return first, second, scores


def _directions(store: Store) -> tuple[Labels, Matrix]:
    """Return labels and normalized vectors of a store's records.

    The labels are numbers in the database, int64 (n,), ascending. The vectors are float32 (n, dimensions). Damaged
    vectors and zero vectors are left out. If there are no records, the vectors have the shape (0, 1).
    """
    labels, vectors = [np.empty(0, dtype=np.int64)], []
    with store.snapshot():
        for batch, matrix in store.vector_batches(_READ_BATCH):
            kept = matrix.any(axis=1)
            labels.append(batch[kept])
            vectors.append(normalized(matrix[kept]))
    return np.concatenate(labels), np.vstack(vectors) if vectors else np.empty((0, 1), dtype=np.float32)


def _compare_all(labels: Labels, vectors: Matrix, min_score: float, stop: Callable[[], bool]) -> Iterator[_Pairs]:
    """Compare each normalized vector with all later ones; yield the pairs with at least `min_score`, until stopped.

    Yields:
        After each step some pairs, maybe none: three arrays with the label (number in the database) of the first record
        of each pair, int64 (pairs,), that of the second record, and the cosine, float32 (pairs,).
    """
    step = max(1, _BLOCK // max(1, len(labels)))
    for start in range(0, len(labels), step):
        if stop():
            return
        scores = vectors[start : start + step] @ vectors[start:].T
        rows, columns = np.nonzero(scores >= min_score)
        later = columns > rows
        rows, columns = rows[later], columns[later]
        yield labels[start + rows], labels[start + columns], scores[rows, columns]


def _search_graph(store: Store, neighbours: Neighbours, min_score: float, stop: Callable[[], bool]) -> Iterator[_Pairs]:
    """Search graph and buffer for each record; yield the pairs found with at least `min_score`, until stopped.

    Yields:
        After each step some pairs, maybe none: three arrays with the smaller label of each pair, the greater label, and
        the cosine. A pair may be yielded twice, once by the search for each of its records.
    """
    labels = store.labels()
    for start in range(0, len(labels), _SEARCHED_AT_ONCE):
        if stop():
            return
        own, vectors = store.vectors(labels[start : start + _SEARCHED_AT_ONCE].tolist())
        found = neighbours.search(prepare(vectors, Distance.COSINE), _NEIGHBOURS + 1, _EF)
        pairs = [
            (min(label, other), max(label, other), score)
            for label, candidates in zip(own.tolist(), found, strict=True)
            if candidates is not None  # the graph is too small or disconnected; searches from other records remain
            for other, score in zip(candidates.labels, candidates.scores, strict=True)
            if other != label and score >= min_score
        ]
        first, second, scores = zip(*pairs, strict=True) if pairs else ((), (), ())
        yield (
            np.array(first, dtype=np.int64),
            np.array(second, dtype=np.int64),
            np.array(scores, dtype=np.float32),
        )
