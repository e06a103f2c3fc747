"""Measurement of the recall of graph searches at several values of ef.

The queries are a sample of the distinct vectors in the graph, moved by noise of several lengths. They are searched for
in the graph, and compared with every stored vector. The result has for each k and ef the minimum recall over the
lengths of noise (see `RecallPoint`). `ef.EfChooser` decides when a graph is measured, and saves the result.
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

from emberpc.bundle.atomic_files import write_text_atomically
from emberpc.server.collections.metric import nearest, prepare
from emberpc.server.collections.types import Distance, Matrix
from emberpc.server.index.graph.neighbours import Neighbours
from emberpc.server.index.storage.store import Store

log = logging.getLogger(__name__)

#: Minimum number of vectors in a graph that is measured. Comparing fewer vectors is about as fast as a graph search.
MIN_SIZE = 1000
#: A graph is measured again when its number of vectors is at least this many times that at the last measurement.
_GROWTH = 1.5
#: Pairs of the length of the noise, as a multiple of the vector's length, and the number of queries with this noise.
#: Queries with the first noise have a cosine of about 0.7 to the record, like questions to the texts that answer them.
#: Queries with the other two are like texts nearly equal to a record's: the nearest records of such queries are easier
#: to find, except among vectors in a narrow cone.
_NOISES = ((1.0, 128), (0.2, 48), (0.04, 48))
#: The values of k, and the values of ef, that are measured.
_SIZES = (10, 100)
_EFS = (25, 50, 100, 150, 200, 300, 400, 600, 800, 1200, 1600, 2400)
#: If queries have this recall, greater values of ef are not tried for them. So no ef may be known for a `min_recall`
#: near this recall or above it: the search then compares every vector.
_ENOUGH = 0.9995
#: Queries that a measurement searches for in one call, which takes a few milliseconds. The number is small, since
#: searches of callers may wait meanwhile.
_TURN = 4
#: Part of the tolerated loss of recall that is kept as a reserve, since a sample has errors: for a recall of 0.98 an ef
#: is chosen with a measured recall of at least 0.985.
_RESERVE = 0.25
#: Stored vectors that are read and compared at a time.
_VECTOR_BATCH = 2000
_NAME = "recall.json"
#: Formats of `recall.json` that are read: the format that is written, and the older format, which has no checksum.
FORMAT = 2
_UNCHECKED_FORMAT = 1
#: Greatest k and ef that a valid `recall.json` may contain: the limits of a search.
_MAX_K, _MAX_EF = 10_000, 1_000_000


@dataclass(frozen=True)
class RecallPoint:
    """One measurement: `recall` is the share of the true `k` nearest vectors that graph searches with `ef` found.

    It is the minimum share among the lengths of noise for which no smaller `ef` reached `_ENOUGH`.
    """

    k: int
    ef: int
    recall: float


@dataclass(frozen=True)
class RecallMap:
    """Measurements of a graph that held `size` vectors, strays and members of groups included.

    There are no points if the graph had fewer than 20 vectors, or `_queries` found no vector for a query.
    """

    size: int
    points: tuple[RecallPoint, ...]

    def outgrown(self, size: int) -> bool:
        """Return whether the graph, which now has `size` vectors, has grown by half or more since the measurement."""
        return size >= _GROWTH * self.size

    def ef(self, k: int, recall: float) -> int | None:
        """Return the smallest measured ef that finds the share `recall` of the `k` nearest vectors, with a reserve.

        The measured recall must be at least `recall` plus `_RESERVE` times 1 - `recall`. The ef is at least `k`; for a
        `k` above the measured values it is computed. None if no measured ef suffices, or there are no points.
        """
        measured = sorted({point.k for point in self.points})
        if not measured:
            return None
        # The measurements for the next greater k are used: fewer hits are not harder to find. Beyond the greatest
        # measured k, ef grows in proportion to k.
        nearest_size = next((size for size in measured if size >= k), measured[-1])
        wanted = recall + _RESERVE * (1 - recall)
        fitting = [point.ef for point in self.points if point.k == nearest_size and point.recall >= wanted]
        return max(k, -(-min(fitting) * max(k, nearest_size) // nearest_size)) if fitting else None


def measure(store: Store, neighbours: Neighbours, distance: Distance, stop: Callable[[], bool]) -> RecallMap | None:
    """Measure the recall of a collection's graph; searches and writes may run meanwhile.

    Most of the time is for reading all vectors from the store: in all, some seconds for 100,000 vectors.

    Args:
        store: the records of the collection.
        neighbours: the graph, and the other vectors in memory.
        distance: the distance of the collection.
        stop: whether to stop; called before each batch of vectors or queries.

    Returns:
        The measurements, maybe without points (see `RecallMap`); None if stopped, or if the graph fails.

    Raises:
        ServiceError: the errors of reading the store.
    """
    size = neighbours.graph_size
    queries = _queries(store, neighbours, distance)
    if not len(queries[0]):
        return RecallMap(size, ())
    truth = _best_scores(store, np.vstack(queries), distance, stop)
    if truth is None:
        return None
    points: list[RecallPoint] = []
    for k in _SIZES:
        kinds = list(zip(queries, np.split(truth, np.cumsum([len(each) for each in queries])[:-1]), strict=True))
        for ef in _EFS:
            if ef < k or 2 * k > size:
                continue
            found = [_recall(neighbours, *kind, k, ef, stop) for kind in kinds]
            recalls = [each for each in found if each is not None]
            if len(recalls) < len(found):
                return None
            points.append(RecallPoint(k, ef, min(recalls)))
            # Queries that find enough are not tried with a greater ef: it would hardly find less.
            kinds = [kind for kind, each in zip(kinds, recalls, strict=True) if each < _ENOUGH]
            if not kinds:
                break
    return RecallMap(size, tuple(points))


def save(measured: RecallMap, folder: Path) -> None:
    """Save measurements in a collection's folder, as `recall.json`.

    An error of the file system is only logged; the file of an earlier measurement then stays.
    """
    values = {"format": FORMAT, **asdict(measured)}
    try:
        write_text_atomically(folder / _NAME, json.dumps({**values, "checksum": _checksum(values)}))
    except OSError as error:
        log.warning("%s: not kept: %s", folder / _NAME, error)


def load(folder: Path) -> RecallMap | None:
    """Return the measurements saved in a collection's folder; None if there are none.

    If their format is unknown, they are damaged or cannot be read, this is logged, and None is returned.
    """
    try:
        document = json.loads((folder / _NAME).read_text(encoding="utf-8"))
        _check_format(document["format"])
        _check_sum(document)
        points = tuple(RecallPoint(each["k"], each["ef"], each["recall"]) for each in document["points"])
        _check(document["size"], points)
        return RecallMap(document["size"], points)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        log.warning("%s is set aside and measured again: %s", folder / _NAME, str(error) or type(error).__name__)
        return None


def _check_format(version: object) -> None:
    """Raise ValueError if a format of `recall.json` cannot be read."""
    if version not in (FORMAT, _UNCHECKED_FORMAT):
        raise ValueError(f"it has the format {version}, and this emberpc reads {_UNCHECKED_FORMAT} and {FORMAT}")


def _check(size: object, points: tuple[RecallPoint, ...]) -> None:
    """Raise ValueError if the number of vectors, or a value of a point, is out of range or of a wrong type."""
    if type(size) is not int or size < 0:
        raise ValueError(f"its size is {size}, not a number of vectors")
    for k, ef, recall in map(astuple, points):
        if type(k) is not int or type(ef) is not int or not 1 <= k <= _MAX_K or not k <= ef <= _MAX_EF:
            raise ValueError(f"it has a measurement with k {k} and ef {ef}")
        if type(recall) not in (int, float) or not 0 <= recall <= 1:  # true for NaN too
            raise ValueError(f"it has a recall of {recall}, which is not within 0 to 1")


def _check_sum(document: dict[str, Any]) -> None:
    """Remove the checksum from the values of `recall.json`; raise ValueError if the checksum is wrong or missing.

    Format 1 has no checksum, so the values of a document of format 1 are not checked.
    """
    if document.pop("checksum", None) != _checksum(document) and document["format"] != _UNCHECKED_FORMAT:
        raise ValueError("its values are not those that were written")


def _checksum(values: dict[str, Any]) -> int:
    """Return the CRC-32 of values as JSON with sorted keys."""
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def _queries(store: Store, neighbours: Neighbours, distance: Distance) -> list[Matrix]:
    """Return prepared queries for each pair of `_NOISES`: a sample of the stored vectors, moved by noise of its length.

    The sample is taken from `Neighbours.node_labels`, which has few nearly equal vectors: with a small ef a graph
    may find many copies of one text, but other records only with a large ef. If there are too few vectors, a pair has
    fewer queries than `_NOISES` says; none, if no vector can be used.
    """
    labels = np.array(sorted(neighbours.node_labels()), dtype=np.int64)
    rng = np.random.default_rng(0)
    chosen = rng.choice(labels, min(max(count for _, count in _NOISES), len(labels)), replace=False)
    vectors = rng.permutation(store.vectors(sorted(chosen.tolist()))[1])
    noise = rng.standard_normal(vectors.shape, dtype=np.float32)
    noise /= np.maximum(np.linalg.norm(noise, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    noise *= np.linalg.norm(vectors, axis=1, keepdims=True)
    return [prepare((vectors + length * noise)[:count], distance) for length, count in _NOISES]


def _best_scores(store: Store, queries: Matrix, distance: Distance, stop: Callable[[], bool]) -> Matrix | None:
    """Compare each query with every stored vector; return the scores of the nearest vectors, greatest first.

    The result is float32 (queries, n): n is 100, or the number of vectors if that is less. None if stopped.
    """
    best = np.empty((len(queries), 0), dtype=np.float32)
    with store.snapshot():
        for _, vectors in store.vector_batches(_VECTOR_BATCH):
            if stop():
                return None
            _, scores = nearest(queries, prepare(vectors, distance), _SIZES[-1], distance)
            best = -np.sort(-np.hstack([best, scores]), axis=1)[:, : _SIZES[-1]]
    return best


def _recall(
    neighbours: Neighbours, queries: Matrix, truth: Matrix, k: int, ef: int, stop: Callable[[], bool]
) -> float | None:
    """Search the graph for k hits of each query; return the share of hits as near as the truly k-th nearest vector.

    A missing hit counts as one that is not near enough. None if stopped or the graph fails. `truth` is the result of
    `_best_scores` for the queries; it must have at least one column. If it has fewer than k columns, their number
    replaces k.
    """
    k = min(k, truth.shape[1])
    # A hit counts if its score is that of the k-th nearest or greater, apart from rounding: 1e-5 of the greatest
    # absolute score of the same query. The scores of other queries may be greater by many powers of ten: with a
    # tolerance computed from them, every hit might count.
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
