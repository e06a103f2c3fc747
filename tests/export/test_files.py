"""Files of the export are written whole or not at all; links are followed, and only regular files are replaced."""

from __future__ import annotations

import stat
from os import mkfifo
from pathlib import Path

import pytest

from emberpc.export.errors import ExportError
from emberpc.export.files import staged, write_text


def test_write_text_writes_to_the_target_of_a_link(tmp_path: Path) -> None:
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


def test_a_failing_block_keeps_the_old_file(tmp_path: Path) -> None:
    path = write_text(tmp_path / "file", "before")
    with pytest.raises(RuntimeError), staged(path) as beside:
        beside.write_text("half")
        raise RuntimeError
    assert path.read_text() == "before"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
