"""Reference outputs: what PyTorch gave for some texts, kept in the bundle.

With them a bundle can be checked on a host that has no PyTorch: whoever runs
the ONNX file must get the same numbers.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from emberpc.bundle.errors import BundleError

REFERENCE_NAME = "reference.npz"


@dataclass(frozen=True)
class Reference:
    """Texts with the outputs that PyTorch's fp32 gave for them.

    `embeddings` is float32 (texts, dimensions); `logits` is float32 (texts,
    labels), or None for an embedder. No prompt was put before the texts.
    """

    texts: tuple[str, ...]
    embeddings: npt.NDArray[np.float32]
    logits: npt.NDArray[np.float32] | None = None

    def write(self, folder: Path) -> None:
        """Write `reference.npz` into a folder."""
        arrays: dict[str, npt.NDArray[np.generic]] = {"texts": np.array(self.texts), "embeddings": self.embeddings}
        if self.logits is not None:
            arrays["logits"] = self.logits
        np.savez_compressed(folder / REFERENCE_NAME, allow_pickle=False, **arrays)

    @classmethod
    def read(cls, folder: Path) -> Reference:
        """Read `reference.npz` from a folder.

        Raises:
            BundleError: it is missing or damaged.
        """
        try:
            with np.load(folder / REFERENCE_NAME, allow_pickle=False) as arrays:
                texts = tuple(str(text) for text in arrays["texts"])
                logits = arrays["logits"].astype(np.float32) if "logits" in arrays else None
                return cls(texts, arrays["embeddings"].astype(np.float32), logits)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise BundleError(f"{REFERENCE_NAME} cannot be read ({error}); export the model again") from error
