"""The linear head of a classifier, stored in a file of its own beside the classifier's graph.

The graph contains the head, too. With the separate file, a server can run one encoder for an embedding model and for
the classifiers with the same encoder: the server applies each classifier's head to the encoder's vectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from emberpc.bundle.arrays import read_arrays
from emberpc.bundle.errors import BundleError

HEAD_NAME = "head.npz"
#: Limit of the unpacked size of `head.npz` in bytes, since a small file can unpack to more than the memory holds. It
#: is enough for a head of 4,096 dimensions and 30,000 labels.
MAX_HEAD_BYTES = 512 * 2**20


def unit(vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return vectors, float32 (texts, dimensions), normalized to length 1, as a new array.

    Zero vectors stay zero. A vector shorter than 1e-12 is divided by 1e-12, so it stays shorter than 1.
    """
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12), dtype=np.float32)


@dataclass(frozen=True)
class Head:
    """A linear head on vectors of length 1: logits = vectors @ weights + bias.

    `weights` is float32 (dimensions, labels), `bias` float32 (labels,).
    """

    weights: npt.NDArray[np.float32]
    bias: npt.NDArray[np.float32]

    def logits(self, vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return the logits, float32 (texts, labels), of vectors, float32 (texts, dimensions).

        The vectors need not have length 1: they are normalized first.
        """
        return np.asarray(unit(vectors) @ self.weights + self.bias, dtype=np.float32)

    def write(self, folder: Path) -> None:
        """Write the head to `head.npz` in an existing folder; an existing file is replaced."""
        np.savez(folder / HEAD_NAME, allow_pickle=False, weights=self.weights, bias=self.bias)

    @classmethod
    def read(cls, folder: Path, dimensions: int, labels: int) -> Head:
        """Read a head from `head.npz` in a folder.

        Args:
            folder: the bundle.
            dimensions: number of dimensions that the head must have.
            labels: number of labels that the head must have.

        Raises:
            BundleError: the file is missing, damaged or larger than `MAX_HEAD_BYTES` when unpacked, or has other
                numbers of dimensions or labels.
        """
        path = folder / HEAD_NAME
        arrays = read_arrays(path, "a head", MAX_HEAD_BYTES)
        try:
            head = cls(arrays["weights"].astype(np.float32), arrays["bias"].astype(np.float32))
        except (KeyError, ValueError, TypeError) as error:
            raise BundleError(f"{path} cannot be read as a head; export the model again") from error
        if head.weights.shape != (dimensions, labels) or head.bias.shape != (labels,):
            raise BundleError(
                f"{path} has the shape {head.weights.shape}, not ({dimensions}, {labels}); export the model again"
            )
        return head
