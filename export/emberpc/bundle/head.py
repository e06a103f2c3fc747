"""A linear head on vectors: a classifier's last step, kept beside its graph.

The graph has it too. With the file, a server can run one encoder for an
embedder and for all classifiers on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from emberpc.bundle.arrays import read_arrays
from emberpc.bundle.errors import BundleError

HEAD_NAME = "head.npz"
#: A head of 4,096 dimensions and 30,000 labels, unpacked (bytes).
MAX_HEAD_BYTES = 512 * 2**20


def unit(vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Give vectors, float32 (texts, dimensions), length 1; those of zeros stay as they are."""
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12), dtype=np.float32)


@dataclass(frozen=True)
class Head:
    """A linear head on vectors of length 1: logits = vectors @ weights + bias.

    `weights` is float32 (dimensions, labels), `bias` float32 (labels,).
    """

    weights: npt.NDArray[np.float32]
    bias: npt.NDArray[np.float32]

    def logits(self, vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return float32 (texts, labels) for float32 (texts, dimensions) of any length."""
        return np.asarray(unit(vectors) @ self.weights + self.bias, dtype=np.float32)

    def write(self, folder: Path) -> None:
        """Write `head.npz` into a folder."""
        np.savez(folder / HEAD_NAME, allow_pickle=False, weights=self.weights, bias=self.bias)

    @classmethod
    def read(cls, folder: Path, dimensions: int, labels: int) -> Head:
        """Read `head.npz` from a folder.

        Raises:
            BundleError: it is missing or damaged, or of another form than (dimensions, labels).
        """
        path = folder / HEAD_NAME
        arrays = read_arrays(path, "a head", MAX_HEAD_BYTES)
        try:
            head = cls(arrays["weights"].astype(np.float32), arrays["bias"].astype(np.float32))
        except (KeyError, ValueError, TypeError) as error:
            raise BundleError(f"{path} cannot be read as a head; export the model again") from error
        if head.weights.shape != (dimensions, labels) or head.bias.shape != (labels,):
            raise BundleError(
                f"{path} is of the form {head.weights.shape}, not ({dimensions}, {labels}); export the model again"
            )
        return head
