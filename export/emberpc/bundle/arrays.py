"""Read arrays from a bundle's npz files without trusting the files: they may be damaged or malicious."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from emberpc.bundle.errors import BundleError

#: Errors of a file that cannot be read or is damaged. RuntimeError: a member is encrypted, or compressed by a method
#: that zipfile does not know. MemoryError: a member states a shape that is too large.
_DAMAGE = (OSError, ValueError, KeyError, EOFError, MemoryError, RuntimeError, zipfile.BadZipFile, zlib.error)


def read_arrays(path: Path, what: str, max_bytes: int) -> dict[str, npt.NDArray[Any]]:
    """Return all arrays of an npz file, by name.

    Args:
        path: the file.
        what: name of the content, for error messages.
        max_bytes: limit of the unpacked size in bytes; a file of some megabytes can unpack to gigabytes.

    Raises:
        BundleError: the file cannot be read, is damaged, unpacks to more than `max_bytes`, has a member that is no
            array, or has an array of Python objects (pickled), which could run code when read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > max_bytes:
            raise BundleError(f"{path} unpacks to {size} bytes; the limit is {max_bytes}")
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
        if not all(isinstance(array, np.ndarray) for array in found.values()):
            raise BundleError(f"{path} has a member that is no array; export the model again")
    except _DAMAGE as error:
        raise BundleError(f"{path} cannot be read as {what}; export the model again") from error
    return found
