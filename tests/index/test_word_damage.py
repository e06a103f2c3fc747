"""A word index that is damaged on disk is rebuilt from the texts."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from emberpc.server.collections import NewRecord
from emberpc.server.errors import Code
from emberpc.server.index import Index
from emberpc.server.index.storage import word_index
from index.damages import COUNT, LOST, TRUTH, VECTORS, damaged
from index.support import refused


def damage_words(folder: Path, statement: str) -> None:
    (path,) = folder.rglob("records.db")
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(statement)
        connection.commit()


@pytest.mark.parametrize("dense_weight", [None, 0.5])
def test_a_search_rebuilds_a_damaged_word_index(tmp_path: Path, dense_weight: float | None) -> None:
    with damaged(tmp_path, "revision = revision") as collection:
        damage_words(tmp_path, "DELETE FROM words_docsize WHERE id = 8")

        def search() -> list[str]:
            if dense_weight is None:
                (found,) = collection.search_lexical(["text"], [COUNT])
            else:
                (found,) = collection.search_hybrid(VECTORS[:1], ["text"], [COUNT], dense_weight=dense_weight)
            return sorted(record.id for record, _ in found.hits)

        with refused(Code.DATA_LOSS, "word index of collection 'c'", "search again"):
            search()
        collection.maintain()
        assert search() == list(TRUTH)
        assert [problem for step in collection.verify() for problem in step.problems] == []


def test_a_write_rebuilds_a_damaged_word_index(tmp_path: Path) -> None:
    with damaged(tmp_path, "revision = revision") as collection:
        damage_words(tmp_path, "UPDATE words_data SET block = x'00'")
        assert collection.delete([LOST]).deleted == 1
        collection.upsert([NewRecord("new", "text of mine")], VECTORS[7:8])
        (found,) = collection.search_lexical(["text"], [COUNT + 1])
        assert sorted(record.id for record, _ in found.hits) == sorted({*TRUTH, "new"} - {LOST})
        assert [problem for step in collection.verify() for problem in step.problems] == []


def test_a_collection_with_an_unreadable_word_index_can_be_opened(tmp_path: Path) -> None:
    with damaged(tmp_path, "revision = revision"):
        pass
    damage_words(tmp_path, "DELETE FROM words_config")
    with closing(Index(tmp_path)) as index:
        assert len(index.get("c").search_lexical(["text"], [COUNT])[0].hits) == COUNT


def test_deleting_a_record_with_a_damaged_text_removes_its_words(tmp_path: Path) -> None:
    """Left words would be found without a record, which FTS5 reports as damage."""
    with damaged(tmp_path, "text = 'another'") as collection:
        assert collection.delete([LOST]).deleted == 1
        collection.maintain()
        (found,) = collection.search_lexical(["text"], [COUNT])
        assert len(found.hits) == COUNT - 1
        assert collection.search_lexical([LOST], [COUNT])[0].hits == []
        assert [problem for step in collection.verify() for problem in step.problems] == []


def test_a_successful_rebuild_ends_the_state_beyond_repair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: sqlite3.Connection) -> None:
        raise sqlite3.DatabaseError("database disk image is malformed")

    with damaged(tmp_path, "revision = revision") as collection:
        store = collection._store
        with monkeypatch.context() as patch:
            patch.setattr(word_index, "build", fail)
            with refused(Code.INTERNAL, "damaged"):
                store.build_words()
        assert store.words_beyond_repair
        store.build_words()
        assert not store.words_beyond_repair
