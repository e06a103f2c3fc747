"""Files of a caller: links are followed, and only regular files are replaced."""

from __future__ import annotations

import socket
import stat
import threading
from os import mkfifo
from pathlib import Path
from typing import Any

import pytest

from emberpc.client import InputError, Internal
from emberpc.client._core.backups import BackupWriter
from emberpc.v1 import index_pb2 as pb
from fake_server import FakeServer

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
