"""The elements of a request are counted on its bytes, without decoding it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emberpc.server.element_counts import check_counts
from emberpc.server.errors import ServiceError
from emberpc.v1 import embedding_pb2, index_pb2

EMPTY_TEXT = embedding_pb2.EmbedRequest(texts=[""]).SerializeToString()
EMPTY_RECORD = index_pb2.UpsertRecordsRequest(records=[index_pb2.Record()]).SerializeToString()
UNKNOWN_FIELD = b"\xf8\x07\x01"
SIZE = 2**18


@pytest.mark.parametrize(
    ("message", "one", "field"),
    [
        (embedding_pb2.EmbedRequest, EMPTY_TEXT, "texts"),
        (index_pb2.UpsertRecordsRequest, EMPTY_RECORD, "records"),
        (index_pb2.GetCollectionRequest, UNKNOWN_FIELD, "GetCollectionRequest"),
        (index_pb2.BatchGetRecordsRequest, index_pb2.BatchGetRecordsRequest(ids=[""]).SerializeToString(), "ids"),
    ],
)
def test_too_many_elements_are_refused(message: Any, one: bytes, field: str) -> None:
    with pytest.raises(ServiceError) as raised:
        check_counts(one * (SIZE // len(one)), message.DESCRIPTOR, {"texts": 4096, "records": 4096, "ids": 10_000})
    assert [violation.field for violation in raised.value.violations] == [field]


def test_a_request_within_its_limits_is_taken() -> None:
    request = embedding_pb2.EmbedRequest(model="m", texts=["x" * 100] * 4096, dimensions=64)
    limits = {"texts": 4096}
    check_counts(request.SerializeToString(), request.DESCRIPTOR, limits)
    request.texts.append("one more")
    with pytest.raises(ServiceError, match="more than 4096"):
        check_counts(request.SerializeToString(), request.DESCRIPTOR, limits)


@given(st.binary(max_size=200), st.integers(1, 5))
def test_malformed_bytes_are_left_to_the_decoder(data: bytes, limit: int) -> None:
    padding = embedding_pb2.EmbedRequest(texts=["x" * SIZE]).SerializeToString()
    for request in (data + padding, padding + data, padding[:-1] + data):
        try:
            check_counts(request, embedding_pb2.EmbedRequest.DESCRIPTOR, {"texts": limit})
        except ServiceError as error:
            assert error.reason == "INVALID_FIELD"
