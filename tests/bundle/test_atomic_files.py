"""Files are replaced atomically: the old file or the new one is there, complete, after errors and kills too."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

from emberpc.bundle import atomic_files
from emberpc.bundle.atomic_files import atomic_path, write_text_atomically
from killed_writer import kills


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    "write",
    [
        "module.write_text_atomically(path, new)",
        # As hnswlib does: a child process writes to the path that it is given.
        """with module.atomic_path(path) as temporary:
        if not (child := os.fork()):
            temporary.write_text(new)
            os._exit(0)
        os.waitpid(child, 0)""",
    ],
    ids=["text", "child process"],
)
def test_a_kill_at_any_line_leaves_the_old_or_the_new_file(tmp_path: Path, write: str) -> None:
    found = kills("from emberpc.bundle import atomic_files as module", write, tmp_path / "file")
    assert set(found.contents) == {"old", "new"}
    assert found.contents == sorted(found.contents, reverse=True)
    # Each writer removed the file that the killed writer before had left.
    assert {len(left) for left in found.left} == {0, 1}
    assert not found.left[-1]


@pytest.mark.parametrize("name", ["n" * 234, "n" * 235, "n" * 255, "é" * 127])
def test_a_long_name_is_replaced_and_files_of_a_killed_writer_are_removed(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    write_text_atomically(path, "old")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "unlink", fail_with(errno.EIO))  # as if the writer were killed before
        with pytest.raises(KeyboardInterrupt), atomic_path(path):
            raise KeyboardInterrupt
    assert len(names(tmp_path)) == 2
    write_text_atomically(path, "new")
    assert (names(tmp_path), path.read_text()) == ([name], "new")


def test_a_too_long_name_is_refused_before_the_block(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="too long"), atomic_path(tmp_path / ("n" * 256)):
        pytest.fail("the block ran")
    assert names(tmp_path) == []


def fail_with(code: int) -> Any:
    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize("step", ["write_text", "replace"])
def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    path = tmp_path / "file"
    write_text_atomically(path, "old")
    monkeypatch.setattr(Path, step, fail_with(errno.ENOSPC))
    with pytest.raises(OSError, match="No space"):
        write_text_atomically(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_a_file_that_cannot_be_synced_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_text_atomically(path, "old")
    monkeypatch.setattr(os, "fsync", fail_with(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        write_text_atomically(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_an_error_in_the_block_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text_atomically(path, "old")
    with pytest.raises(KeyboardInterrupt), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_file_and_folder_are_synced_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a power cut may leave an empty file under the new name."""
    path, steps = tmp_path / "file", []
    fsync, replace = os.fsync, Path.replace

    def synced(descriptor: int) -> None:
        steps.append(f"sync {Path(f'/proc/self/fd/{descriptor}').readlink().name.partition('.')[0]}")
        fsync(descriptor)

    def replaced(temporary: Path, target: Path) -> Path:
        steps.append("replace")
        return replace(temporary, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    write_text_atomically(path, "new")
    assert steps == ["sync file", "replace", f"sync {tmp_path.name}"]


def test_writers_of_the_same_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with atomic_path(path) as first, atomic_path(path) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
        assert not path.exists()
    assert path.read_text() == "first"
    assert names(tmp_path) == ["file"]


def test_a_file_that_is_removed_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another writer may see the new file before it is locked, and remove it as abandoned."""
    flock, removed = fcntl.flock, list[Path]()

    def remove_first(descriptor: int, operation: int) -> None:
        if not removed:
            removed.extend(tmp_path.iterdir())
            removed[0].unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    write_text_atomically(tmp_path / "file", "text")
    assert len(removed) == 1
    assert (tmp_path / "file").read_text() == "text"


def test_only_new_files_of_the_same_name_are_removed(tmp_path: Path) -> None:
    abandoned, others = "file.0123456789abcdef.tmp", ["file.old.tmp", "file2.0123456789abcdef.tmp", "other"]
    for name in (abandoned, *others):
        (tmp_path / name).write_text("text")
    write_text_atomically(tmp_path / "file", "text")
    assert names(tmp_path) == sorted(["file", *others])


def test_a_pipe_with_the_name_of_an_abandoned_file_is_kept(tmp_path: Path) -> None:
    pipe = "file.0123456789abcdef.tmp"
    os.mkfifo(tmp_path / pipe)
    write_text_atomically(tmp_path / "file", "text")
    assert names(tmp_path) == ["file", pipe]


def test_a_file_system_without_locks_keeps_abandoned_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", fail_with(errno.ENOLCK))
    (tmp_path / "file.0123456789abcdef.tmp").write_text("half")
    write_text_atomically(tmp_path / "file", "text")
    assert (tmp_path / "file").read_text() == "text"
    assert names(tmp_path) == ["file", "file.0123456789abcdef.tmp"]


def test_a_folder_that_cannot_be_read_may_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync = atomic_files.sync_to_disk

    def refuse(path: Path) -> None:
        if path == tmp_path:
            raise PermissionError(errno.EACCES, "Permission denied")
        sync(path)

    monkeypatch.setattr(atomic_files, "sync_to_disk", refuse)
    write_text_atomically(tmp_path / "file", "text")
    assert (tmp_path / "file").read_text() == "text"
