"""Messages of the server in the terms of the Python client."""

from __future__ import annotations

import pytest

from emberpc.client._core.server_words import python_words


@pytest.mark.parametrize(
    ("message", "wanted"),
    [
        ("it is damaged; see what VerifyCollection finds", "it is damaged; see what `verify_collection` finds"),
        ("restore one that `BackupCollection` gave", "restore one that `backup_collection` gave"),
        ("there is no record 'VerifyCollection'", "there is no record 'VerifyCollection'"),
        ("x does not know /emberpc.v1.IndexService/ListModels", "x does not know /emberpc.v1.IndexService/ListModels"),
        ("collection.name is '-'", "name is '-'"),
        ("collection.hnsw.m is 1; it must be 2 to 100", "m is 1; it must be 2 to 100"),
        ("collection is missing", "collection is missing"),
        ("there is no collection 'collection.name'", "there is no collection 'collection.name'"),
        ("set it to END, not to 'START'", "set it to 'end', not to 'START'"),
    ],
)
def test_rpcs_and_enum_values_outside_quotes_become_methods_and_words(message: str, wanted: str) -> None:
    assert python_words(message) == wanted
