"""Parts of files are hashed piece by piece."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from emberpc.bundle import BundleError
from emberpc.bundle.hashing import _CHUNK_BYTES, sha256_of_part

CONTENT = bytes(range(256)) * (_CHUNK_BYTES // 128) + b"end"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "file"
    found.write_bytes(CONTENT)
    return found


@pytest.mark.parametrize("offset", [0, 1, _CHUNK_BYTES, len(CONTENT)])
@pytest.mark.parametrize("length", [None, 0, 1, _CHUNK_BYTES, _CHUNK_BYTES + 1])
def test_the_hash_of_a_part_covers_exactly_its_bytes(path: Path, offset: int, length: int | None) -> None:
    part = CONTENT[offset:] if length is None else CONTENT[offset : offset + length]
    if length is not None and len(part) < length:
        with pytest.raises(BundleError, match="shorter than the ONNX file says"):
            sha256_of_part(path, offset, length)
    else:
        assert sha256_of_part(path, offset, length) == hashlib.sha256(part).digest()


def test_a_file_that_cannot_be_read_is_named_in_the_error(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="none cannot be read"):
        sha256_of_part(tmp_path / "none")
