"""Distances: preparation, validation, comparison and scores of vectors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from emberpc.server.collections.types import Distance, Labels, Matrix
from emberpc.server.errors import FieldPath, Violation, invalid, invalid_fields

#: hnswlib's names of the spaces. Cosine is an inner product too, since vectors are normalized here.
SPACES = {Distance.COSINE: "ip", Distance.DOT_PRODUCT: "ip", Distance.EUCLIDEAN: "l2"}
#: Limit of a vector's length: the square of a distance between two such vectors, scaled, is still a float32.
_MAX_LENGTH = 1e14
#: Squared lengths in float32 within these limits are valid in spite of rounding: neither zero nor too long.
_PLAIN = (1e-30, 1e27)
#: hnswlib computes 1 - product in float32, which loses small products. Under DOT_PRODUCT both sides are scaled by this
#: power of two, which changes no digit, so that vectors much shorter than 1 can be distinguished.
_DOT_SCALE = np.float32(2**14)
#: Under DOT_PRODUCT, the least length of a prepared vector that hnswlib distinguishes from vectors of similar length:
#: 1e-5 of the product with a query of length 1, scaled, is more than the last digit of 1.
_LEAST_IN_GRAPH = np.float32(2**14 * 1e-5)
#: Under EUCLIDEAN, the least length of a vector in a graph: squares of shorter distances vanish in hnswlib's float32.
_LEAST_LENGTH = np.float32(1e-15)
#: Under DOT_PRODUCT, the least length of a vector other than zero: products of shorter ones vanish in float32.
_LEAST_DOT_LENGTH = 1e-16
#: Scores computed at a time, so that a full buffer and many queries do not fill the memory (16 MB).
_BLOCK = 4 * 2**20
#: Up to this many queries are multiplied as columns: with thousands of vectors, four queries take half the time then.
_FEW_QUERIES = 8


def check_vectors(matrix: Matrix, dimensions: int, distance: Distance, path: FieldPath) -> None:
    """Raise INVALID_ARGUMENT, naming each vector that cannot be stored or searched for.

    hnswlib corrupts the heap if a vector is too short, and returns nonsense for NaN.

    Args:
        matrix: float32, shape (vectors, any).
        dimensions: required size of the second axis.
        distance: under COSINE, a vector must not be zero; under DOT_PRODUCT it must be zero or not too short.
        path: returns the name of vector i in the request.
    """
    if matrix.dtype != np.float32:
        raise invalid(path(0), f"is of type {matrix.dtype}; it must be float32")
    if matrix.ndim != 2 or matrix.shape[1] != dimensions:
        width = matrix.shape[1] if matrix.ndim == 2 else 0
        raise invalid(path(0), f"has {width} dimensions, the collection has {dimensions}")
    _check_lengths(_lengths(matrix), distance, path)


def prepare(matrix: Matrix, distance: Distance) -> Matrix:
    """Return vectors as graph and buffer hold them: of length 1 under COSINE; float32, contiguous."""
    if distance is Distance.COSINE:
        matrix = (matrix / _lengths(matrix)[:, None]).astype(np.float32)
    elif distance is Distance.DOT_PRODUCT:
        matrix = matrix * _DOT_SCALE
    return np.ascontiguousarray(matrix, dtype=np.float32)


def prepare_queries(matrix: Matrix, dimensions: int, distance: Distance, path: FieldPath) -> Matrix:
    """Check and prepare query vectors, in half the time of `check_vectors` and `prepare`.

    Stored vectors are always prepared to the same bits; for queries the last bit does not matter.
    """
    if matrix.dtype != np.float32 or matrix.ndim != 2 or matrix.shape[1] != dimensions:
        check_vectors(matrix, dimensions, distance, path)
    exact = matrix.astype(np.float64)
    lengths = np.sqrt(np.add.reduce(exact * exact, axis=1))
    least = _least_length(distance)
    if not all(least < length <= _MAX_LENGTH for length in lengths.tolist()):  # false for NaN too
        _check_lengths(lengths, distance, path)
    if distance is Distance.COSINE:
        exact /= lengths[:, None]
        return exact.astype(np.float32)
    return prepare(matrix, distance)


def _least_length(distance: Distance) -> float:
    """Return the length that a vector other than zero must exceed."""
    return _LEAST_DOT_LENGTH if distance is Distance.DOT_PRODUCT else 0.0


def _check_lengths(lengths: npt.NDArray[np.float64], distance: Distance, path: FieldPath) -> None:
    violations = []
    least = _least_length(distance)
    for i in np.flatnonzero(~np.isfinite(lengths) | (lengths <= least) | (lengths > _MAX_LENGTH)):
        if not np.isfinite(lengths[i]):
            violations.append(Violation(path(int(i)), "holds NaN or infinity; every value must be a finite number"))
        elif lengths[i] > _MAX_LENGTH:
            violations.append(Violation(path(int(i)), f"is longer than {_MAX_LENGTH:g}; scale the vectors down"))
        elif lengths[i]:
            remedy = "their products would be zero; scale the vectors up"
            violations.append(Violation(path(int(i)), f"is shorter than {_LEAST_DOT_LENGTH:g}; {remedy}"))
        elif distance is Distance.COSINE:
            violations.append(Violation(path(int(i)), "has length zero, so no direction; cosine cannot compare it"))
    if violations:
        raise invalid_fields(violations)


def are_fit(matrix: Matrix, distance: Distance) -> npt.NDArray[np.bool_]:
    """Return which vectors, float32 (vectors, dimensions), can be compared: bool (vectors,).

    These are the vectors that `check_vectors` accepts, and short ones under DOT_PRODUCT, which older versions stored.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        squares = np.einsum("ij,ij->i", matrix, matrix)
    fit: npt.NDArray[np.bool_] = (squares > _PLAIN[0]) & (squares < _PLAIN[1])
    doubtful = np.flatnonzero(~fit)
    if len(doubtful):
        lengths = _lengths(matrix[doubtful])
        fit[doubtful] = (lengths <= _MAX_LENGTH) & ((lengths > 0) | (distance is not Distance.COSINE))
    return fit


def are_short(prepared: Matrix, distance: Distance) -> npt.NDArray[np.bool_]:
    """Return which prepared vectors, float32 (vectors, dimensions), are too short for hnswlib: bool (vectors,)."""
    if distance is Distance.COSINE:
        return np.zeros(len(prepared), dtype=bool)
    least = _LEAST_IN_GRAPH if distance is Distance.DOT_PRODUCT else _LEAST_LENGTH
    short: npt.NDArray[np.bool_] = np.einsum("ij,ij->i", prepared, prepared) < least**2
    return short


def lengthened(queries: Matrix) -> tuple[Matrix, Matrix]:
    """Scale short queries of inner products up by powers of two, which change no digit; hnswlib rounds less then.

    Args:
        queries: prepared queries, float32 (queries, dimensions).

    Returns:
        The queries, of length at least 2**14 except zero vectors, and the scale of each, float32 (queries, 1).
    """
    lengths = np.maximum(_lengths(queries), np.finfo(np.float64).tiny)
    powers = np.clip(np.ceil(np.log2(float(_DOT_SCALE) / lengths)), 0, 120)
    scales = np.exp2(powers).astype(np.float32)[:, None]
    return queries * scales, scales


def nearest(
    queries: Matrix, vectors: Matrix, k: int, distance: Distance, among: npt.NDArray[np.bool_] | None = None
) -> tuple[Labels, Matrix]:
    """Compare prepared queries with prepared vectors exhaustively.

    Args:
        queries: float32 (queries, dimensions).
        vectors: float32 (vectors, dimensions).
        k: limit of the vectors to return for each query.
        distance: the distance.
        among: bool (vectors,), which of the vectors to compare; None: all.

    Returns:
        Rows of `vectors`, int64 (queries, at most k), nearest first, and their scores, float32 of the same shape.
    """
    k = min(k, len(vectors) if among is None else int(np.count_nonzero(among)))
    rows = np.empty((len(queries), k), dtype=np.int64)
    best = np.empty((len(queries), k), dtype=np.float32)
    step = max(1, _BLOCK // max(1, len(vectors)))
    for start in range(0, len(queries) if k else 0, step):
        part = slice(start, start + step)
        found = _scores(queries[part], vectors, distance)
        if among is not None:
            found[:, ~among] = -np.inf
        chosen = np.argpartition(-found, k - 1, axis=1)[:, :k]
        # For a small group, np.take_along_axis takes longer than the comparison.
        across = np.arange(len(chosen))[:, None]
        chosen_scores = found[across, chosen]
        order = np.argsort(-chosen_scores, axis=1, kind="stable")
        rows[part] = chosen[across, order]
        best[part] = chosen_scores[across, order]
    return rows, best


def best_of(found: Sequence[tuple[Labels, Matrix]], k: int) -> tuple[Labels, Matrix]:
    """Merge the results of the same queries from several searches.

    Args:
        found: from each search labels, int64 (queries, any), nearest first, and scores, float32 of the same shape.
        k: limit of the labels to return for each query.

    Returns:
        Labels, int64 (queries, at most k), nearest first, and their scores; of equal scores, those of earlier searches
        come first.
    """
    if len(found) == 1:
        return found[0]
    labels = np.concatenate([each[0] for each in found], axis=1)
    scores = np.concatenate([each[1] for each in found], axis=1)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    rows = np.arange(len(order))[:, None]
    return labels[rows, order], scores[rows, order]


def graph_scores(distances: Matrix, distance: Distance) -> Matrix:
    """Convert hnswlib's distances to scores; greater is nearer."""
    if distance is Distance.EUCLIDEAN:
        return -np.sqrt(np.maximum(distances, 0))
    return _unscaled(1 - distances, distance)


def _scores(queries: Matrix, vectors: Matrix, distance: Distance) -> Matrix:
    """Score prepared vectors against prepared queries: float32 (queries, vectors); greater is nearer."""
    if distance is not Distance.EUCLIDEAN:
        products = (vectors @ queries.T).T if len(queries) <= _FEW_QUERIES else queries @ vectors.T
        return _unscaled(products, distance)
    # Not by |a|² + |b|² - 2ab, which loses distances that are small compared with the lengths.
    found = np.empty((len(queries), len(vectors)), dtype=np.float32)
    step = max(1, _BLOCK // max(1, queries.shape[1]))
    for row, query in enumerate(queries):
        for start in range(0, len(vectors), step):
            difference = vectors[start : start + step] - query
            squares = np.einsum("ij,ij->i", difference, difference)
            found[row, start : start + step] = -np.sqrt(squares)
            vanishing = np.flatnonzero(squares < _PLAIN[0])
            if len(vanishing):
                found[row, start + vanishing] = -_lengths(difference[vanishing])
    return found


def _unscaled(products: Matrix, distance: Distance) -> Matrix:
    return products / _DOT_SCALE**2 if distance is Distance.DOT_PRODUCT else products


def _lengths(matrix: Matrix) -> npt.NDArray[np.float64]:
    """Return the vectors' lengths in float64, where the square of a float32 neither overflows nor vanishes."""
    lengths: npt.NDArray[np.float64] = np.sqrt(np.einsum("ij,ij->i", matrix, matrix, dtype=np.float64))
    return lengths
