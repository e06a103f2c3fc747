"""Compare the nearest neighbours by the outputs of two ways to run a model."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from emberpc.bundle.head import unit

NEIGHBOURS = 10


def neighbour_agreement(expected: npt.NDArray[np.float32], got: npt.NDArray[np.float32]) -> float:
    """Return the mean share, in [0, 1], of a row's 10 nearest rows by cosine that are the same in both matrices.

    A row does not count among its own nearest rows. With fewer than 20 rows, half as many nearest rows as rows are
    compared, rounded down.

    Args:
        expected: outputs to compare with, by fp32 or PyTorch, float32 (texts, dimensions or labels); at least 2 rows.
        got: outputs of the variant for the same texts, of the same shape.
    """
    count = min(NEIGHBOURS, len(expected) // 2)
    pairs = zip(_nearest(expected, count), _nearest(got, count), strict=True)
    return float(np.mean([len(np.intersect1d(ours, theirs)) / count for ours, theirs in pairs]))


def _nearest(vectors: npt.NDArray[np.float32], count: int) -> npt.NDArray[np.int64]:
    similarities = unit(vectors) @ unit(vectors).T
    np.fill_diagonal(similarities, -np.inf)
    return np.argpartition(-similarities, count - 1, axis=1)[:, :count]
