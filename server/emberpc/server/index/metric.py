"""Distances: how vectors are prepared, checked, compared and scored."""

from __future__ import annotations

import numpy as np

from emberpc.server.errors import FieldPath, Violation, invalid_fields
from emberpc.server.index.types import Distance, Matrix

#: hnswlib's name of the space. Vectors are normalised here, so cosine is an inner product too.
SPACES = {Distance.COSINE: "ip", Distance.DOT_PRODUCT: "ip", Distance.EUCLIDEAN: "l2"}


def check_vectors(matrix: Matrix, dimensions: int, distance: Distance, path: FieldPath) -> None:
    """Raise INVALID_ARGUMENT, naming each vector that is not fit to be stored or searched for.

    hnswlib takes a short vector and corrupts the heap, and takes NaN and gives nonsense.

    Args:
        matrix: float32, shape (vectors, any).
        dimensions: what the second axis must be.
        distance: under COSINE, a vector needs a direction.
        path: what the request calls vector i.
    """
    if matrix.ndim != 2 or matrix.shape[1] != dimensions:
        width = matrix.shape[1] if matrix.ndim == 2 else 0
        raise invalid_fields([Violation(path(0), f"has {width} dimensions, the collection has {dimensions}")])
    with np.errstate(over="ignore", invalid="ignore"):
        squares = np.einsum("ij,ij->i", matrix, matrix)
    violations = []
    for i in np.flatnonzero(~np.isfinite(squares) | (squares == 0)):
        if not np.isfinite(matrix[i]).all():
            violations.append(Violation(path(int(i)), "holds NaN or infinity; every value must be a finite number"))
        elif not np.isfinite(squares[i]):
            violations.append(Violation(path(int(i)), "is too large: its length is beyond float32; scale it down"))
        elif distance is Distance.COSINE:
            violations.append(Violation(path(int(i)), "has length zero, so no direction; cosine cannot compare it"))
    if violations:
        raise invalid_fields(violations)


def prepare(matrix: Matrix, distance: Distance) -> Matrix:
    """Return vectors as graph and buffer hold them: of length 1 under COSINE; float32, contiguous."""
    if distance is Distance.COSINE:
        matrix = matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
    return np.ascontiguousarray(matrix, dtype=np.float32)


def scores(queries: Matrix, vectors: Matrix, distance: Distance) -> Matrix:
    """Score prepared vectors against prepared queries: float32 (queries, vectors); greater is nearer."""
    products = queries @ vectors.T
    if distance is not Distance.EUCLIDEAN:
        return products
    squares = np.einsum("ij,ij->i", queries, queries)[:, None] + np.einsum("ij,ij->i", vectors, vectors)[None, :]
    return np.asarray(-np.sqrt(np.maximum(squares - 2 * products, 0)), dtype=np.float32)


def graph_scores(distances: Matrix, distance: Distance) -> Matrix:
    """Turn what hnswlib gives into scores; greater is nearer."""
    return -np.sqrt(np.maximum(distances, 0)) if distance is Distance.EUCLIDEAN else 1 - distances
