"""The Milvus backend: limits and failures of Milvus, and details of Milvus that callers must not see."""

from __future__ import annotations

import logging
import socket
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest

from emberpc.client import Client, Record
from emberpc.server.cancellation import cancelled_when
from emberpc.server.collections import CollectionSpec, Distance, NewRecord, SearchStrategy
from emberpc.server.collections.filters import Comparison, Existence, Not, Operator
from emberpc.server.errors import Code
from examples.server_process import ServerProcess
from index.support import refused
from index_helpers import true_scores, vectors
from milvus_lite_process import MilvusLiteProcess, need_milvus

if TYPE_CHECKING:
    from emberpc.server.milvus import MilvusIndex
    from emberpc.server.milvus.collection import MilvusCollection

DIMENSIONS = 4


@pytest.fixture(scope="module")
def milvus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MilvusLiteProcess]:
    need_milvus("pymilvus", "milvus_lite")
    process = MilvusLiteProcess(tmp_path_factory.mktemp("milvus") / "data")
    yield process
    process.stop()


@pytest.fixture
def index(milvus: MilvusLiteProcess) -> Iterator[MilvusIndex]:
    from emberpc.server.milvus import MilvusIndex

    opened = MilvusIndex(milvus.uri)
    yield opened
    opened.close()


@pytest.fixture
def collection(index: MilvusIndex) -> Iterator[MilvusCollection]:
    yield index.create(CollectionSpec("c", DIMENSIONS))
    index.delete("c")


def test_calls_are_unavailable_while_milvus_does_not_run(tmp_path: Path) -> None:
    need_milvus("pymilvus", "milvus_lite")
    from emberpc.server.milvus import MilvusIndex

    milvus = MilvusLiteProcess(tmp_path / "data")
    index = MilvusIndex(milvus.uri)
    collection = index.create(CollectionSpec("c", DIMENSIONS))
    matrix = vectors(50, dimensions=DIMENSIONS)
    records = [NewRecord(f"r{i:02}") for i in range(50)]
    collection.upsert(records, matrix)
    milvus.kill()
    calls: list[Callable[[], object]] = [
        lambda: index.get("c"),
        lambda: index.page(10, ""),
        lambda: collection.search(matrix[:1], 1),
        lambda: collection.upsert(records[:1], matrix[:1]),
    ]
    for call in calls:
        with refused(Code.UNAVAILABLE, "Milvus cannot be reached", "try again") as caught:
            call()
        assert caught.value.retry_after
    again = MilvusLiteProcess(tmp_path / "data", milvus.port)
    try:
        assert index.get("c") is collection
        assert collection.count() == 50
        assert [outcome.hits[0][0].id for outcome in collection.search(matrix, 1)] == [record.id for record in records]
        collection.upsert(records[:1], matrix[:1])
    finally:
        index.close()
        again.stop()
    with refused(Code.UNAVAILABLE, "closed"):
        collection.count()


def test_the_documented_code_copies_collections_between_backends(milvus: MilvusLiteProcess, tmp_path: Path) -> None:
    text = (Path(__file__).parent.parent.parent / "docs" / "scaling.md").read_text(encoding="utf-8")
    code = textwrap.dedent(text.partition("```python\n")[2].partition("```")[0])
    matrix = vectors(1500, dimensions=DIMENSIONS)
    records = [Record(f"r{i:04}", f"text {i}", {"i": i}, "label") for i in range(1500)]
    flags = ["--index-backend", "milvus", "--milvus-uri", milvus.uri]
    with (
        ServerProcess({}, tmp_path / "old") as old,
        ServerProcess({}, tmp_path / "new", *flags) as new,
        Client(old.address) as before,
        Client(new.address) as after,
    ):
        before.create_collection("moving.one", dimensions=DIMENSIONS, distance="euclidean", m=8)
        before.upsert("moving.one", records, vectors=matrix)
        before.create_collection("moving.none", dimensions=3)
        exec(code, {"OLD": old.address, "NEW": new.address})
        found = list(after.records("moving.one", with_vectors=True))
        assert found == records
        assert np.array_equal(np.stack([each.vector for each in found if each.vector is not None]), matrix)
        for collection in before.collections():
            there = after.get_collection(collection.name)
            assert (there.distance, there.m, there.record_count) == (
                collection.distance,
                collection.m,
                collection.record_count,
            )
            after.delete_collection(collection.name)


def test_the_server_does_not_start_without_milvus(tmp_path: Path) -> None:
    need_milvus("pymilvus")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        uri = f"http://127.0.0.1:{taken.getsockname()[1]}"
    with pytest.raises(RuntimeError, match="--milvus-uri"):
        ServerProcess({}, tmp_path, "--index-backend", "milvus", "--milvus-uri", uri)


def test_records_beyond_limits_of_milvus_are_refused_with_the_field(collection: MilvusCollection) -> None:
    matrix = vectors(2, dimensions=DIMENSIONS)
    with refused(Code.INVALID_ARGUMENT, "65537 bytes", "Milvus holds 65535", field="records[1].text"):
        collection.upsert([NewRecord("a"), NewRecord("b", "é" * 32768 + "x")], matrix)
    collection.upsert([NewRecord("a", "é" * 32767)], matrix[:1])
    assert collection.get(["a"])[0].text == "é" * 32767
    with refused(Code.INVALID_ARGUMENT, "too short", field="vectors[0]"):
        collection.upsert([NewRecord("b")], matrix[:1] * np.float32(1e-20))
    assert collection.count() == 1


def test_collections_beyond_limits_of_milvus_are_refused_with_the_field(index: MilvusIndex) -> None:
    with refused(Code.INVALID_ARGUMENT, "Milvus needs 2", field="collection.dimensions"):
        index.create(CollectionSpec("one", 1))
    with refused(Code.INVALID_ARGUMENT, "count twice", field="collection.name"):
        index.create(CollectionSpec("a" + "_" * 127, DIMENSIONS))


def test_expected_revisions_are_refused(collection: MilvusCollection) -> None:
    with refused(Code.UNIMPLEMENTED, "expected_revisions", "'milvus'", "leave it unset"):
        collection.upsert([NewRecord("a")], vectors(1, dimensions=DIMENSIONS), [0])


def test_a_time_to_live_is_refused(collection: MilvusCollection) -> None:
    with refused(Code.UNIMPLEMENTED, "time_to_live", "'milvus'", "embedded index"):
        collection.upsert([NewRecord("a", time_to_live=60)], vectors(1, dimensions=DIMENSIONS))


def test_reembedding_is_refused_with_an_export_as_remedy(collection: MilvusCollection, index: MilvusIndex) -> None:
    with refused(Code.UNIMPLEMENTED, "ReembedCollection", "'milvus'", "--text-only"):
        index.reembed(collection, model="m", fingerprint="f", dimensions=DIMENSIONS)
    assert index.reembeddings() == []
    index.cancel_reembedding(collection.spec.name)


def test_duplicates_and_clusters_are_refused_with_a_remedy(collection: MilvusCollection) -> None:
    with refused(Code.UNIMPLEMENTED, "FindDuplicates", "'milvus'", "embedded index"):
        collection.duplicates(0.9, lambda: False)
    with refused(Code.UNIMPLEMENTED, "ClusterRecords", "'milvus'", "embedded index"):
        collection.clusters(2, 1, lambda: False)


def test_backup_and_restore_are_refused_with_an_export_as_remedy(
    collection: MilvusCollection, index: MilvusIndex
) -> None:
    with refused(Code.UNIMPLEMENTED, "BackupCollection", "'milvus'", "collection export"):
        collection.backup(lambda: False)
    with refused(Code.UNIMPLEMENTED, "RestoreCollection", "'milvus'", "export"):
        index.restore("copy", 0, lambda spec: None)


def test_lexical_and_hybrid_search_are_refused(collection: MilvusCollection) -> None:
    with refused(Code.UNIMPLEMENTED, "mode LEXICAL", "'milvus'", "DENSE"):
        collection.search_lexical(["word"], [1])
    with refused(Code.UNIMPLEMENTED, "mode HYBRID", "'milvus'", "DENSE"):
        collection.search_hybrid(vectors(1, dimensions=DIMENSIONS), ["word"], [1], dense_weight=0.5)


@pytest.mark.parametrize("one_in", [2, 10, 100])
def test_a_filtered_search_of_the_graph_finds_the_true_nearest_records(
    collection: MilvusCollection, monkeypatch: pytest.MonkeyPatch, one_in: int
) -> None:
    """By default, emberpc itself compares few matching records; the test switches that off, so that Milvus searches."""
    from emberpc.server.milvus import searching

    monkeypatch.setattr(searching, "_FEW", 0)
    matrix = vectors(3000, dimensions=DIMENSIONS)
    for start in range(0, len(matrix), 1000):
        some = range(start, start + 1000)
        collection.upsert([NewRecord(f"r{i}", metadata={"kind": i % one_in}) for i in some], matrix[some])
    queries = vectors(3020, dimensions=DIMENSIONS)[3000:]
    condition = Comparison("kind", Operator.EQUAL, 0)
    found = 0
    for query, outcome in zip(queries, collection.search(queries, 10, conditions=[condition] * 20), strict=True):
        assert outcome.plan.strategy is SearchStrategy.HNSW
        assert outcome.plan.ef >= 200 * one_in
        assert all(record.metadata["kind"] == 0 for record, _ in outcome.hits)
        best = np.argsort(-true_scores(query, matrix[::one_in], Distance.COSINE))[:10]
        found += len({record.id for record, _ in outcome.hits} & {f"r{one_in * row}" for row in best})
    assert found / 200 >= 0.98


def test_a_write_is_not_reported_as_synced(collection: MilvusCollection) -> None:
    assert not collection.upsert([NewRecord("a")], vectors(1, dimensions=DIMENSIONS)).synced
    assert not collection.delete(["a"]).synced


def test_two_servers_share_the_collections_of_one_milvus(milvus: MilvusLiteProcess, index: MilvusIndex) -> None:
    from emberpc.server.milvus import MilvusIndex

    other = MilvusIndex(milvus.uri)
    index.create(CollectionSpec("shared", DIMENSIONS)).upsert([NewRecord("a")], vectors(1, dimensions=DIMENSIONS))
    assert other.get("shared").get(["a"])[0].id == "a"
    with refused(Code.ALREADY_EXISTS, "'shared'"):
        other.create(CollectionSpec("shared", DIMENSIONS))
    other.delete("shared")
    other.create(CollectionSpec("shared", 7, distance=Distance.EUCLIDEAN))
    assert index.get("shared").spec.dimensions == 7
    index.get("shared").upsert([NewRecord("b")], vectors(1, dimensions=7))
    other.delete("shared")
    with refused(Code.NOT_FOUND, "'shared'"):
        index.get("shared")
    other.close()


def test_collections_of_other_programs_are_not_listed_or_deleted(milvus: MilvusLiteProcess, index: MilvusIndex) -> None:
    from pymilvus import MilvusClient

    others = MilvusClient(milvus.uri)
    for name in ("theirs", "emberpc_theirs", "emberpc_not_ours"):
        others.create_collection(name, dimension=DIMENSIONS)
    assert index.page(100, "") == ([], "")
    for own_name in ("theirs", "_theirs", "not_ours"):
        with refused(Code.NOT_FOUND):
            index.delete(own_name)
    assert others.has_collection("emberpc_theirs")
    for name in others.list_collections():
        others.drop_collection(name)
    others.close()


class RpcFailure(grpc.RpcError):
    """A failed call of gRPC with a text that must not reach callers."""

    def __init__(self, code: grpc.StatusCode) -> None:
        super().__init__("secret")
        self._code = code

    def code(self) -> grpc.StatusCode:
        return self._code


@pytest.mark.parametrize(
    ("cause", "code"),
    [
        (8, Code.RESOURCE_EXHAUSTED),
        (9, Code.RESOURCE_EXHAUSTED),
        (100, Code.NOT_FOUND),
        (101, Code.UNAVAILABLE),
        (1100, Code.INTERNAL),
        (1401, Code.FAILED_PRECONDITION),
        (65535, Code.INTERNAL),
        (grpc.StatusCode.UNAVAILABLE, Code.UNAVAILABLE),
        (grpc.StatusCode.DEADLINE_EXCEEDED, Code.UNAVAILABLE),
        (grpc.StatusCode.UNAUTHENTICATED, Code.FAILED_PRECONDITION),
    ],
)
def test_each_failure_of_milvus_has_its_code_and_hides_the_text_of_milvus(
    cause: Any, code: Code, caplog: pytest.LogCaptureFixture
) -> None:
    need_milvus("pymilvus")
    from pymilvus import MilvusException

    from emberpc.server.milvus.connection import translated

    raised: list[Exception] = [MilvusException(code=cause, message="secret")]
    if isinstance(cause, grpc.StatusCode):
        raised.append(RpcFailure(cause))
    for error in raised:
        with caplog.at_level(logging.WARNING), refused(code, "reading: ") as caught, translated("reading"):
            raise error
        assert "secret" not in caught.value.message
        assert (caught.value.retry_after is not None) is (code is Code.UNAVAILABLE or cause == 8)
    assert caplog.text


def test_cyclic_causes_of_an_exception_are_followed_once() -> None:
    need_milvus("pymilvus")
    from pymilvus import MilvusException

    from emberpc.server.milvus.connection import translated

    error, cause = MilvusException(code=65535, message="secret"), OSError()
    error.__cause__, cause.__cause__ = cause, error
    with refused(Code.INTERNAL, "reading: Milvus failed"), translated("reading"):
        raise error


def test_the_response_of_a_write_states_no_durability(milvus: MilvusLiteProcess, tmp_path: Path) -> None:
    from emberpc.v1 import index_pb2, index_pb2_grpc

    with (
        ServerProcess({}, tmp_path, "--index-backend", "milvus", "--milvus-uri", milvus.uri) as server,
        Client(server.address) as client,
        grpc.insecure_channel(server.address) as channel,
    ):
        client.create_collection("over-rpc", dimensions=DIMENSIONS)
        stub = index_pb2_grpc.IndexServiceStub(channel)
        request = index_pb2.DeleteRecordsRequest(collection="over-rpc", ids=["a"])
        assert stub.DeleteRecords(request).receipt.durability == index_pb2.DURABILITY_UNSPECIFIED
        client.delete_collection("over-rpc")


def test_a_cancelled_call_sends_no_more_requests_to_milvus(
    collection: MilvusCollection, monkeypatch: pytest.MonkeyPatch
) -> None:
    from emberpc.server.milvus import reading

    monkeypatch.setattr(reading.Reader.walk, "__kwdefaults__", {"after": "", "batch": 5, "among": ""})
    collection.upsert([NewRecord(f"r{i:02}") for i in range(50)], vectors(50, dimensions=DIMENSIONS))
    asked: list[str] = []
    call = reading.Reader.call

    def counted(self: reading.Reader, method: str, **arguments: Any) -> Any:
        asked.append(method)
        return call(self, method, **arguments)

    monkeypatch.setattr(reading.Reader, "call", counted)
    # Found page by page, then deleted.
    with refused(Code.DEADLINE_EXCEEDED, "stopped"), cancelled_when(lambda: len(asked) >= 3):
        collection.delete_matching(Not(Existence("gone")))
    assert asked == ["query"] * 3
    assert collection.count() == 50
