"""Files of -o: --overwrite replaces existing ones, links are followed, pipes are written into or refused."""

from __future__ import annotations

import errno
import os
import stat
import threading
from os import mkfifo
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emberpc.cli import output_files
from fake_server import FakeServer

Emberpc = Any


def test_embed_replaces_an_existing_file_only_with_overwrite(
    emberpc: Emberpc, fake: FakeServer, tmp_path: Path
) -> None:
    target = tmp_path / "v.npy"
    target.write_bytes(b"mine")
    outcome = emberpc("embed", "a", "-o", target)
    assert (outcome.code, outcome.err) == (
        2,
        f"error: --output: {target} is there already; choose another name, or --overwrite\n",
    )
    assert target.read_bytes() == b"mine"
    assert not fake.asked
    assert emberpc("embed", "a", "-o", target, "--overwrite").code == 0
    assert np.load(target).shape == (1, 8)


def test_embed_writes_to_the_target_of_a_link(emberpc: Emberpc, fake: FakeServer, tmp_path: Path) -> None:
    link, target = tmp_path / "link.npy", tmp_path / "target.npy"
    target.write_bytes(b"older")
    link.symlink_to(target)
    assert emberpc("embed", "a", "-o", link).code == 2
    assert emberpc("embed", "a", "-o", link, "--overwrite").code == 0
    assert link.is_symlink()
    assert np.load(target).shape == (1, 8)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.npy", "target.npy"]
    (tmp_path / "circle.npy").symlink_to(tmp_path / "circle.npy")
    circle = emberpc("embed", "a", "-o", tmp_path / "circle.npy")
    assert circle.code == 2
    assert "symbolic links" in circle.err


def test_embed_refuses_a_pipe_as_output(emberpc: Emberpc, fake: FakeServer, tmp_path: Path) -> None:
    pipe = tmp_path / "v.npy"
    mkfifo(pipe)
    for extra in ([], ["--overwrite"]):
        outcome = emberpc("embed", "a", "-o", pipe, *extra)
        assert outcome.code == 2
        assert "is a device or a pipe" in outcome.err
    assert stat.S_ISFIFO(pipe.lstat().st_mode)
    assert not fake.asked


@pytest.mark.parametrize("command", ["export", "backup"])
def test_records_and_backups_are_written_into_a_pipe(
    emberpc: Emberpc, fake: FakeServer, tmp_path: Path, command: str
) -> None:
    assert emberpc("collection", "create", "c", "--model", "canned").code == 0
    assert emberpc("upsert", "c", "-", stdin='{"id": "a", "text": "t"}\n').code == 0
    pipe = tmp_path / "records.jsonl"
    mkfifo(pipe)
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append(pipe.read_bytes()), daemon=True)
    reader.start()
    outcome = emberpc("collection", command, "c", "-o", pipe)
    reader.join(300)
    # Nothing else goes to stdout, which may be the pipe.
    assert (outcome.code, outcome.out) == (0, "")
    assert "wrote 1 records to" in outcome.err if command == "export" else "wrote 8 bytes to" in outcome.err
    assert found[0].startswith(b'{"id": "a"' if command == "export" else fake.backup)
    assert stat.S_ISFIFO(pipe.lstat().st_mode)


def test_a_file_is_written_to_a_folder_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Any, flags: int, *rest: Any) -> int:
        if path == tmp_path and not flags & os.O_WRONLY:
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path, flags, *rest)

    opened = os.open
    monkeypatch.setattr(os, "open", refuse)
    with output_files.atomic_file(tmp_path / "file") as file:
        file.write(b"x")
    assert (tmp_path / "file").read_bytes() == b"x"
