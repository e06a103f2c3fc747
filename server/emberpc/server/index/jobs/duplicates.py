"""Pairs of duplicate records, by the cosine of their vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from emberpc.server.collections.metric import prepare
from emberpc.server.collections.types import CollectionSpec, Distance, DuplicatePair, Labels, Matrix
from emberpc.server.index.graph.neighbours import Neighbours
from emberpc.server.index.storage.store import Store

#: Up to this many records, each is compared with every other: 3 seconds at 384 dimensions. Beyond that, each is
#: searched for in the graph, if the graph's scores are cosines.
EXACT_LIMIT = 20_000
#: For the search of the graph: number of hits besides the record itself, and ef. If a record has more duplicates than
#: that, only a part of them is found.
_NEIGHBOURS, _EF = 20, 200
#: Limit of the pairs that are returned, those with the greatest scores.
MOST_PAIRS = 100_000
_READ_BATCH = 4000
#: Records that are searched for between two checks of `stop`.
_SEARCHED_AT_ONCE = 256
#: Products (float32) that are computed at a time: 8 MB.
_BLOCK = 2**21

_Pairs = tuple[Labels, Labels, Matrix]


def find_duplicates(
    spec: CollectionSpec, store: Store, neighbours: Neighbours, min_score: float, stop: Callable[[], bool]
) -> list[DuplicatePair]:
    """Return the pairs with at least `min_score`, the greatest score first, at most 100,000.

    Holds no lock for longer than a search does. If stopped, returns the pairs found so far.
    """
    found = _BestPairs()
    # Without cosines in the graph, the exact comparison is the only way.
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
    """Keeps the pairs with the greatest scores."""

    def __init__(self) -> None:
        self._parts: list[_Pairs] = []
        self._count = 0

    def add(self, part: _Pairs) -> None:
        self._parts.append(part)
        self._count += len(part[0])
        if self._count > 2 * MOST_PAIRS:
            self._parts = [self.result()]
            self._count = len(self._parts[0][0])

    def result(self) -> _Pairs:
        if not self._parts:
            none = np.empty(0, dtype=np.int64)
            return none, none, np.empty(0, dtype=np.float32)
        first, second, scores = (np.concatenate(column) for column in zip(*self._parts, strict=True))
        # A search from each of both records may find the same pair.
        once = np.unique(np.stack([first, second]), axis=1, return_index=True)[1]
        first, second, scores = first[once], second[once], scores[once]
        if len(scores) > MOST_PAIRS:
            best = np.argpartition(-scores, MOST_PAIRS)[:MOST_PAIRS]
            first, second, scores = first[best], second[best], scores[best]
        return first, second, scores


def _directions(store: Store) -> tuple[Labels, Matrix]:
    """Return all vectors that are not zero, scaled to length 1, with their labels."""
    labels, vectors = [np.empty(0, dtype=np.int64)], []
    with store.snapshot():
        for batch, matrix in store.scan(_READ_BATCH):
            kept = np.linalg.norm(matrix, axis=1) > 0
            labels.append(batch[kept])
            vectors.append(prepare(matrix[kept], Distance.COSINE))
    return np.concatenate(labels), np.vstack(vectors) if vectors else np.empty((0, 1), dtype=np.float32)


def _compare_all(labels: Labels, vectors: Matrix, min_score: float, stop: Callable[[], bool]) -> Iterator[_Pairs]:
    """Compare every vector with every later one."""
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
    """Search the graph for each vector."""
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
