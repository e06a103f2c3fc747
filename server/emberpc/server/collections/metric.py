"""Validate and prepare vectors, compare them, and compute their scores under each distance."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from emberpc.server.collections.types import Distance, Labels, Matrix
from emberpc.server.errors import FieldPath, Violation, invalid, invalid_fields

#: hnswlib's name of the space for each distance. COSINE uses the inner product ("ip"), which is the cosine, since
#: `prepare` normalizes the vectors.
SPACES = {Distance.COSINE: "ip", Distance.DOT_PRODUCT: "ip", Distance.EUCLIDEAN: "l2"}
#: Greatest length of a vector. The square of the distance between two vectors of this length, and their scaled product
#: under DOT_PRODUCT, are still finite in float32.
_MAX_LENGTH = 1e14
#: Lower and upper limit of a squared length that was computed in float32. Within the limits, rounding does not matter:
#: the vector is neither zero nor too long. Outside of them, the length is computed again in float64, which is slower.
#: A distance whose square is below the lower limit is computed again too.
_PLAIN = (1e-30, 1e27)
#: Factor by which `prepare` multiplies each vector under DOT_PRODUCT. hnswlib computes 1 - product in float32, which
#: loses small products. The factor makes products greater. As a power of two, it causes no rounding.
_DOT_SCALE = np.float32(2**14)
#: Greatest exponent n of the factor 2**n of `lengthened`. It keeps the factor of a zero vector finite: the greatest
#: power of two in float32 is 2**127.
_MAX_POWER = 120
#: Under DOT_PRODUCT, the minimum length of a prepared vector in a graph. When hnswlib builds a graph, it compares
#: vectors of the graph with each other, by 1 - product in float32. Two vectors of this length have a product of 0.027
#: or less. If the product is close to 0.027, a change by a share of 1e-5 still changes the result.
_MIN_IN_GRAPH = np.float32(2**14 * 1e-5)
#: Under EUCLIDEAN, the minimum length of a vector in a graph. Two shorter vectors that clearly differ may have a
#: distance below 1e-19. hnswlib's float32 rounds the square of such a distance to few digits or to 0.
_MIN_LENGTH = np.float32(1e-15)
#: Under DOT_PRODUCT, a vector that is not prepared must be zero or longer than this: float32 rounds products of much
#: shorter vectors to 0.
_MIN_DOT_LENGTH = 1e-16
#: Maximum number of scores, and of components of differences of vectors, in one temporary array: 16 MB as float32. The
#: limit keeps many queries on a full buffer from filling the memory. The scores of one query are in one array even
#: above the limit.
_BLOCK = 4 * 2**20
#: Up to this number of queries, products are computed as `vectors @ queries.T` and transposed; for more, as
#: `queries @ vectors.T`. With thousands of vectors, the first way takes half the time for four queries.
_FEW_QUERIES = 8


def check_vectors(matrix: Matrix, dimensions: int, distance: Distance, path: FieldPath) -> None:
    """Raise INVALID_ARGUMENT, naming each vector that cannot be stored or searched for.

    If the type or the number of dimensions of the matrix is wrong, only the first vector is named. hnswlib would
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
        remedy = dimensions_remedy(dimensions)
        raise invalid(path(0), f"has {width} dimensions, the collection has {dimensions}; {remedy}")
    _check_lengths(_lengths(matrix), distance, path)


def dimensions_remedy(dimensions: int) -> str:
    """Return the remedy for a vector of other dimensions than those of its collection, as the end of a message."""
    return f"give a vector of {dimensions} dimensions"


def prepare(matrix: Matrix, distance: Distance) -> Matrix:
    """Convert vectors to the form in which graph and buffer hold them: float32 (vectors, dimensions), contiguous.

    COSINE scales each vector to length 1, DOT_PRODUCT multiplies it by 2**14, and EUCLIDEAN leaves it unchanged.
    `matrix` is not changed; under EUCLIDEAN the result may be `matrix` itself. The vectors of `matrix` must be valid:
    `check_vectors` or `are_fit` must accept them.
    """
    if distance is Distance.COSINE:
        matrix = normalized(matrix)
    elif distance is Distance.DOT_PRODUCT:
        matrix = matrix * _DOT_SCALE
    return np.ascontiguousarray(matrix, dtype=np.float32)


def normalized(matrix: Matrix) -> Matrix:
    """Scale each vector of `matrix`, float32 (vectors, dimensions), to length 1; a vector of zeros stays zero."""
    lengths = _lengths(matrix)[:, None]
    return (matrix / np.where(lengths > 0, lengths, 1)).astype(np.float32)


def prepare_queries(matrix: Matrix, dimensions: int, distance: Distance, path: FieldPath) -> Matrix:
    """Check and prepare query vectors, in half the time of `check_vectors` and `prepare`.

    Under COSINE, the result may differ from that of `prepare` in the last bit, which does not matter for queries.

    Args:
        matrix: the queries; must be float32 (queries, dimensions).
        dimensions: required number of dimensions.
        distance: the distance of the collection.
        path: returns the path of query i in the request.

    Returns:
        The prepared queries, float32 (queries, dimensions); maybe `matrix` itself, as for `prepare`.

    Raises:
        ServiceError: INVALID_ARGUMENT, in the same cases as `check_vectors`.
    """
    if matrix.dtype != np.float32 or matrix.ndim != 2 or matrix.shape[1] != dimensions:
        check_vectors(matrix, dimensions, distance, path)
    exact = matrix.astype(np.float64)
    lengths = np.sqrt(np.add.reduce(exact * exact, axis=1))
    minimum = _min_length(distance)
    if not all(minimum < length <= _MAX_LENGTH for length in lengths.tolist()):  # false for NaN too
        _check_lengths(lengths, distance, path)
    if distance is Distance.COSINE:
        exact /= lengths[:, None]
        return exact.astype(np.float32)
    return prepare(matrix, distance)


def _min_length(distance: Distance) -> float:
    """Return the length that a vector must exceed to be valid; for the zero vector, other rules apply."""
    return _MIN_DOT_LENGTH if distance is Distance.DOT_PRODUCT else 0.0


def _check_lengths(lengths: npt.NDArray[np.float64], distance: Distance, path: FieldPath) -> None:
    violations = []
    minimum = _min_length(distance)
    for i in np.flatnonzero(~np.isfinite(lengths) | (lengths <= minimum) | (lengths > _MAX_LENGTH)):
        if not np.isfinite(lengths[i]):
            violations.append(Violation(path(int(i)), "holds NaN or infinity; give finite numbers"))
        elif lengths[i] > _MAX_LENGTH:
            violations.append(Violation(path(int(i)), f"is longer than {_MAX_LENGTH:g}; scale the vectors down"))
        elif lengths[i]:
            remedy = "their products would be zero; scale the vectors up"
            violations.append(Violation(path(int(i)), f"is shorter than {_MIN_DOT_LENGTH:g}; {remedy}"))
        elif distance is Distance.COSINE:
            remedy = "give a vector that is not all zeros, or use another distance"
            violations.append(Violation(path(int(i)), f"has length zero, so no direction for cosine; {remedy}"))
    if violations:
        raise invalid_fields(violations)


def are_fit(matrix: Matrix, distance: Distance) -> npt.NDArray[np.bool_]:
    """Return whether each vector of `matrix`, float32 (vectors, dimensions), can be compared: bool (vectors,).

    True for vectors that `check_vectors` accepts, and under DOT_PRODUCT also for vectors that are too short for
    `check_vectors`, since older versions stored them. The number of dimensions is not checked.
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
    """Return whether each prepared vector, float32 (vectors, dimensions), is too short for a graph: bool (vectors,).

    hnswlib computes in float32, and may not tell such vectors apart; see `_MIN_IN_GRAPH` and `_MIN_LENGTH`. The
    zero vector is too short. Under COSINE no vector is too short.
    """
    if distance is Distance.COSINE:
        return np.zeros(len(prepared), dtype=bool)
    minimum = _MIN_IN_GRAPH if distance is Distance.DOT_PRODUCT else _MIN_LENGTH
    short: npt.NDArray[np.bool_] = np.einsum("ij,ij->i", prepared, prepared) < minimum**2
    return short


def lengthened(queries: Matrix) -> tuple[Matrix, Matrix]:
    """Scale short queries up, so that hnswlib, which computes 1 - product in float32, rounds their products less.

    Args:
        queries: queries prepared under DOT_PRODUCT, float32 (queries, dimensions). They are not changed.

    Returns:
        The scaled queries, float32 (queries, dimensions), and the factor of each query, float32 (queries, 1). The
        caller must divide the scores of a query by its factor. A query with a length of 2**14 or more has the factor 1.
        The factor of a shorter query is a power of two, which causes no rounding, and gives the query a length of 2**14
        to 2**15. A zero vector stays zero.
    """
    lengths = np.maximum(_lengths(queries), _DOT_SCALE * 2.0**-_MAX_POWER)
    powers = np.maximum(np.ceil(np.log2(_DOT_SCALE / lengths)), 0)
    scales = np.exp2(powers).astype(np.float32)[:, None]
    return queries * scales, scales


def nearest(
    queries: Matrix, vectors: Matrix, k: int, distance: Distance, among: npt.NDArray[np.bool_] | None = None
) -> tuple[Labels, Matrix]:
    """Find the vectors nearest to each query by computing the score of each of the vectors for each query.

    Args:
        queries: prepared queries, float32 (queries, dimensions).
        vectors: prepared vectors, float32 (vectors, dimensions).
        k: maximum number of vectors to return for each query.
        distance: the distance.
        among: bool (vectors,), whether each vector may be returned; None: all may.

    Returns:
        The indexes of the nearest vectors in `vectors`, int64 (queries, k), nearest first, and their scores, float32 of
        the same shape. If fewer than `k` vectors may be returned, there are only so many columns.
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
        # Arrays are indexed with `across`, since np.take_along_axis takes longer than the comparison if there are few
        # queries.
        across = np.arange(len(chosen))[:, None]
        chosen_scores = found[across, chosen]
        order = np.argsort(-chosen_scores, axis=1, kind="stable")
        rows[part] = chosen[across, order]
        best[part] = chosen_scores[across, order]
    return rows, best


def best_of(found: Sequence[tuple[Labels, Matrix]], k: int) -> tuple[Labels, Matrix]:
    """Merge the results of one or more searches for the same queries.

    Args:
        found: the labels that each search found, int64 (queries, any number), nearest first, and their scores, float32
            of the same shape. A label that two searches found is not merged.
        k: maximum number of labels to return for each query.

    Returns:
        Labels, int64 (queries, at most k), nearest first, and their scores, float32 of the same shape. Labels with
        equal scores are in the order of the searches. If `found` has a single search, its labels and scores are
        returned unchanged, even if there are more than `k`.
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

    The score is the cosine, the dot product of the vectors before `prepare`, or the negative Euclidean distance; a
    greater score is nearer. hnswlib's distance is 1 - product of the prepared vectors, or the squared Euclidean
    distance.
    """
    if distance is Distance.EUCLIDEAN:
        return -np.sqrt(np.maximum(distances, 0))
    return _unscaled(1 - distances, distance)


def greatest_score(distance: Distance) -> float | None:
    """Return the score of a vector that is equal to the query; None for dot products, which have no greatest score."""
    return {Distance.COSINE: 1.0, Distance.EUCLIDEAN: 0.0}.get(distance)


def _scores(queries: Matrix, vectors: Matrix, distance: Distance) -> Matrix:
    """Return the scores, as in `graph_scores`, of prepared vectors for prepared queries: float32 (queries, vectors)."""
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
    """Return the lengths of vectors, float64 (vectors,).

    They are computed in float64, since squares of float32 numbers may overflow, or become 0, in float32.
    """
    lengths: npt.NDArray[np.float64] = np.sqrt(np.einsum("ij,ij->i", matrix, matrix, dtype=np.float64))
    return lengths
