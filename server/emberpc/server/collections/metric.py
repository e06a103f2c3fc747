"""Validate and prepare vectors, compare them, and compute their scores under each distance."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from emberpc.server.collections.types import Distance, Labels, Matrix
from emberpc.server.errors import FieldPath, Violation, invalid, invalid_fields

#: hnswlib's name of the space for each distance. The cosine is an inner product too, since this module normalizes the
#: vectors.
SPACES = {Distance.COSINE: "ip", Distance.DOT_PRODUCT: "ip", Distance.EUCLIDEAN: "l2"}
#: Greatest length of a vector. The square of the distance between two vectors of this length, and their scaled product
#: under DOT_PRODUCT, are still finite in float32.
_MAX_LENGTH = 1e14
#: Lower and upper limit of a squared length in float32. A vector within the limits is surely neither zero nor too long,
#: in spite of rounding.
_PLAIN = (1e-30, 1e27)
#: Factor of queries and stored vectors under DOT_PRODUCT. hnswlib computes 1 - product in float32, which loses small
#: products. With the factor, vectors much shorter than 1 can be distinguished. A power of two changes no digit.
_DOT_SCALE = np.float32(2**14)
#: Greatest exponent n of the factor 2**n by which a short query is scaled up, so that hnswlib rounds its products less;
#: see `lengthened`. 2.0**120 is exact in float32.
_MAX_POWER = 120
#: Under DOT_PRODUCT, the least length of a prepared vector in a graph. hnswlib computes 1 - product in float32. For
#: shorter vectors and a query of length 1, it could not distinguish two products that differ by a share of 1e-5.
_LEAST_IN_GRAPH = np.float32(2**14 * 1e-5)
#: Under EUCLIDEAN, the least length of a vector in a graph. Distances between shorter vectors may be so short, below
#: 1e-19, that hnswlib's float32 rounds their squares to few digits or to 0.
_LEAST_LENGTH = np.float32(1e-15)
#: Under DOT_PRODUCT, a vector must be zero or longer than this: float32 rounds products of much shorter vectors to 0.
_LEAST_DOT_LENGTH = 1e-16
#: Most scores or differences that are computed at a time (16 MB as float32), so that a full buffer and many queries do
#: not fill the memory. The scores of a single query are always computed at once.
_BLOCK = 4 * 2**20
#: Most queries for which vectors are multiplied by the queries as columns, and not the queries by the vectors. With
#: thousands of vectors, four queries take half the time that way.
_FEW_QUERIES = 8


def check_vectors(matrix: Matrix, dimensions: int, distance: Distance, path: FieldPath) -> None:
    """Raise INVALID_ARGUMENT, naming each vector that cannot be stored or searched for.

    A wrong type, or wrong dimensions, are those of all vectors, so only the first vector is named. hnswlib would
    corrupt the heap for a vector with too few dimensions, and return nonsense for NaN.

    Args:
        matrix: the vectors; must be float32 (vectors, dimensions).
        dimensions: required number of dimensions.
        distance: the distance. COSINE refuses a vector of zeros. DOT_PRODUCT refuses a vector of length 1e-16 or less
            that is not zero. Each distance refuses a vector longer than 1e14, or with NaN or infinity.
        path: returns the path of vector i in the request.
    """
    if matrix.dtype != np.float32:
        raise invalid(path(0), f"is of type {matrix.dtype}; it must be float32")
    if matrix.ndim != 2 or matrix.shape[1] != dimensions:
        width = matrix.shape[1] if matrix.ndim == 2 else 0
        raise invalid(path(0), f"has {width} dimensions, the collection has {dimensions}")
    _check_lengths(_lengths(matrix), distance, path)


def prepare(matrix: Matrix, distance: Distance) -> Matrix:
    """Return vectors, float32 (vectors, dimensions), as graph and buffer hold them, in a contiguous array.

    The vectors must be valid: `check_vectors` or `are_fit` has accepted them. The result may be `matrix` itself. They
    have length 1 under COSINE, are multiplied by 2**14 under DOT_PRODUCT, and are unchanged under EUCLIDEAN.
    """
    if distance is Distance.COSINE:
        matrix = (matrix / _lengths(matrix)[:, None]).astype(np.float32)
    elif distance is Distance.DOT_PRODUCT:
        matrix = matrix * _DOT_SCALE
    return np.ascontiguousarray(matrix, dtype=np.float32)


def prepare_queries(matrix: Matrix, dimensions: int, distance: Distance, path: FieldPath) -> Matrix:
    """Check and prepare query vectors, in half the time of `check_vectors` and `prepare`.

    The result may differ from that of `prepare` in the last bit, which does not matter for queries.

    Args:
        matrix: the queries; must be float32 (queries, dimensions).
        dimensions: required number of dimensions.
        distance: the distance of the collection.
        path: returns the path of query i in the request.

    Returns:
        float32 (queries, dimensions).

    Raises:
        ServiceError: INVALID_ARGUMENT, naming each query that cannot be searched for.
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
    """Return the length that a vector other than the zero vector must exceed to be valid."""
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

    These are the vectors that `check_vectors` accepts, and under DOT_PRODUCT also vectors that are too short for
    `check_vectors`, since older versions stored them.
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
    """Return which prepared vectors, float32 (vectors, dimensions), are too short for a graph: bool (vectors,).

    hnswlib computes in float32, and cannot compare such vectors. Under COSINE no vector is too short.
    """
    if distance is Distance.COSINE:
        return np.zeros(len(prepared), dtype=bool)
    least = _LEAST_IN_GRAPH if distance is Distance.DOT_PRODUCT else _LEAST_LENGTH
    short: npt.NDArray[np.bool_] = np.einsum("ij,ij->i", prepared, prepared) < least**2
    return short


def lengthened(queries: Matrix) -> tuple[Matrix, Matrix]:
    """Scale short queries up by powers of two, which change no digit, so that hnswlib rounds their products less.

    Args:
        queries: prepared queries, float32 (queries, dimensions), for a graph of inner products.

    Returns:
        The scaled queries, and the factor of each query, float32 (queries, 1), by which the caller divides its scores.
        All queries except zero vectors have a length of at least 2**14. The factor of a query that is so long already
        is 1.
    """
    lengths = np.maximum(_lengths(queries), _DOT_SCALE * 2.0**-_MAX_POWER)
    powers = np.maximum(np.ceil(np.log2(_DOT_SCALE / lengths)), 0)
    scales = np.exp2(powers).astype(np.float32)[:, None]
    return queries * scales, scales


def nearest(
    queries: Matrix, vectors: Matrix, k: int, distance: Distance, among: npt.NDArray[np.bool_] | None = None
) -> tuple[Labels, Matrix]:
    """Return the vectors nearest to each query, by comparing every query with every vector.

    Args:
        queries: prepared queries, float32 (queries, dimensions).
        vectors: prepared vectors, float32 (vectors, dimensions).
        k: most vectors to return for each query.
        distance: the distance.
        among: bool (vectors,), which of the vectors to compare; None: all.

    Returns:
        Rows of `vectors`, int64 (queries, k), nearest first, and their scores, float32 of the same shape; fewer columns
        than `k` if fewer vectors are compared.
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
        # For few queries, np.take_along_axis would take longer than the comparison itself.
        across = np.arange(len(chosen))[:, None]
        chosen_scores = found[across, chosen]
        order = np.argsort(-chosen_scores, axis=1, kind="stable")
        rows[part] = chosen[across, order]
        best[part] = chosen_scores[across, order]
    return rows, best


def best_of(found: Sequence[tuple[Labels, Matrix]], k: int) -> tuple[Labels, Matrix]:
    """Merge the results of one or more searches for the same queries.

    Args:
        found: from each search the labels, int64 (queries, any), nearest first, and scores, float32 of the same shape.
        k: most labels to return for each query.

    Returns:
        Labels, int64 (queries, at most k), nearest first, and their scores. Labels with equal scores are in the order
        of the searches. The result of a single search is returned unchanged, even with more than `k` labels.
    """
    if len(found) == 1:
        return found[0]
    labels = np.concatenate([each[0] for each in found], axis=1)
    scores = np.concatenate([each[1] for each in found], axis=1)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    rows = np.arange(len(order))[:, None]
    return labels[rows, order], scores[rows, order]


def graph_scores(distances: Matrix, distance: Distance) -> Matrix:
    """Convert distances that hnswlib returned for prepared vectors to scores, float32 of the same shape.

    The score is the cosine, the dot product, or the negative Euclidean distance; a greater score is nearer. hnswlib's
    distance is 1 - product, or the squared Euclidean distance.
    """
    if distance is Distance.EUCLIDEAN:
        return -np.sqrt(np.maximum(distances, 0))
    return _unscaled(1 - distances, distance)


def _scores(queries: Matrix, vectors: Matrix, distance: Distance) -> Matrix:
    """Return the scores of prepared vectors for prepared queries, float32 (queries, vectors); greater is nearer."""
    if distance is not Distance.EUCLIDEAN:
        products = (vectors @ queries.T).T if len(queries) <= _FEW_QUERIES else queries @ vectors.T
        return _unscaled(products, distance)
    # The distance is not computed by |a|² + |b|² - 2ab: that loses distances that are small compared with the lengths.
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
    """Return the lengths of vectors, float64 (vectors,), since squares of float32 numbers may overflow in float32."""
    lengths: npt.NDArray[np.float64] = np.sqrt(np.einsum("ij,ij->i", matrix, matrix, dtype=np.float64))
    return lengths
