"""Find the safetensors files with the weights of an encoder, and check that none is missing or cut off."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from emberpc.bundle.transformers_settings import read_json
from emberpc.export.errors import ExportError

_INDEX = "model.safetensors.index.json"


def find_weights(folder: Path) -> list[Path]:
    """Return all safetensors files in an encoder's folder, sorted by name.

    Raises:
        ExportError: there are no safetensors files, a file that model.safetensors.index.json names is missing, or a
            file's header is damaged or states another length.
        BundleError: model.safetensors.index.json cannot be read or is not a JSON object.
    """
    files = sorted(folder.glob("*.safetensors"))
    shards = read_json(folder / _INDEX).get("weight_map")
    if isinstance(shards, dict):
        missing = sorted({str(name) for name in shards.values()} - {path.name for path in files})
        if missing:
            raise ExportError(f"{folder / missing[0]} is missing, which {_INDEX} names; get the model again")
    if not files:
        raise ExportError(
            f"{folder} has no *.safetensors; other formats can run code when they are read: convert it, "
            "by loading it with transformers on a machine that may run that code, and saving it"
        )
    for path in files:
        _check(path)
    return files


def sha256_of_all(files: Sequence[Path]) -> str:
    """Return the SHA-256 (hex) of the contents of files, concatenated in the order given.

    Raises:
        ExportError: a file is missing.
        OSError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for path in files:
        if not path.is_file():
            raise ExportError(f"{path} is missing; other formats can run code when they are read: convert it")
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def _check(path: Path) -> None:
    """Raise ExportError for a file whose header cannot be read, or whose length is not that which the header states."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, OSError, ValueError) as error:
        raise ExportError(f"{path} is damaged ({type(error).__name__}); get it again") from error
