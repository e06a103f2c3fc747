"""Filters of calls: the matching records, and errors for invalid filters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

from emberpc.client import Client, FilterWarning, InvalidArgument, Record
from emberpc.v1 import filter_pb2 as pb
from emberpc.v1 import index_pb2, index_pb2_grpc
from examples.server_process import ServerProcess

ROWS: dict[str, dict[str, Any]] = {
    "a": {"lang": "en", "year": 2019},
    "b": {"lang": ["en", "de"], "year": 2021},
    "c": {"lang": "fr"},
}


@pytest.fixture
def points(client: Client) -> Iterator[str]:
    client.create_collection("filtered", dimensions=2, indexed_fields=["lang", "year"])
    new = [Record(key, "", metadata) for key, metadata in ROWS.items()]
    client.upsert("filtered", new, vectors=[[1.0, i] for i in range(len(new))])
    yield "filtered"
    client.delete_collection("filtered")


@pytest.fixture
def stub(server: ServerProcess) -> Iterator[index_pb2_grpc.IndexServiceStub]:
    with grpc.insecure_channel(server.address) as channel:
        yield index_pb2_grpc.IndexServiceStub(channel)


def test_records_are_searched_listed_counted_and_deleted_by_filter(client: Client, points: str) -> None:
    english = 'lang = "en"'
    assert [hit.record.id for hit in client.search(points, [0.0, 1.0], where=english)] == ["b", "a"]
    (result,) = client.search_batch(points, [[0.0, 1.0]], where='lang in ("fr", "de") and not year exists')
    assert [hit.record.id for hit in result.hits] == ["c"]
    assert (result.plan.strategy, result.plan.shortfall_reason) == ("exact", "1 record matches the filter")
    assert [record.id for record in client.records(points, where=english, page_size=1)] == ["a", "b"]
    assert client.count(points, where="year > 2020") == 1
    assert client.delete(points, where='lang ^= "e"') == 2
    assert [record.id for record in client.records(points)] == ["c"]


def test_a_query_has_its_own_filter(stub: index_pb2_grpc.IndexServiceStub, points: str) -> None:
    own = pb.Filter(prefix=pb.Prefix(field="lang", prefix="f"))
    common = pb.Filter(existence=pb.Existence(field="year"))
    queries = [index_pb2.SearchQuery(record_id="b", filter=own), index_pb2.SearchQuery(record_id="b")]
    response = stub.Search(index_pb2.SearchRequest(collection=points, queries=queries, filter=common))
    assert [[hit.record.id for hit in result.hits] for result in response.results] == [["c"], ["a"]]


def nested(levels: int) -> pb.Filter:
    found = pb.Filter(existence=pb.Existence(field="x"))
    for _ in range(levels):
        outer = pb.Filter()
        getattr(outer, "not").CopyFrom(found)
        found = outer
    return found


def comparing(**fields: Any) -> pb.Filter:
    return pb.Filter(comparison=pb.Comparison(**{"field": "x", "operator": 1, "value": {"number_value": 1}, **fields}))


LIST = pb.FilterList(filters=[comparing()] * 90)


@pytest.mark.parametrize(
    ("wrong", "field", "words"),
    [
        (pb.Filter(), "filter", "no condition"),
        (pb.Filter(all=pb.FilterList()), "filter.all.filters", "1 to 100"),
        (pb.Filter(any=pb.FilterList(filters=[comparing(), pb.Filter()])), "filter.any.filters[1]", "no condition"),
        (pb.Filter(all=pb.FilterList(filters=[pb.Filter(any=LIST)] * 3)), "filter", "256 conditions"),
        (nested(40), "filter" + ".not" * 32, "32 levels"),
        (comparing(field=""), "filter.comparison.field", "empty"),
        (comparing(field="a\\b"), "filter.comparison.field", "backslash"),
        (comparing(field="x" * 2000), "filter.comparison.field", "2000 characters"),
        (comparing(field=".".join("k" * 41)), "filter.comparison.field", "41 nested keys"),
        (pb.Filter(existence=pb.Existence(field="." * 80)), "filter.existence.field", "81 nested keys"),
        (comparing(operator=0), "filter.comparison.operator", "ComparisonOperator"),
        (comparing(operator=3, value={"bool_value": True}), "filter.comparison.operator", "numbers and strings"),
        (comparing(value={}), "filter.comparison.value", "not set"),
        (comparing(value={"number_value": float("nan")}), "filter.comparison.value.number_value", "finite"),
        (comparing(value={"string_value": "a\0"}), "filter.comparison.value.string_value", "NUL"),
        (pb.Filter(prefix=pb.Prefix(field="x")), "filter.prefix.prefix", "empty"),
        (pb.Filter(membership=pb.Membership(field="x")), "filter.membership.values", "1 to 10000"),
    ],
)
def test_an_invalid_filter_is_refused_with_its_field(
    client: Client, points: str, wrong: pb.Filter, field: str, words: str
) -> None:
    calls: list[Callable[[], object]] = [
        lambda: client.count(points, where=wrong),
        lambda: client.search(points, [1.0, 0.0], where=wrong),
        lambda: client.delete(points, where=wrong),
        lambda: list(client.records(points, where=wrong)),
    ]
    for call in calls:
        with pytest.raises(InvalidArgument, match=words) as refused:
            call()
        assert [violation.field for violation in refused.value.violations] == [field]
    assert client.count(points) == len(ROWS)


def values(count: int) -> pb.Filter:
    return pb.Filter(membership=pb.Membership(field="x", values=[pb.FilterValue(null_value=True)] * count))


@pytest.mark.parametrize(
    ("each", "count", "words"),
    [
        (pb.Filter(any=pb.FilterList(filters=[comparing()] * 99)), 21, "2100 conditions"),
        (values(2_500), 21, "52500 values"),
        (pb.Filter(any=pb.FilterList(filters=[values(10_000)] * 6)), 1, "more than 50000 values"),
        (pb.Filter(any=pb.FilterList(filters=[values(10_000)] * 6)), 21, "more than 500000 list items"),
    ],
)
def test_all_filters_of_a_request_have_a_limit(
    stub: index_pb2_grpc.IndexServiceStub, points: str, each: pb.Filter, count: int, words: str
) -> None:
    queries = [index_pb2.SearchQuery(record_id="b", filter=each)] * count
    with pytest.raises(grpc.RpcError, match=words) as refused:
        stub.Search(index_pb2.SearchRequest(collection=points, queries=queries))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_the_largest_filters_are_answered(client: Client, points: str) -> None:
    values = [pb.FilterValue(string_value=f"value {i}") for i in range(9_999)] + [pb.FilterValue(string_value="fr")]
    assert client.count(points, where=pb.Filter(membership=pb.Membership(field="lang", values=values))) == 1
    lists = [pb.Filter(any=pb.FilterList(filters=[comparing()] * 80))] * 3
    with pytest.warns(FilterWarning, match="'x', and none of the 3 records examined"):
        assert client.count(points, where=pb.Filter(all=pb.FilterList(filters=lists))) == 0
    assert client.count(points, where=nested(31)) == 3


def test_invalid_indexed_fields_are_refused(client: Client) -> None:
    for fields, field in ((['a"b'], "collection.indexed_fields[0]"), (["a"] * 17, "collection.indexed_fields")):
        with pytest.raises(InvalidArgument) as refused:
            client.create_collection("unindexed", dimensions=2, indexed_fields=fields)
        assert [violation.field for violation in refused.value.violations] == [field]


def test_ids_together_with_a_filter_are_refused(stub: index_pb2_grpc.IndexServiceStub, points: str) -> None:
    request = index_pb2.DeleteRecordsRequest(collection=points, ids=["a"], filter=comparing())
    with pytest.raises(grpc.RpcError) as refused:
        stub.DeleteRecords(request)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_comparing_strings_with_a_number_gives_a_warning(
    client: Client, points: str, stub: index_pb2_grpc.IndexServiceStub
) -> None:
    client.upsert(points, [Record("s", "", {"size": "12", "sizes": ["1", "2"], "year": "old"})], vectors=[[1.0, 0.0]])
    greater = comparing(field="size", operator=pb.COMPARISON_OPERATOR_GREATER)
    member = pb.Filter(membership=pb.Membership(field="sizes", values=[pb.FilterValue(number_value=1)]))
    both = pb.Filter(any=pb.FilterList(filters=[greater, member]))
    (query,) = [index_pb2.SearchQuery(record_id="a")]
    responses: list[Any] = [
        stub.CountRecords(index_pb2.CountRecordsRequest(collection=points, filter=both)),
        stub.ListRecords(index_pb2.ListRecordsRequest(collection=points, filter=both)),
        stub.Search(index_pb2.SearchRequest(collection=points, queries=[query], filter=both)),
        stub.DeleteRecords(index_pb2.DeleteRecordsRequest(collection=points, filter=both)),
    ]
    for response in responses:
        assert len(response.warnings) == 2
        assert "'size'" in response.warnings[0]
        assert "'sizes'" in response.warnings[1]
    # A field with numbers in some records, and a filter that matches records.
    for right in (
        comparing(field="year", operator=pb.COMPARISON_OPERATOR_LESS),
        pb.Filter(existence=pb.Existence(field="lang")),
    ):
        assert not stub.CountRecords(index_pb2.CountRecordsRequest(collection=points, filter=right)).warnings


def test_a_filter_on_a_label_gives_a_warning(client: Client, points: str) -> None:
    client.upsert(points, [Record("d", label="news")], vectors=[[1.0, 9]])
    with pytest.warns(FilterWarning, match="'label'.*filters compare metadata only, not the label of a record"):
        assert client.search(points, [0.0, 1.0], where='label = "news"') == []
    with pytest.warns(FilterWarning, match="'lnag', and none of the 4 records examined has.*check its spelling"):
        assert client.count(points, where='lnag = "en"') == 0
    with pytest.warns(FilterWarning, match="compares 'year' with a string, and the records have numbers"):
        assert client.count(points, where='year > "3"') == 0
