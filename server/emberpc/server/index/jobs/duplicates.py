"""Pairs of records that are much alike, by the cosine of their vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from emberpc.server.collections.metric import prepare
from emberpc.server.collections.types import CollectionSpec, Distance, DuplicatePair, Labels, Matrix
from emberpc.server.index.graph.neighbours import Neighbours
from emberpc.server.index.storage.store import Store

#: Up to so many records each is compared with every other: 3 seconds at 384 dimensions. Beyond, where the graph has
#: cosines, each is looked for in it.
EXACT_LIMIT = 20_000
#: Others of a record that the graph is asked for, and the candidates kept: a group of more is found in part.
_NEIGHBOURS, _EF = 20, 200
#: Most pairs that are kept, the most alike.
MOST_PAIRS = 100_000
_READ_BATCH = 4000
#: Searched for between two looks at whether to stop.
_LOOKED_FOR = 256
#: Products of one block: 8 MB.
_BLOCK = 2**21

_Pairs = tuple[Labels, Labels, Matrix]


def find_duplicates(
    spec: CollectionSpec, store: Store, neighbours: Neighbours, min_score: float, stop: Callable[[], bool]
) -> list[DuplicatePair]:
    """Return the pairs at least so much alike, most alike first, at most 100,000.

    Takes no lock for longer than a search does. Ends early, with what was found, when it is to stop.
    """
    found = _Best()
    # Where the graph's scores are no cosines, there is but one way.
    if store.count() <= EXACT_LIMIT or spec.distance is not Distance.COSINE:
        parts = _compared(*_directions(store), min_score, stop)
    else:
        parts = _looked_for(store, neighbours, min_score, stop)
    for part in parts:
        found.add(part)
    first, second, scores = found.result()
    ids = store.ids(np.unique(np.concatenate([first, second])).tolist())
    pairs = [
        DuplicatePair(min(ids[a], ids[b]), max(ids[a], ids[b]), min(score, 1.0))
        for a, b, score in zip(first.tolist(), second.tolist(), scores.tolist(), strict=True)
        if isinstance(ids.get(a), str) and isinstance(ids.get(b), str)  # else deleted meanwhile, or damaged
    ]
    return sorted(pairs, key=lambda pair: pair.order)


class _Best:
    """The most alike of the pairs that were added."""

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
        # Looked for from both sides, a pair may be found twice.
        once = np.unique(np.stack([first, second]), axis=1, return_index=True)[1]
        first, second, scores = first[once], second[once], scores[once]
        if len(scores) > MOST_PAIRS:
            best = np.argpartition(-scores, MOST_PAIRS)[:MOST_PAIRS]
            first, second, scores = first[best], second[best], scores[best]
        return first, second, scores


def _directions(store: Store) -> tuple[Labels, Matrix]:
    """Return all vectors of a direction, of length 1, with their labels."""
    labels, vectors = [np.empty(0, dtype=np.int64)], []
    with store.snapshot():
        for batch, matrix in store.scan(_READ_BATCH):
            kept = np.linalg.norm(matrix, axis=1) > 0
            labels.append(batch[kept])
            vectors.append(prepare(matrix[kept], Distance.COSINE))
    return np.concatenate(labels), np.vstack(vectors) if vectors else np.empty((0, 1), dtype=np.float32)


def _compared(labels: Labels, vectors: Matrix, min_score: float, stop: Callable[[], bool]) -> Iterator[_Pairs]:
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


def _looked_for(store: Store, neighbours: Neighbours, min_score: float, stop: Callable[[], bool]) -> Iterator[_Pairs]:
    """Search for each vector."""
    labels = store.labels()
    for start in range(0, len(labels), _LOOKED_FOR):
        if stop():
            return
        own, vectors = store.vectors(labels[start : start + _LOOKED_FOR].tolist())
        found = neighbours.search(prepare(vectors, Distance.COSINE), _NEIGHBOURS + 1, _EF)
        pairs = [
            (min(label, other), max(label, other), score)
            for label, candidates in zip(own.tolist(), found, strict=True)
            if candidates is not None  # the graph is small or shattered; those around it find what there is
            for other, score in zip(candidates.labels, candidates.scores, strict=True)
            if other != label and score >= min_score
        ]
        first, second, scores = zip(*pairs, strict=True) if pairs else ((), (), ())
        yield (
            np.array(first, dtype=np.int64),
            np.array(second, dtype=np.int64),
            np.array(scores, dtype=np.float32),
        )
