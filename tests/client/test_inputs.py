"""Invalid arguments: the clients refuse them before any request, and name the item."""

from __future__ import annotations

import decimal
import math
from collections.abc import Iterator
from datetime import datetime, timezone
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emberpc.client import Client, InputError, InputTypeError, Record, SearchQuery
from emberpc.client._core.json_values import mapping, struct, to_datetime
from emberpc.client._core.request_chunks import chunks
from fake_server import FakeServer

Shell = Any


@pytest.mark.parametrize(
    ("texts", "error", "words"),
    [
        ("one str", InputTypeError, r"texts is a str; it must be a list of texts, such as \[text\]"),
        (b"bytes", InputTypeError, "texts is of type bytes; it must be a list of texts, each a str: decode the bytes"),
        (None, InputTypeError, "texts is of type NoneType"),
        (7, InputTypeError, "texts is of type int"),
        ({"text": "a"}, InputTypeError, "texts is of type dict, and only its keys would be sent; give a list of texts"),
        ([], InputError, "texts is empty"),
        (["a", 7], InputTypeError, r"texts\[1\] is of type int; it must be a str"),
        (["a", "b", None], InputTypeError, r"texts\[2\] is of type NoneType"),
        (["a", "b\ud83d"], InputError, r"texts\[1\] holds a lone surrogate \(U\+D83D\) at character 1"),
    ],
)
@pytest.mark.parametrize("method", ["embed", "count_tokens", "classify"])
def test_invalid_texts_are_refused_before_any_request(
    fake: FakeServer, shell: Shell, method: str, texts: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        shell(method, texts)
    assert not fake.asked


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"input_kind": "passages"}, InputError, "input_kind is 'passages'; use 'passage' or 'query'"),
        ({"truncation": True}, InputTypeError, "truncation is of type bool"),
        ({"dtype": "float64"}, InputError, "dtype is 'float64'; use 'float32' or 'float16' or"),
        ({"dimensions": -1}, InputError, "dimensions is -1; it must be at least 0"),
        ({"dimensions": 2**31}, InputError, "dimensions is 2147483648"),
        ({"dimensions": 1.5}, InputTypeError, "dimensions is of type float"),
        ({"batch_size": 0}, InputError, "batch_size is 0; it must be at least 1"),
        ({"model": 3}, InputTypeError, "model is of type int"),
        ({"timeout": 0}, InputError, "timeout is 0 seconds"),
        ({"timeout": math.inf}, InputError, "timeout is inf seconds"),
    ],
)
def test_invalid_options_are_refused_before_any_request(
    fake: FakeServer, shell: Shell, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        shell("embed", ["a"], **options)
    assert not fake.asked


@pytest.mark.parametrize(
    ("records", "vectors", "error", "words"),
    [
        ({"id": "a"}, None, InputTypeError, "records is of type dict"),
        ([Record("a", "t"), "b"], None, InputTypeError, r"records\[1\] is of type str"),
        ([{"text": "t"}], None, InputError, r"records\[0\] has no id"),
        ([{"id": "a", "txt": "t"}], None, InputError, r"records\[0\] has a field 'txt'; a record has id, text"),
        ([{"id": 7}], None, InputTypeError, r"records\[0\].id is of type int"),
        ([{"id": "a", "metadata": [1]}], None, InputTypeError, r"records\[0\].metadata is of type list"),
        ([{"id": "a", "vector": [[1.0]]}], None, InputError, r"records\[0\].vector has shape \(1, 1\)"),
        ([{"id": "a", "vector": ["1"]}], None, InputTypeError, r"records\[0\].vector has elements of type"),
        ([{"id": "a", "vector": [1.0, math.nan]}], None, InputError, r"records\[0\].vector holds NaN"),
        ([{"id": "a", "vector": [1.0]}, {"id": "b"}], None, InputError, r"records\[1\] has no vector and records\[0\]"),
        ([{"id": "a"}, {"id": "b", "vector": [1.0]}], None, InputError, r"records\[1\] has a vector and records\[0\]"),
        (
            [{"id": "a", "vector": [1.0]}, {"id": "b", "vector": [1.0, 2.0]}],
            None,
            InputError,
            r"records\[1\].vector has 2 dimensions and records\[0\].vector has 1",
        ),
        ([{"id": "a", "vector": [1.0]}], [[1.0]], InputError, r"records\[0\] has a vector, and so has `vectors`"),
        ([{"id": "a"}], [[1.0], [2.0]], InputError, "vectors has 2 vectors for 1 items"),
        ([{"id": "a"}], [1.0], InputTypeError, r"vectors\[0\] is of type float; it must be a vector"),
        ([{"id": "a"}, {"id": "b"}], [[1.0, 2.0], [1.0]], InputError, r"vectors\[1\] has 1 dimensions"),
        ([{"id": "a"}, {"id": "b"}], [[1.0], [math.inf]], InputError, r"vectors\[1\] holds NaN, infinity"),
        ([{"id": "a"}, {"id": "b"}], np.array([[1.0], [1e300]]), InputError, r"vectors\[1\] holds .* beyond float32"),
        ([{"id": "a"}], np.array([[True]]), InputTypeError, "vectors has elements of type bool"),
        ([{"id": "a"}], np.ones((1, 0)), InputError, r"vectors has shape \(1, 0\)"),
    ],
)
def test_invalid_records_and_vectors_are_refused_before_any_request(
    fake: FakeServer, shell: Shell, records: Any, vectors: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        shell("upsert", "c", records, vectors=vectors)
    assert not fake.asked


@pytest.mark.parametrize(
    ("query", "error", "words"),
    [
        ([1.0, math.nan], InputError, "query holds NaN"),
        ([1.0, None], InputTypeError, "query has elements of type object"),
        ("\udc80", InputError, "query holds a lone surrogate"),
        (
            ["a", "b"],
            InputTypeError,
            "query is a list of texts; it must be one text, or use `search_batch` for several",
        ),
    ],
)
def test_an_invalid_query_is_refused_before_any_request(
    fake: FakeServer, shell: Shell, query: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        shell("search", "c", query)
    assert not fake.asked


def test_invalid_queries_of_a_batch_are_refused(fake: FakeServer, shell: Shell) -> None:
    with pytest.raises(InputTypeError, match="queries is of type str; it must be a list of queries, or use `search`"):
        shell("search_batch", "c", "a query")
    with pytest.raises(InputError, match=r"queries\[1\] has shape \(0,\)"):
        shell("search_batch", "c", ["a", []])
    with pytest.raises(InputTypeError, match="queries is of type SearchQuery; it must be a list"):
        shell("search_batch", "c", SearchQuery("a query"))
    with pytest.raises(InputTypeError, match="queries is of type dict; it must be a list"):
        shell("search_batch", "c", {"a": "query"})
    with pytest.raises(InputTypeError, match=r"queries\[0\] is a list of texts"):
        shell("search_batch", "c", [["a", "b"]])
    with pytest.raises(InputError, match="top_k is 0; it must be at least 1"):
        shell("search_batch", "c", ["a"], top_k=0)
    with pytest.raises(InputError, match=r"queries\[1\].top_k is 0; it must be at least 1"):
        shell("search_batch", "c", ["a", SearchQuery("b", top_k=0)])
    with pytest.raises(InputError, match=r"queries\[1\].ef"):
        shell("search_batch", "c", ["a", SearchQuery("b", ef=-1)])
    with pytest.raises(InputError, match=r"queries\[0\].where"):
        shell("search_batch", "c", [SearchQuery("b", where="year >")])
    assert not fake.asked


def test_a_mapping_as_items_of_a_stream_is_refused(fake: FakeServer, shell: Shell) -> None:
    with pytest.raises(InputTypeError, match="items is of type dict; it must be an iterable of texts"):
        shell("embed_stream", {"text": "a"})
    assert not fake.asked


def test_texts_and_ids_may_come_from_a_generator(fake: FakeServer, shell: Shell) -> None:
    def letters() -> Iterator[str]:
        yield from "abc"

    assert shell("embed", letters()).shape == (3, 8)
    assert shell("count_tokens", letters()) == [3, 3, 3]
    assert shell("similarity", letters(), letters()).shape == (3, 3)
    assert len(shell("classify", letters())) == 3
    assert shell("create_collection", "c", indexed_fields=letters()).indexed_fields == ("a", "b", "c")
    shell("upsert", "c", [{"id": letter, "text": letter} for letter in letters()])
    assert [record.id for record in shell("get", "c", letters())] == ["a", "b", "c"]
    assert shell("delete", "c", letters()) == 3


def test_invalid_arguments_of_records_are_refused_before_the_iteration(fake: FakeServer) -> None:
    with Client(fake.target) as client, pytest.raises(InputError, match="page_size"):
        client.records("c", page_size=-1)


def nested(depth: int, kind: type) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"k": value} if kind is dict else [value]
    return value


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (2**53 + 1, InputError, "m.k is 9007199254740993, and numbers past .* give it as a str"),
        pytest.param(
            10**5000,
            InputError,
            "m.k is a number of more than 40 digits, and numbers past .* give it as a str",
            id="many digits",
        ),
        (Fraction(10**400, 3), InputError, "m.k is greater than any float; give it as a str"),
        (math.nan, InputError, "m.k is nan, which JSON cannot hold"),
        (-math.inf, InputError, "m.k is -inf"),
        (datetime.now(timezone.utc), InputTypeError, "m.k is of type datetime; metadata holds what JSON does"),
        (decimal.Decimal(1), InputTypeError, "m.k is of type Decimal"),
        (b"x", InputTypeError, "m.k is of type bytes"),
        ({1: "a"}, InputTypeError, "a key of m.k is of type int"),
        ([1, {"a": {2}}], InputTypeError, r"m.k\[1\].a is of type set"),
        (nested(40, dict), InputError, "is nested more than 30 levels deep"),
        (nested(40, list), InputError, "is nested more than 30 levels deep"),
        ("\ud800", InputError, "m.k holds a lone surrogate"),
    ],
)
def test_invalid_metadata_is_refused_with_its_path(value: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        struct({"k": value}, "m")


def test_the_deepest_metadata_allowed_can_be_sent(shell: Shell) -> None:
    shell("create_collection", "c")
    deepest = nested(30, dict)
    shell("upsert", "c", [{"id": "a", "text": "t", "metadata": deepest}])
    assert shell("get", "c", ["a"])[0].metadata == deepest
    with pytest.raises(InputError):
        struct(nested(31, dict), "m")


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.text()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.integers(-(2**53), 2**53),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(st.dictionaries(st.text(), json_values))
def test_metadata_is_equal_after_conversion_to_a_struct_and_back(metadata: dict[str, Any]) -> None:
    back = mapping(struct(metadata, "m"))
    assert back == metadata
    assert mapping(struct(back, "m")) == metadata


def test_numpy_numbers_in_metadata_are_sent_as_numbers() -> None:
    metadata = {"i": np.int64(3), "f": np.float32(0.5), "b": np.bool_(True), "s": np.str_("x")}
    back = mapping(struct(metadata, "m"))
    assert back == {"i": 3, "f": 0.5, "b": True, "s": "x"}
    assert type(back["b"]) is bool


def test_timestamps_are_converted_to_utc_with_microseconds() -> None:
    from google.protobuf.timestamp_pb2 import Timestamp

    timestamp = Timestamp()
    timestamp.FromNanoseconds(1_600_000_000_123_456_789)
    assert to_datetime(timestamp) == datetime(2020, 9, 13, 12, 26, 40, 123456, tzinfo=timezone.utc)


@given(st.lists(st.integers(0, 9 * 2**20)), st.integers(1, 10))
def test_chunks_keep_order_and_both_limits_and_lose_no_item(weights: list[int], size: int) -> None:
    found = list(chunks(weights, size, lambda weight: weight))
    assert [weight for _, chunk in found for weight in chunk] == weights
    place = 0
    for first, chunk in found:
        assert first == place
        assert 1 <= len(chunk) <= size
        assert sum(chunk) <= 8 * 2**20 or len(chunk) == 1
        place += len(chunk)


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), 1e11])
def test_an_invalid_time_to_live_is_refused(shell: Shell, seconds: float) -> None:
    with pytest.raises(InputError, match=r"records\[0\]\.time_to_live is .* must be above 0"):
        shell("upsert", "c", [Record("a", "a", time_to_live=seconds)])


@pytest.mark.parametrize("name", ["details", "progress"])
@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("embed", (["a"],)),
        ("count_tokens", (["a"],)),
        ("similarity", (["a"], ["b"])),
        ("classify", (["a"],)),
        ("upsert", ("c", [{"id": "a"}])),
        ("get", ("c", ["a"])),
        ("delete", ("c", ["a"])),
        ("search", ("c", "a")),
        ("search_batch", ("c", ["a"])),
    ],
)
def test_a_list_in_place_of_a_callback_is_refused_before_any_request(
    fake: FakeServer, shell: Shell, method: str, arguments: Any, name: str
) -> None:
    if name == "progress" and method not in ("embed", "classify", "upsert"):
        return  # these methods report no progress
    with pytest.raises(InputTypeError, match=f"{name} is of type list; it must be a function, such as the `append`"):
        shell(method, *arguments, **{name: []})
    assert not fake.asked
