"""A full disk: an export fails in words and leaves nothing, half or whole."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

Emberpc = Any


@pytest.fixture
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A real file system that the tiny encoder's ONNX file, of 140 KB, does not fit into."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={request.param}k", "tmpfs", str(folder)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("a file system can be mounted by root only")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("small_disk", [64, 120], indirect=True)
@pytest.mark.parametrize("kind", ["embedding", "classifier"])
def test_an_export_to_a_full_disk_leaves_nothing(
    emberpc: Emberpc, small_disk: Path, tiny_source: Path, tmp_path: Path, kind: str
) -> None:
    train = tmp_path / "train.csv"
    train.write_text("text,label\n" + "".join(f"text {i},{i % 2}\n" for i in range(20)))
    arguments = [tiny_source] if kind == "embedding" else ["--base", tiny_source, "--train", train]
    outcome = emberpc("export", kind, *arguments, "-o", small_disk / "bundle")
    assert outcome.code == 2, outcome.err
    assert "is there room on the disk?" in outcome.err.splitlines()[-1]
    assert list(small_disk.iterdir()) == []
