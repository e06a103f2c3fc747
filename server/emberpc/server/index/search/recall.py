"""Measurement of the recall of graph searches at several values of ef.

A sample of the distinct vectors, each moved by several lengths of noise, is searched for exactly and in the graph. For
each ef the least recall over all lengths of noise is saved beside the collection. It is measured again when the graph
has grown by half, or is new.
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

#: With fewer vectors in the graph, comparing all of them is as fast.
MIN_SIZE = 1000
#: The graph is measured again when it has this many times the vectors of the last measurement.
_GROWTH = 1.5
#: Lengths of the noise as a multiple of the vector's length, and the number of queries for each. With the first,
#: queries are as unlike the records as questions are unlike texts that answer them, with a cosine of 0.7. With the
#: others they are like nearly equal texts, which are easier to find, except among vectors in a narrow cone.
_NOISES = ((1.0, 128), (0.2, 48), (0.04, 48))
_SIZES = (10, 100)
_EFS = (25, 50, 100, 150, 200, 300, 400, 600, 800, 1200, 1600, 2400)
#: Greater values of ef are not tried for queries that find this share. Callers who want more get an exact search.
_ENOUGH = 0.9995
#: Queries at one value of ef, while other searches wait: some milliseconds.
_TURN = 4
#: A sample has errors: this part of the tolerated loss of recall is kept as a reserve.
_RESERVE = 0.25
_SCAN_BATCH = 2000
_NAME = "recall.json"
#: Format of `recall.json` that is written. From this format on the file has a checksum.
_FORMAT = 2
_UNCHECKED_FORMAT = 1
#: Limits of the values of a file.
_MOST_K, _MOST_EF = 10_000, 1_000_000


@dataclass(frozen=True)
class Point:
    """One measurement: the share of the true `k` nearest that was found with `ef` candidates."""

    k: int
    ef: int
    recall: float


@dataclass(frozen=True)
class RecallMap:
    """Measurements of a graph that held `size` vectors."""

    size: int
    points: tuple[Point, ...]

    def outgrown(self, size: int) -> bool:
        """Return whether a graph of `size` vectors must be measured again."""
        return size >= _GROWTH * self.size

    def ef(self, k: int, recall: float) -> int | None:
        """Return the least ef that finds the share `recall` of the true `k` nearest; None if no measured ef does."""
        measured = sorted({point.k for point in self.points})
        if not measured:
            return None
        # Fewer hits are not harder to find; beyond the greatest measured k, ef grows in proportion.
        nearest_size = next((size for size in measured if size >= k), measured[-1])
        wanted = recall + _RESERVE * (1 - recall)
        fitting = [point.ef for point in self.points if point.k == nearest_size and point.recall >= wanted]
        return max(k, -(-min(fitting) * max(k, nearest_size) // nearest_size)) if fitting else None


def measure(store: Store, neighbours: Neighbours, distance: Distance, stop: Callable[[], bool]) -> RecallMap | None:
    """Measure a collection's graph while searches and writes continue; None if stopped.

    Some two seconds at 100,000 vectors, most of it for reading them.
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
            # A greater ef finds no fewer.
            kinds = [kind for kind, each in zip(kinds, recalls, strict=True) if each < _ENOUGH]
            if not kinds:
                break
    return RecallMap(size, tuple(points))


def save(measured: RecallMap, folder: Path) -> None:
    """Save measurements; if the file cannot be written, they are only measured again later."""
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
    """Return the saved measurements, or None if there is no file with valid ones."""
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
    """Raise ValueError unless a measurement could give these values."""
    if type(size) is not int or size < 0:
        raise ValueError(f"its size is {size}, not a number of vectors")
    for k, ef, recall in map(astuple, points):
        if type(k) is not int or type(ef) is not int or not 1 <= k <= _MOST_K or not k <= ef <= _MOST_EF:
            raise ValueError(f"it has a measurement with k {k} and ef {ef}")
        if type(recall) not in (int, float) or not 0 <= recall <= 1:  # true for NaN too
            raise ValueError(f"it has a recall of {recall}, which is not within 0 to 1")


def _check_sum(document: dict[str, Any]) -> None:
    """Remove the checksum from a file's values; raise ValueError if it is wrong."""
    if document.pop("checksum", None) != _checksum(document) and document["format"] != _UNCHECKED_FORMAT:
        raise ValueError("its values are not those that were written")


def _checksum(values: dict[str, Any]) -> int:
    """Return the CRC-32 of values as JSON."""
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def _queries(store: Store, neighbours: Neighbours, distance: Distance) -> list[Matrix]:
    """Return prepared queries near the records for each length of noise: a sample of stored vectors moved by noise.

    The sample has at most one of equal and nearly equal vectors: a graph may find many copies of one text with a small
    ef, and other records with a large ef only.
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
    """Return the scores of the truly nearest vectors, greatest first, float32 (queries, at most 100)."""
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
    """Return the share of hits that are as near as the k-th nearest; None if stopped or the graph fails."""
    k = min(k, truth.shape[1])
    # A hit counts if it is as near as the k-th except for the last digits of the query's own scores. The scores of
    # other queries may be greater by many powers of ten, so that by their digits every hit would count.
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
