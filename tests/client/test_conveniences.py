"""Conveniences of the clients: `exist_ok` for existing collections, and warnings that name the caller's line."""

from __future__ import annotations

import asyncio
import linecache
import warnings
from typing import Any

import pytest

from emberpc.client import AlreadyExists, AsyncClient, Client, FilterWarning
from fake_server import FakeServer

Shell = Any


def test_create_collection_with_exist_ok_returns_an_existing_collection(fake: FakeServer, shell: Shell) -> None:
    made = shell("create_collection", "c", model="canned", dimensions=8, m=16, truncation="end", exist_ok=True)
    with pytest.raises(AlreadyExists, match="there is a collection 'c'"):
        shell("create_collection", "c", model="canned")
    assert shell("create_collection", "c", model="canned", exist_ok=True) == made
    assert shell("create_collection", "c", model="canned", dimensions=8, m=16, exist_ok=True) == made
    for options, words in (
        ({"model": "other"}, "its model is 'canned', not 'other'"),
        ({"model": "canned", "distance": "euclidean"}, "its distance is 'cosine', not 'euclidean'"),
        ({"model": "canned", "dimensions": 4}, "its dimensions is 8, not 4"),
        ({"model": "canned", "m": 32}, "its m is 16, not 32"),
    ):
        with pytest.raises(AlreadyExists, match=words) as raised:
            shell("create_collection", "c", exist_ok=True, **options)
        assert raised.value.reason == "COLLECTION_EXISTS"


def test_a_filter_warning_names_the_line_of_the_caller(fake: FakeServer) -> None:
    def line_of(found: list[warnings.WarningMessage]) -> str:
        assert [each.filename for each in found] == [__file__]
        return linecache.getline(__file__, found[0].lineno)

    async def asynchronously() -> None:
        async with AsyncClient(fake.target) as client:
            with pytest.warns(FilterWarning, match="nothing") as found:
                await client.count("c", where="n = 1")  # counted asynchronously
            assert "# counted asynchronously" in line_of(found.list)
            with pytest.warns(FilterWarning, match="nothing") as found:
                assert [record.id async for record in client.records("c", where="n = 1")] == ["a"]  # iterated
            assert "# iterated" in line_of(found.list)

    fake.warnings = ["it matches nothing"]
    with Client(fake.target) as client:
        client.create_collection("c")
        client.upsert("c", [{"id": "a", "text": "t"}])
        with pytest.warns(FilterWarning, match="nothing") as found:
            client.count("c", where="n = 1")  # counted
        assert "# counted" in line_of(found.list)
        with pytest.warns(FilterWarning, match="nothing") as found:
            client.search("c", "t", where="n = 1")  # searched
        assert "# searched" in line_of(found.list)
        with pytest.warns(FilterWarning, match="nothing") as found:
            assert len(list(client.records("c", where="n = 1"))) == 1  # listed
        assert "# listed" in line_of(found.list)
    asyncio.run(asynchronously())
