"""Damage of single values of a record, and ids that look like damage."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from emberpc.server.collections import CollectionSpec, NewRecord
from emberpc.server.index import Index
from emberpc.server.index.storage import schema
from index.damages import COUNT, LOST, VECTORS, WIDTH, damaged


@pytest.mark.parametrize("name", ["b'it's'", "b'\\x4'", 'b"\\x61"', "b'a''b'"])
def test_an_id_that_only_looks_like_a_damaged_id_is_deleted(tmp_path: Path, name: str) -> None:
    with closing(Index(tmp_path)) as index:
        collection = index.create(CollectionSpec("c", WIDTH))
        collection.upsert([NewRecord(name, "text")], np.ones((1, WIDTH), dtype=np.float32))
        assert collection.delete([name]).deleted == 1
        assert collection.count() == 0


def test_the_shortfall_reason_of_a_hybrid_search_counts_records_with_damaged_vectors(tmp_path: Path) -> None:
    with damaged(tmp_path, "vector = zeroblob(7)") as collection:
        (outcome,) = collection.search_hybrid(VECTORS[:1], ["text"], [100], dense_weight=0.5)
        assert len(outcome.hits) == COUNT
        assert outcome.plan.shortfall_reason.startswith(f"{COUNT} records have an undamaged vector or a word")


def test_null_texts_and_metadata_are_reported_by_verify_and_skipped(tmp_path: Path) -> None:
    """No statement of emberpc writes NULL to these columns, but damage can."""
    with damaged(tmp_path, "revision = revision"):
        pass
    (path,) = tmp_path.rglob("records.db")
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        (sql,) = database.execute("SELECT sql FROM sqlite_master WHERE name = 'records'").fetchone()
        database.execute("PRAGMA writable_schema = ON")
        for change, write in ((sql.replace("TEXT NOT NULL,", "TEXT,"), True), (sql, False)):
            database.execute("UPDATE sqlite_master SET sql = ? WHERE name = 'records'", (change,))
            database.execute(f"PRAGMA schema_version = {7 + write}")
            if write:
                with closing(sqlite3.connect(path, isolation_level=None)) as writer:
                    writer.execute("UPDATE records SET metadata = NULL, text = NULL WHERE id = ?", (LOST,))
        schema._add_functions(database)
        database.execute(schema._SEARCH_TEXTS)
    with closing(Index(tmp_path)) as index:
        collection = index.get("c")
        assert len(list(collection._store.metadata(COUNT))) == COUNT - 1
        assert LOST in [problem.id for step in collection.verify() for problem in step.problems]
