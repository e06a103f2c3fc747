"""Helpers of the tests of the index: records, recall, databases of older versions, and expected errors."""

from __future__ import annotations

import os
import sqlite3
import tempfile
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime, tzinfo
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emberpc.server.collections import NewRecord
from emberpc.server.collections.types import Matrix
from emberpc.server.errors import Code, ServiceError
from emberpc.server.index import Collection, Index
from emberpc.server.index.jobs.expiry import ExpiryThread
from emberpc.server.index.storage import schema, store
from emberpc.server.index.storage.damage import lenient_text
from emberpc.server.index.storage.rows import DAMAGE_ERRORS, ROW_COLUMNS, Row
from index_helpers import records, true_scores
from waiting import Changes


def gaussian(count: int, dimensions: int, seed: int = 0) -> Matrix:
    return np.random.default_rng(seed).standard_normal((count, dimensions), dtype=np.float32)


def numbered(count: int, first: int = 0) -> list[NewRecord]:
    return records(*(f"r{i:05}" for i in range(first, first + count)))


def recall(collection: Collection, truth: Mapping[str, Matrix], queries: Matrix, k: int) -> float:
    """Return the share of the true k nearest records that searches find; a hit as near as the k-th counts."""
    vectors = np.stack(list(truth.values()))
    found = 0
    for query, outcome in zip(queries, collection.search(queries, k), strict=True):
        scores = true_scores(query, vectors, collection.spec.distance)
        bound = np.sort(scores)[-min(k, len(scores))]
        by_id = dict(zip(truth, scores.tolist(), strict=True))
        found += sum(by_id[record.id] >= bound - 1e-5 for record, _ in outcome.hits)
    return found / (len(queries) * min(k, len(vectors)))


def make_older(connection: sqlite3.Connection, version: int) -> None:
    """Change the tables of a collection's database to those of an older format, whose `user_version` is 0, 4 or 6."""
    connection.execute("ALTER TABLE state DROP COLUMN unconverted")
    connection.execute("ALTER TABLE records DROP COLUMN row_checksum")
    if version < 6:
        _make_much_older(connection, version)
    connection.execute(f"PRAGMA user_version = {version}")
    connection.commit()


def _make_much_older(connection: sqlite3.Connection, version: int) -> None:
    connection.executescript("DROP TRIGGER words_of_new; DROP TRIGGER words_of_old; DROP TABLE words")
    for column in ("search_text", "text_checksum"):
        connection.execute(f"ALTER TABLE records DROP COLUMN {column}")
    if version == 0:
        connection.executescript(
            "DROP INDEX records_expiring; ALTER TABLE records DROP COLUMN expires; "
            "ALTER TABLE records DROP COLUMN checksum; ALTER TABLE state DROP COLUMN identity"
        )
    else:
        assert version == 4
        for statement in schema.STEPS[0]:
            connection.execute(statement)


def make_checksums_right(connection: sqlite3.Connection) -> None:
    """Set the checksums of each record of a database to those of its values, if its values can have checksums."""
    connection.text_factory = lenient_text
    for row in [Row(*values) for values in connection.execute(f"SELECT {ROW_COLUMNS} FROM records")]:
        with suppress(*DAMAGE_ERRORS):
            connection.execute(
                "UPDATE records SET text_checksum = ?, checksum = ?, row_checksum = ? WHERE label = ?",
                (*row.checksums(), row.label),
            )
    connection.text_factory = str
    connection.commit()


def copy_made(folder: Path, make: Callable[..., None], *arguments: Hashable) -> None:
    """Write the files that `make(folder, *arguments)` writes; the calls after the first one copy those of the first."""
    for path, data in _files_made(make, *arguments).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)


@cache
def _files_made(make: Callable[..., None], *arguments: Hashable) -> dict[Path, bytes]:
    with tempfile.TemporaryDirectory(dir=os.environ.get("PYTEST_DEBUG_TEMPROOT")) as name:
        folder = Path(name)
        make(folder, *arguments)
        return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def refused(code: Code, *words: str, field: str = "") -> Iterator[pytest.ExceptionInfo[ServiceError]]:
    """Expect a ServiceError of a code, whose message has the words, about a field."""
    with pytest.raises(ServiceError) as caught:
        yield caught
    assert caught.value.code is code, caught.value.message
    for word in words:
        assert word in caught.value.message
    if field:
        assert field in [violation.field for violation in caught.value.violations]


class Clock:
    """The clock of the index. It stands still until the test moves it on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = time.time()
        self._changes = Changes()
        self._changes.watch(monkeypatch, ExpiryThread, "_handle")

        class Now(datetime):
            """Times of this clock."""

            @classmethod
            def now(cls, tz: tzinfo | None = None) -> Any:
                return datetime.fromtimestamp(time.time(), tz)

        monkeypatch.setattr(time, "time", lambda: self.now)
        monkeypatch.setattr(store, "datetime", Now)

    def move_on(self, index: Index, seconds: float, condition: Callable[[], object]) -> None:
        """Move on by some seconds, and wait until the thread that deletes expired records makes a condition true."""
        assert not condition()
        self.now += seconds + 1e-3  # times are rounded to microseconds
        with index._expiry_thread._changed:
            index._expiry_thread._changed.notify()
        self._changes.wait_for(condition)
