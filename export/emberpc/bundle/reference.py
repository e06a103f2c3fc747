"""Reference outputs: outputs of PyTorch for some texts, stored in the bundle.

With the reference outputs, a bundle can be checked on a host without PyTorch: the outputs of the ONNX file on that host
must agree with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from emberpc.bundle.arrays import read_arrays
from emberpc.bundle.errors import BundleError

REFERENCE_NAME = "reference.npz"
#: Limit of the unpacked size of `reference.npz` in bytes. Some tens of texts with their outputs are far below it.
MAX_REFERENCE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Reference:
    """Texts with the outputs of PyTorch's fp32 for them.

    `embeddings` is float32 (texts, dimensions). `logits` is float32 (texts, labels), or None for an embedding model.
    The texts have no prompt, and texts with too many tokens were truncated at their end.
    """

    texts: tuple[str, ...]
    embeddings: npt.NDArray[np.float32]
    logits: npt.NDArray[np.float32] | None = None

    def write(self, folder: Path) -> None:
        """Write the texts and outputs to `reference.npz` in a folder; an existing file is replaced."""
        arrays: dict[str, npt.NDArray[np.generic]] = {"texts": np.array(self.texts), "embeddings": self.embeddings}
        if self.logits is not None:
            arrays["logits"] = self.logits
        np.savez_compressed(folder / REFERENCE_NAME, allow_pickle=False, **arrays)

    @classmethod
    def read(cls, folder: Path) -> Reference:
        """Read texts and outputs from `reference.npz` in a folder.

        Raises:
            BundleError: the file is missing, damaged or larger than `MAX_REFERENCE_BYTES` when unpacked, has no texts,
                or has another number of outputs than of texts.
        """
        path = folder / REFERENCE_NAME
        arrays = read_arrays(path, "reference outputs", MAX_REFERENCE_BYTES)
        try:
            texts = tuple(str(text) for text in arrays["texts"])
            embeddings = arrays["embeddings"].astype(np.float32)
            logits = arrays["logits"].astype(np.float32) if "logits" in arrays else None
        except (KeyError, ValueError, TypeError) as error:
            raise BundleError(f"{path} cannot be read as reference outputs; export the model again") from error
        if not texts:
            raise BundleError(f"{path} holds no texts; export the model again")
        for matrix in (embeddings, logits):
            if matrix is not None and (matrix.ndim != 2 or len(matrix) != len(texts)):
                raise BundleError(f"{path} has another number of outputs than of texts; export the model again")
        return cls(texts, embeddings, logits)
