"""Reference outputs: outputs of PyTorch for some texts, stored in the bundle.

With the reference outputs, a bundle can be checked on a host without PyTorch: on that host, the outputs of the ONNX
file for these texts must agree with the reference outputs, within the bounds of the variant.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from emberpc.bundle.arrays import read_arrays
from emberpc.bundle.errors import BundleError

REFERENCE_NAME = "reference.npz"
#: Limit of the unpacked size of `reference.npz` in bytes, since a small damaged or malicious file could unpack to more
#: than the memory. An export writes 16 texts with their outputs, which are far below the limit.
MAX_REFERENCE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Reference:
    """Texts, and the outputs for them of the source in PyTorch, in fp32.

    `vectors` is float32 (texts, dimensions), the vectors of the encoder, also for a classifier. `logits` is float32
    (texts, labels), or None for an embedding model. No prompt was put before the texts. Texts of more than the model's
    `max_tokens` were truncated at their end.
    """

    texts: tuple[str, ...]
    vectors: npt.NDArray[np.float32]
    logits: npt.NDArray[np.float32] | None = None

    def write(self, folder: Path) -> None:
        """Write the texts and outputs to `reference.npz` in a folder; an existing file is replaced."""
        arrays: dict[str, npt.NDArray[np.generic]] = {"texts": np.array(self.texts), "embeddings": self.vectors}
        if self.logits is not None:
            arrays["logits"] = self.logits
        np.savez_compressed(folder / REFERENCE_NAME, allow_pickle=False, **arrays)

    @classmethod
    def read(cls, folder: Path) -> Reference:
        """Read texts and outputs from `reference.npz` in a folder.

        Raises:
            BundleError: the file is missing, damaged or larger than `MAX_REFERENCE_BYTES` when unpacked, lacks texts
                or vectors, or has another number of outputs than of texts or outputs that are no matrix.
        """
        path = folder / REFERENCE_NAME
        arrays = read_arrays(path, "reference outputs", MAX_REFERENCE_BYTES)
        try:
            texts = tuple(str(text) for text in arrays["texts"])
            vectors = arrays["embeddings"].astype(np.float32)
            logits = arrays["logits"].astype(np.float32) if "logits" in arrays else None
        except (KeyError, ValueError, TypeError) as error:
            raise BundleError(f"{path} cannot be read as reference outputs; export the model again") from error
        if not texts:
            raise BundleError(f"{path} holds no texts; export the model again")
        for matrix in (vectors, logits):
            if matrix is not None and (matrix.ndim != 2 or len(matrix) != len(texts)):
                raise BundleError(f"{path} has another number of outputs than of texts; export the model again")
        return cls(texts, vectors, logits)
