"""Writes that are lost by a damaged write-ahead log are reported, and a whole log is not."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from emberpc.server.collections import CollectionSpec
from emberpc.server.errors import Code
from emberpc.server.index import Index
from emberpc.server.index.storage import wal
from emberpc.server.index.storage.database import connect, transaction
from index.support import gaussian, numbered, refused

WRITES = 6


@pytest.fixture(scope="module")
def crashed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory as a crash leaves it after some writes."""
    folder = tmp_path_factory.mktemp("data")
    copy = tmp_path_factory.mktemp("copies") / "copy"
    with closing(Index(folder)) as index:
        collection = index.create(CollectionSpec("c", 8))
        for i in range(WRITES):
            collection.upsert(numbered(3, first=3 * i), gaussian(3, 8, seed=i))
        shutil.copytree(folder, copy)
    return copy


def log_of(data: Path) -> Path:
    (path,) = data.glob("collections/*/records.db-wal")
    return path


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def offset_of(frame: int) -> int:
    return 32 + (frame - 1) * (24 + 4096)


def damaged(crashed: Path, folder: Path, offset: Callable[[list[int]], int]) -> tuple[Path, int]:
    """Copy the data directory of the crash, and flip a bit of the log; return the copy and its number of commits."""
    data = folder / "data"
    shutil.copytree(crashed, data)
    path = log_of(data)
    found = wal.inspect(path.with_name("records.db"))
    assert found is not None
    assert found.readable
    assert found.commits[-1] == found.frames
    flip(path, offset(found.commits))
    return data, len(found.commits)


def count_of(data: Path) -> int:
    with closing(Index(data)) as index:
        return index.get("c").count()


def test_a_whole_log_is_not_reported(crashed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = tmp_path / "data"
    shutil.copytree(crashed, data)
    assert count_of(data) == 3 * WRITES
    assert "log" not in caplog.text


@pytest.mark.parametrize(
    ("offset", "records", "lost"),
    [
        (lambda commits: offset_of(commits[-3]) + 24 + 2000, 3 * (WRITES - 3), "3 acknowledged writes"),
        (lambda commits: offset_of(commits[-3] + 1) + 24 + 100, 3 * (WRITES - 2), "2 acknowledged writes"),
        (
            lambda commits: offset_of(commits[-2]) + 8,
            3 * (WRITES - 2),
            "is not whole",
        ),  # a salt: the write with this frame is not counted
        (lambda commits: offset_of(commits[-2]) + 17, 3 * (WRITES - 2), "2 acknowledged writes"),  # the checksum
        (lambda commits: offset_of(commits[-1]) + 24, 3 * (WRITES - 1), "is not whole"),
    ],
    ids=["page", "first frame of a write", "salt", "checksum", "last write"],
)
def test_writes_that_a_damaged_log_loses_are_reported(
    crashed: Path,
    tmp_path: Path,
    offset: Callable[[list[int]], int],
    records: int,
    lost: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    data, _ = damaged(crashed, tmp_path, offset)
    assert count_of(data) == records
    (message,) = [record.getMessage() for record in caplog.records if "write-ahead log" in record.getMessage()]
    assert "collection 'c'" in message
    assert lost in message
    missing = WRITES - records // 3
    assert f"{missing} acknowledged writes are lost: number {WRITES} was" in caplog.text
    # A loss is reported only once.
    caplog.clear()
    assert count_of(data) == records
    assert "log" not in caplog.text


@pytest.mark.parametrize("place", [0, 5, 9, 17, 26])
def test_a_damaged_header_of_a_log_is_reported(
    crashed: Path, tmp_path: Path, place: int, caplog: pytest.LogCaptureFixture
) -> None:
    data, _ = damaged(crashed, tmp_path, lambda _: place)
    with closing(Index(data)) as index:
        assert [spec.name for spec in index.page(10, "")[0]] == ["c"]
        with refused(Code.INTERNAL, "'c'", "damaged", "restore a backup"):  # only the log had its tables
            index.get("c")
    assert "the header of its write-ahead log is damaged" in caplog.text


def test_a_damaged_log_of_the_catalogue_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with closing(Index(tmp_path / "first")) as index:
        for name in "abc":
            index.create(CollectionSpec(name, 8))
        shutil.copytree(tmp_path / "first", tmp_path / "copy")
    found = wal.inspect(tmp_path / "copy" / "catalogue.db")
    assert found is not None
    flip(tmp_path / "copy" / "catalogue.db-wal", offset_of(found.commits[-2]) + 1000)
    Index(tmp_path / "copy").close()
    assert "the catalogue: its write-ahead log is damaged" in caplog.text


def test_uncommitted_and_stale_frames_are_not_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "records.db"
    with closing(connect(path, create=True)) as connection:
        connection.execute("CREATE TABLE t (data BLOB)")
        connection.execute("PRAGMA cache_size = 5")
        connection.execute("BEGIN")
        for _ in range(50):
            connection.execute("INSERT INTO t VALUES (zeroblob(4000))")
        connection.execute("ROLLBACK")
        written = path.with_name("records.db-wal").stat().st_size
        with transaction(connection):
            connection.execute("INSERT INTO t VALUES (1)")
        assert written > offset_of(20)
        check_nothing_is_reported(path, tmp_path / "spilled", caplog)
        for _ in range(9):
            connection.execute("INSERT INTO t VALUES (zeroblob(4000))")
        # From here on, the log is written from its beginning, over frames of an older generation.
        connection.execute("PRAGMA wal_checkpoint(RESTART)")
        connection.execute("INSERT INTO t VALUES (2)")
        check_nothing_is_reported(path, tmp_path / "stale", caplog)


def check_nothing_is_reported(path: Path, copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    copy.mkdir()
    for each in (path, path.with_name("records.db-wal")):
        shutil.copy(each, copy)
    found = wal.inspect(copy / path.name)
    assert found is not None
    with closing(connect(copy / path.name)) as connection:
        wal.report_lost_commits(connection, found, "it")
    assert caplog.text == ""


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(bytes(path.stat().st_size)),
        lambda path: path.write_bytes(path.read_bytes().replace(b"6 ", b"7 ")),
        lambda path: path.write_bytes(b"another" + path.read_bytes()[7:]),
    ],
    ids=["missing", "empty", "zeros", "damaged", "of another database"],
)
def test_an_unreadable_file_of_the_last_write_is_ignored(
    crashed: Path, tmp_path: Path, change: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    data = tmp_path / "data"
    shutil.copytree(crashed, data)
    (path,) = data.glob("collections/*/acknowledged")
    change(path)
    assert count_of(data) == 3 * WRITES
    assert caplog.text == ""


def test_a_lost_log_is_reported(crashed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """SQLite treats a database without a log as one that was closed."""
    data = tmp_path / "data"
    with closing(Index(data)) as index:
        index.create(CollectionSpec("c", 8)).upsert(numbered(3), gaussian(3, 8))
    copy = tmp_path / "copy"
    with closing(Index(data)) as index:
        index.get("c").upsert(numbered(3, first=3), gaussian(3, 8))
        index.get("c").delete(["r00001"])
        shutil.copytree(data, copy)
    log_of(copy).unlink()
    assert count_of(copy) == 3
    assert "collection 'c': 2 acknowledged writes are lost: number 3 was" in caplog.text


def test_a_write_succeeds_if_the_file_of_the_last_write_cannot_be_written(tmp_path: Path) -> None:
    with closing(Index(tmp_path)) as index:
        collection = index.create(CollectionSpec("c", 8))
        (folder,) = (tmp_path / "collections").iterdir()
        (folder / "acknowledged").unlink()
        (folder / "acknowledged").mkdir()
        assert collection.upsert(numbered(3), gaussian(3, 8)).inserted == 3
    assert count_of(tmp_path) == 3
