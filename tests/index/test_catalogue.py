"""The catalogue when a reembedding cannot be opened, a collection is replaced, or the data directory fails."""

from __future__ import annotations

import ast
import errno
import fcntl
import os
import re
from contextlib import closing
from pathlib import Path
from unittest.mock import Mock

import pytest

from emberpc.server import descriptors
from emberpc.server import index as index_package
from emberpc.server.collections import CollectionSpec
from emberpc.server.errors import Code, StartupError
from emberpc.server.index import Collection, Index
from emberpc.server.index.storage import data_directory
from index.support import refused
from index_helpers import DIMENSIONS


def test_a_reembedding_without_a_free_descriptor_waits_for_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begin(index: Index) -> None:
        index.reembed(index.get("c"), model="new", fingerprint="f", dimensions=DIMENSIONS)

    with closing(Index(tmp_path)) as index:
        index.create(CollectionSpec("c", DIMENSIONS, model="old"))
        begin(index)
    for delete in (False, True):
        with closing(Index(tmp_path)) as index, monkeypatch.context() as patch:
            index.get("c")
            patch.setattr(index, "_collection", Mock(side_effect=descriptors.shortage()))
            assert index.reembeddings() == []
            patch.undo()
            if delete:
                index.delete("c")
                index.create(CollectionSpec("c", DIMENSIONS, model="old"))
        with closing(Index(tmp_path)) as index:
            assert [each.spec.model for each in index.reembeddings()] == ([] if delete else ["new"])
            if delete:
                begin(index)


def test_a_reembedding_replaces_one_that_could_not_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(Index(tmp_path)) as index:
        index.create(CollectionSpec("c", DIMENSIONS, model="old"))
        index.reembed(index.get("c"), model="new", fingerprint="f", dimensions=DIMENSIONS)
    with closing(Index(tmp_path)) as index:
        source = index.get("c")
        with monkeypatch.context() as patch:
            patch.setattr(index, "_collection", Mock(side_effect=descriptors.shortage()))
            assert index.reembeddings() == []
        index.reembed(source, model="newer", fingerprint="f", dimensions=DIMENSIONS)
    with closing(Index(tmp_path)) as index:
        found = index.reembeddings()
        assert [each.spec.model for each in found] == ["newer"]
        assert index.reembeddings() == found, "a second call opened the copy again"


@pytest.mark.parametrize("change", ["update", "update_fingerprint"])
def test_a_change_of_a_collection_that_is_replaced_meanwhile_can_be_repeated(
    index: Index, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    source = index.create(CollectionSpec("c", DIMENSIONS, model="old", model_fingerprint="f"))
    way = index.reembed(source, model="new", fingerprint="f", dimensions=DIMENSIONS)

    def apply() -> None:
        if change == "update":
            index.update("c", "end")
        else:
            index.update_fingerprint("c", "f", "g")

    def replace(_: str) -> Collection:
        assert index.switch(way)
        return source

    with monkeypatch.context() as patch:
        patch.setattr(index, "get", replace)
        with refused(Code.UNAVAILABLE, "try again"):
            apply()
    assert index.get("c").spec == index.page(10, "")[0][0]
    apply()
    assert index.get("c").spec == index.page(10, "")[0][0]
    assert index.get("c").spec.model == "new"
    assert "end" in index.get("c").spec.truncation or index.get("c").spec.model_fingerprint == "g"


def test_a_directory_that_cannot_be_locked_or_examined_is_refused_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", Mock(side_effect=OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))))
        with refused(Code.FAILED_PRECONDITION, "cannot be locked (No locks available)"):
            Index(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "exists", Mock(side_effect=PermissionError(errno.EACCES, "Permission denied")))
        with refused(Code.FAILED_PRECONDITION, "cannot be written to (Permission denied)"):
            Index(tmp_path)
    Index(tmp_path).close()


def test_a_disk_error_at_the_start_raises_a_startup_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from emberpc.server import app

    failing = Mock(side_effect=OSError(errno.EIO, "Input/output error"))
    monkeypatch.setattr(data_directory, "_collection_folders", failing)
    settings = Mock(data_dir=tmp_path, max_open_collections=1, close_idle_seconds=0)
    with pytest.raises(StartupError, match=r"the data directory .* cannot be used \(Input/output error\)"):
        app._embedded_index(settings)


def test_no_statement_has_numbered_placeholders() -> None:
    """Python 3.12 warns of `?1` with a tuple of parameters, and Python 3.14 refuses it."""
    numbered = [
        f"{path}:{node.lineno}"
        for path in Path(index_package.__path__[0]).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.search(r"[=(,] ?\?\d", node.value)
    ]
    assert numbered == []
