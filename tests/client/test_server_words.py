"""Messages of the server in the terms of the Python client."""

from __future__ import annotations

from typing import Any

import grpc
import numpy as np
import pytest

from emberpc.client import InvalidArgument
from emberpc.client._core.server_words import python_words
from fake_server import FakeServer, Fault

Shell = Any


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


@pytest.mark.parametrize("given", ["records", "vectors"])
def test_an_error_about_a_vector_names_the_vector_of_the_caller(fake: FakeServer, shell: Shell, given: str) -> None:
    shell("create_collection", "c")
    rows = np.ones((6, 8), dtype=np.float32)
    own = [{"id": str(i), "vector": row} if given == "records" else {"id": str(i)} for i, row in enumerate(rows)]
    for batch_size, place in ((6, 1), (4, 5)):
        violations = [("vectors[1]", "has length zero"), ("records[0].id", "is 'vectors[1]'")]
        said = "vectors[1] has length zero (and 1 more)"
        fault = Fault(grpc.StatusCode.INVALID_ARGUMENT, said, "INVALID_FIELD", violations)
        fake.faults["UpsertRecords"].extend([None] * (batch_size == 4) + [fault])
        with pytest.raises(InvalidArgument) as raised:
            shell("upsert", "c", own, vectors=rows if given == "vectors" else None, batch_size=batch_size)
        name = f"records[{place}].vector" if given == "records" else f"vectors[{place}]"
        assert str(raised.value).startswith(f"{name} has length zero (and 1 more)")
        assert [(violation.field, violation.description) for violation in raised.value.violations] == [
            (name, "has length zero"),
            (f"records[{place - 1}].id", "is 'vectors[1]'"),
        ]
