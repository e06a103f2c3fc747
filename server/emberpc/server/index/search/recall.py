"""Measurement of the recall of graph searches at several values of ef.

The queries are a sample of the distinct vectors, each moved by noise of several lengths. They are searched for in the
graph, and compared with every vector. For each k and ef the least recall over all lengths of noise is saved in the
collection's folder. The recall is measured again when the graph has grown by half, or is new.
"""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from emberpc.server.collections.metric import nearest, prepare
from emberpc.server.collections.types import Distance, Matrix
from emberpc.server.index.graph.neighbours import Neighbours
from emberpc.server.index.storage.files import sync_to_disk
from emberpc.server.index.storage.store import Store

log = logging.getLogger(__name__)

#: Fewest vectors in a graph that is measured. Comparing fewer vectors than this is as fast as a graph search.
MIN_SIZE = 1000
#: A graph is measured again when its number of vectors is this many times the number at the last measurement.
_GROWTH = 1.5
#: Pairs of the length of the noise, as a multiple of the vector's length, and the number of queries with this noise.
#: Queries with the first noise have a cosine of 0.7 to the record, like questions to the texts that answer them. Those
#: with the other two are like nearly equal texts, which are easier to find, except among vectors in a narrow cone.
_NOISES = ((1.0, 128), (0.2, 48), (0.04, 48))
#: Values of k and of ef that are measured.
_SIZES = (10, 100)
_EFS = (25, 50, 100, 150, 200, 300, 400, 600, 800, 1200, 1600, 2400)
#: Recall from which greater values of ef are not tried. A search with about this `min_recall`, or more, may be exact.
_ENOUGH = 0.9995
#: Queries that a measurement searches for in one call, a few milliseconds. Searches of callers may wait meanwhile.
_TURN = 4
#: Part of the tolerated loss of recall that is kept as a reserve, since a sample has errors: for a recall of 0.98 an ef
#: is chosen with a measured recall of 0.985.
_RESERVE = 0.25
#: Stored vectors that are read and compared at a time.
_SCAN_BATCH = 2000
_NAME = "recall.json"
#: Formats of `recall.json` that are read: the one that is written, and the older one, which has no checksum.
_FORMAT = 2
_UNCHECKED_FORMAT = 1
#: Greatest k and ef that a valid `recall.json` may contain.
_MOST_K, _MOST_EF = 10_000, 1_000_000


@dataclass(frozen=True)
class Point:
    """One measurement: the share of the true `k` nearest vectors that a graph search with `ef` candidates found."""

    k: int
    ef: int
    recall: float


@dataclass(frozen=True)
class RecallMap:
    """Measurements of a graph that held `size` vectors; no points: it had too few, or only strays and short vectors."""

    size: int
    points: tuple[Point, ...]

    def outgrown(self, size: int) -> bool:
        """Return whether a graph that now has `size` vectors must be measured again: it has grown by half or more."""
        return size >= _GROWTH * self.size

    def ef(self, k: int, recall: float) -> int | None:
        """Return the least ef that finds the share `recall` of the true `k` nearest vectors, with a reserve.

        None if no measured ef does, or nothing was measured.
        """
        measured = sorted({point.k for point in self.points})
        if not measured:
            return None
        # The next greater measured k is used: fewer hits are not harder to find. Beyond the greatest measured k, ef
        # grows in proportion to k.
        nearest_size = next((size for size in measured if size >= k), measured[-1])
        wanted = recall + _RESERVE * (1 - recall)
        fitting = [point.ef for point in self.points if point.k == nearest_size and point.recall >= wanted]
        return max(k, -(-min(fitting) * max(k, nearest_size) // nearest_size)) if fitting else None


def measure(store: Store, neighbours: Neighbours, distance: Distance, stop: Callable[[], bool]) -> RecallMap | None:
    """Measure the recall of a collection's graph while searches and writes continue.

    A measurement takes about two seconds at 100,000 vectors, most of them for reading the vectors.

    Args:
        store: the records of the collection.
        neighbours: the graph, and the other vectors in memory.
        distance: the distance of the collection.
        stop: whether to stop; called before each batch of vectors or queries.

    Returns:
        The measurements, without points if no vector can be a query; None if stopped, or if the graph fails.
    """
    size = neighbours.graph_size
    queries = _queries(store, neighbours, distance)
    if not len(queries[0]):
        return RecallMap(size, ())
    truth = _best_scores(store, np.vstack(queries), distance, stop)
    if truth is None:
        return None
    points: list[Point] = []
    for k in _SIZES:
        kinds = list(zip(queries, np.split(truth, np.cumsum([len(each) for each in queries])[:-1]), strict=True))
        for ef in _EFS:
            if ef < k or 2 * k > size:
                continue
            found = [_recall(neighbours, *kind, k, ef, stop) for kind in kinds]
            recalls = [each for each in found if each is not None]
            if len(recalls) < len(found):
                return None
            points.append(Point(k, ef, min(recalls)))
            # Queries that find enough are not tried with a greater ef, which finds at least as much.
            kinds = [kind for kind, each in zip(kinds, recalls, strict=True) if each < _ENOUGH]
            if not kinds:
                break
    return RecallMap(size, tuple(points))


def save(measured: RecallMap, folder: Path) -> None:
    """Save measurements in a collection's folder, as `recall.json`.

    An error of the file system is only logged; the file of an earlier measurement then stays.
    """
    temporary = folder / f"{_NAME}.tmp"
    try:
        values = {"format": _FORMAT, **asdict(measured)}
        temporary.write_text(json.dumps({**values, "checksum": _checksum(values)}), encoding="utf-8")
        sync_to_disk(temporary)
        temporary.rename(folder / _NAME)
    except OSError as error:
        log.warning("%s: not kept: %s", folder / _NAME, error)
        temporary.unlink(missing_ok=True)


def load(folder: Path) -> RecallMap | None:
    """Return the measurements saved in a collection's folder; None if there are none, or their format is unknown.

    None too if they are damaged or cannot be read, which is logged.
    """
    try:
        document = json.loads((folder / _NAME).read_text(encoding="utf-8"))
        if document["format"] not in (_FORMAT, _UNCHECKED_FORMAT):
            return None
        _check_sum(document)
        points = tuple(Point(each["k"], each["ef"], each["recall"]) for each in document["points"])
        _check(document["size"], points)
        return RecallMap(document["size"], points)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        log.warning("%s is set aside and measured again: %s", folder / _NAME, str(error) or type(error).__name__)
        return None


def _check(size: object, points: tuple[Point, ...]) -> None:
    """Raise ValueError unless a measurement could give this number of vectors and these points."""
    if type(size) is not int or size < 0:
        raise ValueError(f"its size is {size}, not a number of vectors")
    for k, ef, recall in map(astuple, points):
        if type(k) is not int or type(ef) is not int or not 1 <= k <= _MOST_K or not k <= ef <= _MOST_EF:
            raise ValueError(f"it has a measurement with k {k} and ef {ef}")
        if type(recall) not in (int, float) or not 0 <= recall <= 1:  # true for NaN too
            raise ValueError(f"it has a recall of {recall}, which is not within 0 to 1")


def _check_sum(document: dict[str, Any]) -> None:
    """Remove the checksum from the values of `recall.json`; raise ValueError if the checksum is wrong.

    A document of format 1 has no checksum.
    """
    if document.pop("checksum", None) != _checksum(document) and document["format"] != _UNCHECKED_FORMAT:
        raise ValueError("its values are not those that were written")


def _checksum(values: dict[str, Any]) -> int:
    """Return the CRC-32 of values as JSON with sorted keys."""
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def _queries(store: Store, neighbours: Neighbours, distance: Distance) -> list[Matrix]:
    """Return prepared queries for each pair of `_NOISES`: a sample of the stored vectors, moved by noise of its length.

    The sample has at most one of several equal or nearly equal vectors: with a small ef a graph may find many copies of
    one text, but other records only with a large ef.
    """
    labels = np.array(sorted(neighbours.representatives()), dtype=np.int64)
    rng = np.random.default_rng(0)
    chosen = rng.choice(labels, min(max(count for _, count in _NOISES), len(labels)), replace=False)
    vectors = rng.permutation(store.vectors(sorted(chosen.tolist()))[1])
    noise = rng.standard_normal(vectors.shape, dtype=np.float32)
    noise /= np.maximum(np.linalg.norm(noise, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    noise *= np.linalg.norm(vectors, axis=1, keepdims=True)
    return [prepare((vectors + length * noise)[:count], distance) for length, count in _NOISES]


def _best_scores(store: Store, queries: Matrix, distance: Distance, stop: Callable[[], bool]) -> Matrix | None:
    """Return each query's scores of its truly nearest vectors, greatest first, float32 (queries, at most 100).

    None if stopped.
    """
    best = np.empty((len(queries), 0), dtype=np.float32)
    with store.snapshot():
        for _, vectors in store.scan(_SCAN_BATCH):
            if stop():
                return None
            _, scores = nearest(queries, prepare(vectors, distance), _SIZES[-1], distance)
            best = -np.sort(-np.hstack([best, scores]), axis=1)[:, : _SIZES[-1]]
    return best


def _recall(
    neighbours: Neighbours, queries: Matrix, truth: Matrix, k: int, ef: int, stop: Callable[[], bool]
) -> float | None:
    """Search the graph for k hits of each query; return the share that is as near as the truly k-th nearest vector.

    None if stopped or the graph fails. `truth` has the scores of the truly nearest vectors, greatest first.
    """
    k = min(k, truth.shape[1])
    # A hit counts if its score is that of the k-th nearest or greater, apart from rounding: 1e-5 of the greatest score
    # of the same query. The scores of other queries may be greater by many powers of ten; with a tolerance from those,
    # every hit would count.
    bounds = (truth[:, k - 1] - 1e-5 * np.abs(truth).max(axis=1)).tolist()
    right = 0
    for rows in _turns(len(queries)):
        if stop():
            return None
        for candidates, bound in zip(neighbours.search(queries[rows], k, ef), bounds[rows], strict=True):
            if candidates is None:
                return None
            right += min(k, sum(score >= bound for score in candidates.scores))
    return right / (k * len(queries))


def _turns(count: int) -> Iterator[slice]:
    for start in range(0, count, _TURN):
        yield slice(start, start + _TURN)
