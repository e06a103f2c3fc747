"""The elements of a request are counted in its bytes, without decoding the request."""

from __future__ import annotations

import random
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from emberpc.server import element_counts
from emberpc.server.element_counts import count_elements
from emberpc.server.errors import ServiceError
from emberpc.v1 import embedding_pb2, index_pb2

EMPTY_TEXT = embedding_pb2.EmbedRequest(texts=[""]).SerializeToString()
EMPTY_RECORD = index_pb2.UpsertRecordsRequest(records=[index_pb2.Record()]).SerializeToString()
UNKNOWN_FIELD = b"\xf8\x07\x01"
GROUP = b"\xf3\x07\xf4\x07"
SIZE = 2**18
#: Fields 256 to 65,535, each with an empty value.
UNKNOWN_NUMBERS = [bytes([0x82 | i << 3 & 0x78, 0x80 | i >> 4 & 0x7F, i >> 11, 0]) for i in range(256, 2**16)]
LIMITS = {"texts": 4096, "records": 4096, "ids": 10_000, "expected_revisions": 4096, "parts": 16}


def check(data: bytes, message: Descriptor, limits: dict[str, int] = LIMITS) -> None:
    for _ in count_elements(data, message, limits):
        pass


def within(number: int, data: bytes) -> bytes:
    """Return the field of a number that holds these bytes."""
    size, encoded = len(data), bytearray([number << 3 | 2])
    while size > 127:
        encoded.append(size & 127 | 128)
        size >>= 7
    return bytes([*encoded, size]) + data


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
        check(one * (SIZE // len(one)), message.DESCRIPTOR)
    assert [violation.field for violation in raised.value.violations] == [field]


@pytest.mark.parametrize(
    ("message", "data"),
    [
        # Lists and maps of messages within the request, each of 131,072 items.
        (index_pb2.CountRecordsRequest, within(2, within(1, b"\x0a\x00" * (SIZE // 2)))),
        (index_pb2.CountRecordsRequest, within(2, within(5, b"\x12\x00" * (SIZE // 2)))),
        (index_pb2.CreateCollectionRequest, within(1, b"\x42\x00" * (SIZE // 2))),
        (index_pb2.UpdateCollectionRequest, within(2, b"\x0a\x00" * (SIZE // 2))),
        (index_pb2.UpsertRecordsRequest, within(2, within(3, b"\x0a\x00" * (SIZE // 2)))),
        (index_pb2.UpsertRecordsRequest, within(2, UNKNOWN_FIELD * (SIZE // 2))),
        # Packed lists of the request itself and of a message within it.
        (index_pb2.UpsertRecordsRequest, within(4, b"\x81\x08" * (SIZE // 2))),
        (index_pb2.BatchGetRecordsRequest, within(3, b"\x01" * SIZE)),
        (index_pb2.SearchRequest, within(2, within(2, within(5, b"\0\0\0\0" * (SIZE // 2))))),
        # Each list is short enough, but all together have too many items: 2,000,000.
        (
            index_pb2.UpsertRecordsRequest,
            within(2, within(3, within(1, within(2, within(6, b"\x0a\x00" * 1000))))) * 2000,
        ),
        # Empty packed lists: 131,072 of the request itself, and of a message within it.
        (index_pb2.BatchGetRecordsRequest, b"\x1a\x00" * (SIZE // 2)),
        (index_pb2.SearchRequest, within(2, within(2, b"\x2a\x00" * (SIZE // 2)))),
        # Fields of many numbers that no message has.
        (index_pb2.GetCollectionRequest, b"".join(UNKNOWN_NUMBERS)),
    ],
)
def test_nested_elements_are_refused_before_they_are_decoded(
    message: Any, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(element_counts, "MAX_ELEMENTS", 100_000)
    with pytest.raises(ServiceError, match="more than"):
        check(data, message.DESCRIPTOR)


@pytest.mark.parametrize(
    ("times", "numbers", "words"), [(100, (), "more than 1000 fields"), (6000, (2,), "a Record with more than 65536")]
)
def test_fields_of_several_numbers_are_counted_together(times: int, numbers: tuple[int, ...], words: str) -> None:
    """The fields of each number alone are within the limit; all together would be counted in one long step."""
    data = b"".join(UNKNOWN_NUMBERS[:200]) * times
    for number in numbers:
        data = within(number, data)
    with pytest.raises(ServiceError, match=words):
        check(data, index_pb2.UpsertRecordsRequest.DESCRIPTOR)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_group_does_not_hide_elements(place: int) -> None:
    items = EMPTY_RECORD * (SIZE // len(EMPTY_RECORD))
    data = [GROUP + items, within(1, b"name") + GROUP + items, items + GROUP][place]
    with pytest.raises((ServiceError, ValueError)):
        check(data, index_pb2.UpsertRecordsRequest.DESCRIPTOR)


def test_a_request_within_its_limits_is_accepted() -> None:
    request = embedding_pb2.EmbedRequest(model="m", texts=["x" * 100] * 4096, dimensions=64)
    limits = {"texts": 4096}
    check(request.SerializeToString(), request.DESCRIPTOR, limits)
    request.texts.append("one more")
    with pytest.raises(ServiceError, match="more than 4096"):
        check(request.SerializeToString(), request.DESCRIPTOR, limits)


def test_long_texts_and_vectors_count_as_one_element_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(element_counts, "MAX_ELEMENTS", 1000)
    request = index_pb2.UpsertRecordsRequest(records=[index_pb2.Record(id=f"{i}", text="x" * 2000) for i in range(400)])
    request.vectors.data = bytes(400 * 400)
    check(request.SerializeToString(), request.DESCRIPTOR)


def elements_of(message: Message) -> int:
    """Return the list items and map entries of the messages within a message, as the decoder finds them."""

    def count(inner: Message) -> int:
        total = 0
        for field, value in inner.ListFields():
            if field.message_type is not None and field.message_type.GetOptions().map_entry:
                total += len(value) + sum(count(value[key]) for key in value)
            elif field.is_repeated:
                total += len(value) + sum(count(item) for item in value if field.message_type is not None)
            elif field.message_type is not None:
                total += count(value)
        return total

    return count(message) - sum(len(value) for field, value in message.ListFields() if field.is_repeated)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=20,
)


@given(st.lists(st.dictionaries(st.text(max_size=3), JSON, max_size=5), max_size=6), st.randoms())
def test_counts_agree_with_the_decoder(documents: list[dict[str, Any]], chance: random.Random) -> None:
    """A request is accepted at a limit of its number of elements, and refused at one less."""
    request = index_pb2.UpsertRecordsRequest(collection="x" * chance.randint(0, 300))
    for document in documents:
        request.records.add(id="a", text="b" * chance.randint(0, 9)).metadata.update(document)
    data, elements = request.SerializeToString(), elements_of(request)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(element_counts, "_SMALL", 0)
        patch.setattr(element_counts, "MAX_ELEMENTS", elements)
        check(data, request.DESCRIPTOR)
        if elements:
            patch.setattr(element_counts, "MAX_ELEMENTS", elements - 1)
            with pytest.raises(ServiceError, match="split"):
                check(data, request.DESCRIPTOR)


@given(st.binary(max_size=200), st.integers(1, 5))
def test_malformed_bytes_raise_only_service_error_or_value_error(data: bytes, limit: int) -> None:
    padding = embedding_pb2.EmbedRequest(texts=["x" * SIZE]).SerializeToString()
    for request in (data + padding, padding + data, padding[:-1] + data):
        try:
            check(request, embedding_pb2.EmbedRequest.DESCRIPTOR, {"texts": limit})
        except ServiceError as error:
            assert error.reason == "INVALID_FIELD"
        except ValueError:
            pass
