"""Files of a caller: links are followed, and only regular files are replaced."""

from __future__ import annotations

import errno
import os
import socket
import stat
import threading
from os import mkfifo
from pathlib import Path
from typing import Any

import pytest

from emberpc.client import InputError, Internal
from emberpc.client._core.backups import BackupWriter
from emberpc.client._core.files import NewFile
from emberpc.v1 import index_pb2 as pb
from fake_server import FakeServer
from killed_writer import kills

Shell = Any


class Reader:
    """Reads all bytes of a pipe in another thread."""

    def __init__(self, path: Path) -> None:
        self.found = b""
        self._thread = threading.Thread(target=self._read, args=(path,), daemon=True)
        self._thread.start()

    def _read(self, path: Path) -> None:
        self.found = path.read_bytes()

    def all(self) -> bytes:
        """Return the bytes of the pipe after its writer has closed it."""
        self._thread.join(300)
        assert not self._thread.is_alive()
        return self.found


def test_a_backup_replaces_the_target_of_a_link(fake: FakeServer, shell: Shell, tmp_path: Path) -> None:
    shell("create_collection", "c")
    (tmp_path / "disk").mkdir()
    link, target = tmp_path / "link", tmp_path / "disk" / "file"
    link.symlink_to(target)
    for before in (None, b"an older and longer one"):
        if before is not None:
            target.write_bytes(before)
        assert shell("backup_collection", "c", link) == len(fake.backup)
        assert link.is_symlink()
        assert target.read_bytes() == fake.backup
        assert [path.name for path in target.parent.iterdir()] == ["file"]
        target.unlink()


def test_a_backup_is_written_into_a_pipe_and_the_pipe_stays(fake: FakeServer, shell: Shell, tmp_path: Path) -> None:
    shell("create_collection", "c")
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    mkfifo(pipe)
    link.symlink_to(pipe)
    for path in (pipe, link):
        reader = Reader(pipe)
        assert shell("backup_collection", "c", path) == len(fake.backup)
        assert reader.all() == fake.backup
        assert stat.S_ISFIFO(pipe.lstat().st_mode)
        assert link.is_symlink()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["link", "pipe"]


def test_a_socket_and_a_cycle_of_links_are_refused(fake: FakeServer, shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(str(tmp_path / "s"))
        with pytest.raises(InputError, match="a socket; give the name of a file"):
            shell("backup_collection", "c", tmp_path / "s")
    with pytest.raises(OSError, match="symbolic links"):
        shell("backup_collection", "c", tmp_path / "circle")
    assert not fake.asked


def test_the_error_of_a_damaged_backup_names_the_pipe_that_received_it(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    mkfifo(pipe)
    reader = Reader(pipe)
    with pytest.raises(Internal, match="throw away what went into .*pipe"), BackupWriter(pipe, None) as writer:
        writer.write(pb.BackupCollectionResponse(chunk=b"x", sha256="0" * 64))
        writer.finish()
    assert reader.all() == b"x"


@pytest.fixture(params=[True, False], ids=["unnamed", "named"])
def unnamed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the file system has files without a name. NFS has none."""
    if not request.param:
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    elif not hasattr(os, "O_TMPFILE"):
        pytest.skip("this system has no files without a name")
    return bool(request.param)


def test_a_kill_at_any_line_leaves_the_old_or_the_new_file(tmp_path: Path, unnamed: bool) -> None:
    imports = "from emberpc.client._core import files as module"
    if not unnamed:
        imports += "\ndel os.O_TMPFILE"
    write = "with module.NewFile(path) as file:\n        file.file.write(new.encode())\n        file.commit()"
    found = kills(imports, write, tmp_path / "file")
    assert set(found.contents) == {"old", "new"}
    assert found.contents == sorted(found.contents, reverse=True)
    # Killed writers leave files of their own names, which no other writer uses; without a name, hardly any.
    left = found.left[-1]
    assert all(name.startswith(".") and name.endswith(".part") for name in left)
    assert len(left) == 1 if unnamed else len(left) > 1


def test_the_name_of_a_new_file_may_have_255_bytes(tmp_path: Path, unnamed: bool) -> None:
    path = tmp_path / ("b" * 255)
    with NewFile(path) as new:
        new.file.write(b"whole")
        new.commit()
    assert path.read_bytes() == b"whole"


def test_a_new_file_that_is_not_committed_leaves_the_old_one(tmp_path: Path, unnamed: bool) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with NewFile(path) as new:
        new.file.write(b"half")
        assert len(list(tmp_path.iterdir())) == 1 + (not unnamed)
    assert path.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unnamed: bool, step: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "file"
    path.write_text("old")
    monkeypatch.setattr(os if step == "fsync" else Path, step, fail)
    with pytest.raises(OSError, match="No space"), NewFile(path) as new:
        new.file.write(b"new")
        new.commit()
    assert path.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_writers_of_the_same_file_do_not_disturb_each_other(tmp_path: Path, unnamed: bool) -> None:
    path = tmp_path / "file"
    with NewFile(path) as first, NewFile(path) as second:
        first.file.write(b"first")
        second.file.write(b"second")
        second.commit()
        assert path.read_text() == "second"
        first.commit()
    assert path.read_text() == "first"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("mode", [0o600, 0o644])
def test_a_new_file_has_its_mode(tmp_path: Path, unnamed: bool, mode: int) -> None:
    with NewFile(tmp_path / "file", mode) as new:
        new.commit()
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode
