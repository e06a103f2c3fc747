"""An index in a temporary folder, with a buffer so small that the graph is used early."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from emberpc.server.collections import CollectionSpec
from emberpc.server.index import Collection, Index
from emberpc.server.index.storage import reserve
from index.support import Clock
from index_helpers import DIMENSIONS


@pytest.fixture(scope="module", autouse=True)
def small_reserve() -> Iterator[None]:
    """Give each index a small reserve. Creating or copying one of 16 MiB in memory takes 5 ms of CPU time each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reserve, "_SIZE", 2**16)
        yield


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    opened = Index(tmp_path, buffer_limit=8)
    yield opened
    opened.close()


@pytest.fixture
def collection(index: Index) -> Collection:
    return index.create(CollectionSpec("c", DIMENSIONS))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of times to live, which the test moves on."""
    return Clock(monkeypatch)


@pytest.fixture(autouse=True)
def memory_agrees_with_the_store(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fail a test if the log reports that memory and store disagree. Searches then still give right results."""
    yield
    assert not [record.message for record in caplog.get_records("call") if "disagree" in record.message]
