"""Files of the export are whole or not there; links are followed, and what is no file is never replaced."""

from __future__ import annotations

import stat
from os import mkfifo
from pathlib import Path

import pytest

from emberpc.export.errors import ExportError
from emberpc.export.files import staged, write_text


def test_a_link_is_followed(tmp_path: Path) -> None:
    link, target = tmp_path / "link", tmp_path / "target"
    link.symlink_to(target)
    for text in ("first", "second"):
        write_text(link, text)
        assert link.is_symlink()
        assert target.read_text() == text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "target"]


def test_a_pipe_is_refused_and_stays(tmp_path: Path) -> None:
    pipe = tmp_path / "report.json"
    mkfifo(pipe)
    with pytest.raises(ExportError, match="a device, a pipe or a folder"):
        write_text(pipe, "text")
    assert stat.S_ISFIFO(pipe.lstat().st_mode)


def test_a_file_stays_if_the_block_fails(tmp_path: Path) -> None:
    path = write_text(tmp_path / "file", "before")
    with pytest.raises(RuntimeError), staged(path) as beside:
        beside.write_text("half")
        raise RuntimeError
    assert path.read_text() == "before"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
