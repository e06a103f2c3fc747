"""IndexService: requests from arguments, results from answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy.typing as npt

from emberpc.client import _checks
from emberpc.client._calls import Call, Job, ListCollector, Method, Page, Step, check_count, chunks
from emberpc.client._plain import moment
from emberpc.client._records import NewRecord, block, new_records, read_records
from emberpc.client._words import DISTANCES, FUSIONS, SEARCH_MODES, STRATEGIES, TRUNCATIONS, value_of, word_of
from emberpc.client.exceptions import InputError, InputTypeError
from emberpc.client.filters import Where, filter_of
from emberpc.client.types import (
    Collection,
    Distance,
    Fusion,
    Hit,
    Progress,
    Query,
    Record,
    RecordId,
    RecordProblem,
    Reembedding,
    SearchMode,
    SearchPlan,
    SearchQuery,
    SearchResult,
    Truncation,
    UpsertResult,
    Verification,
)
from emberpc.v1 import index_pb2 as pb
from emberpc.v1.errors_pb2 import ErrorInfo
from emberpc.wire import status, vectors

_SERVICE = "/emberpc.v1.IndexService/"
CREATE_COLLECTION = Method(_SERVICE + "CreateCollection", pb.CreateCollectionResponse)
GET_COLLECTION = Method(_SERVICE + "GetCollection", pb.GetCollectionResponse)
LIST_COLLECTIONS = Method(_SERVICE + "ListCollections", pb.ListCollectionsResponse)
DELETE_COLLECTION = Method(_SERVICE + "DeleteCollection", pb.DeleteCollectionResponse)
UPSERT_RECORDS = Method(_SERVICE + "UpsertRecords", pb.UpsertRecordsResponse)
BATCH_GET_RECORDS = Method(_SERVICE + "BatchGetRecords", pb.BatchGetRecordsResponse)
DELETE_RECORDS = Method(_SERVICE + "DeleteRecords", pb.DeleteRecordsResponse)
LIST_RECORDS = Method(_SERVICE + "ListRecords", pb.ListRecordsResponse)
COUNT_RECORDS = Method(_SERVICE + "CountRecords", pb.CountRecordsResponse)
VERIFY_COLLECTION = Method(_SERVICE + "VerifyCollection", pb.VerifyCollectionResponse)
REEMBED_COLLECTION = Method(_SERVICE + "ReembedCollection", pb.ReembedCollectionResponse)
CANCEL_REEMBEDDING = Method(_SERVICE + "CancelReembedding", pb.CancelReembeddingResponse)
SEARCH = Method(_SERVICE + "Search", pb.SearchResponse)

#: Ids of one request; the API takes 10,000.
_IDS = 1000
#: Queries of one request; the API takes 1000.
_QUERIES = 100
_TEXT_AND_METADATA = (pb.RECORD_PART_TEXT, pb.RECORD_PART_METADATA)


def create_collection(
    name: str,
    *,
    model: str,
    dimensions: int,
    distance: Distance,
    truncation: Truncation,
    m: int,
    ef_construction: int,
    indexed_fields: Sequence[str],
) -> Call[pb.CreateCollectionResponse, Collection]:
    """Return the call of `Client.create_collection`."""
    collection = pb.Collection(
        name=_checks.text(name, "name"),
        model=_checks.text(model, "model"),
        dimensions=_checks.count(dimensions, "dimensions"),
        distance=value_of("distance", distance, DISTANCES),
        truncation=value_of("truncation", truncation, TRUNCATIONS),
        hnsw=pb.HnswParameters(
            m=_checks.count(m, "m"), ef_construction=_checks.count(ef_construction, "ef_construction")
        ),
        indexed_fields=_checks.texts(indexed_fields, "indexed_fields") if indexed_fields else (),
    )
    request = pb.CreateCollectionRequest(collection=collection)
    return Call(CREATE_COLLECTION, request, lambda response: read_collection(response.collection))


def get_collection(name: str) -> Call[pb.GetCollectionResponse, Collection]:
    """Return the call of `Client.get_collection`."""
    request = pb.GetCollectionRequest(name=_checks.text(name, "name"))
    return Call(GET_COLLECTION, request, lambda response: read_collection(response.collection))


def list_collections(page_token: str) -> Call[pb.ListCollectionsResponse, Page[Collection]]:
    """Return the call for one page of `Client.collections`."""
    return Call(
        LIST_COLLECTIONS,
        pb.ListCollectionsRequest(page_token=page_token),
        lambda response: Page([read_collection(message) for message in response.collections], response.next_page_token),
    )


def delete_collection(name: str) -> Call[pb.DeleteCollectionResponse, None]:
    """Return the call of `Client.delete_collection`."""
    request = pb.DeleteCollectionRequest(name=_checks.text(name, "name"))
    return Call(DELETE_COLLECTION, request, lambda _: None)


def reembed(name: str, model: str, dimensions: int) -> Call[pb.ReembedCollectionResponse, Collection]:
    """Return the call of `Client.reembed_collection`."""
    request = pb.ReembedCollectionRequest(
        name=_checks.text(name, "name"),
        model=_checks.text(model, "model"),
        dimensions=_checks.count(dimensions, "dimensions"),
    )
    return Call(REEMBED_COLLECTION, request, lambda response: read_collection(response.collection))


def cancel_reembedding(name: str) -> Call[pb.CancelReembeddingResponse, Collection]:
    """Return the call of `Client.cancel_reembedding`."""
    request = pb.CancelReembeddingRequest(name=_checks.text(name, "name"))
    return Call(CANCEL_REEMBEDDING, request, lambda response: read_collection(response.collection))


def verify_collection(
    name: str, progress: Callable[[int, int], None] | None, full: bool
) -> Call[pb.VerifyCollectionResponse, Step[Verification]]:
    """Return the call of `Client.verify_collection`."""
    problems: list[RecordProblem] = []

    def read(message: pb.VerifyCollectionResponse) -> Step[Verification]:
        for failure in message.failures:
            info = status.detail(failure.error, ErrorInfo)
            problems.append(RecordProblem(failure.id, info.reason if info else "", failure.error.message))
        if progress is not None:
            progress(message.checked_count, message.total_count)
        return Step("done" if message.done else "checking", Verification(message.checked_count, tuple(problems)))

    request = pb.VerifyCollectionRequest(name=_checks.text(name, "name"), full=_checks.flag(full, "full"))
    return Call(VERIFY_COLLECTION, request, read)


class _Writes:
    """Adds up what the writes of one upsert came to."""

    def __init__(self) -> None:
        self._total = UpsertResult(0, 0, 0)

    def add(self, part: UpsertResult) -> None:
        """Take the next write."""
        total = self._total
        self._total = UpsertResult(total.inserted + part.inserted, total.updated + part.updated, part.sequence)

    def result(self) -> UpsertResult:
        """Return the sums, and the last write's number."""
        return self._total


def upsert(
    collection: str,
    records: Iterable[Record | Mapping[str, Any]],
    *,
    matrix: npt.ArrayLike | None,
    expected_revisions: Iterable[int] | None,
    batch_size: int,
    progress: Progress | None,
) -> Job[UpsertResult, UpsertResult]:
    """Return the calls of `Client.upsert`."""
    collection = _checks.text(collection, "collection")
    items = new_records(records, matrix)
    expected: list[int] = []
    if expected_revisions is not None:
        items = list(items)
        expected = _revisions(expected_revisions, len(items))
    parts = chunks(items, _checks.count(batch_size, "batch_size", 1), lambda record: record.size)

    def call(first: int, part: list[NewRecord]) -> Call[pb.UpsertRecordsResponse, UpsertResult]:
        request = pb.UpsertRecordsRequest(
            collection=collection,
            records=[record.message for record in part],
            vectors=block(part, first),
            expected_revisions=expected[first : first + len(part)],
        )
        return Call(UPSERT_RECORDS, request, _write, "records", first, len(part))

    return Job((call(*part) for part in parts), _Writes(), progress=progress, ordered=True)


def _revisions(values: Iterable[int], records: int) -> list[int]:
    """Check the revisions that a write of so many records expects."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise InputTypeError(f"expected_revisions is of type {type(values).__name__}; it must be a list of int")
    checked = [_checks.count(value, f"expected_revisions[{i}]", bits=63) for i, value in enumerate(values)]
    if len(checked) != records:
        raise InputError(f"expected_revisions has {len(checked)} items for {records} records; give one for each")
    return checked


def get(collection: str, ids: Sequence[str], *, with_vectors: bool) -> Job[list[Record], list[Record]]:
    """Return the calls of `Client.get`."""
    collection = _checks.text(collection, "collection")

    def call(first: int, part: list[str]) -> Call[pb.BatchGetRecordsResponse, list[Record]]:
        request = pb.BatchGetRecordsRequest(collection=collection, ids=part, parts=_parts(with_vectors))
        return Call(
            BATCH_GET_RECORDS,
            request,
            lambda response: read_records(response.records, response.vectors),
            "ids",
            first,
            len(part),
        )

    return Job((call(*part) for part in _id_chunks(ids)), ListCollector[Record]())


class _Sum:
    """Adds up numbers."""

    def __init__(self) -> None:
        self._sum = 0

    def add(self, part: int) -> None:
        """Take the next number."""
        self._sum += part

    def result(self) -> int:
        """Return the sum."""
        return self._sum


def delete(collection: str, ids: Sequence[str] | None, where: Where | None) -> Job[int, int]:
    """Return the calls of `Client.delete`."""
    collection = _checks.text(collection, "collection")
    if (ids is None) == (where is None):
        raise InputError("give ids or where, one of the two")
    if ids is None:
        everywhere = pb.DeleteRecordsRequest(collection=collection, filter=filter_of(where))
        return Job(iter([Call(DELETE_RECORDS, everywhere, lambda response: response.deleted_count)]), _Sum())

    def call(first: int, part: list[str]) -> Call[pb.DeleteRecordsResponse, int]:
        request = pb.DeleteRecordsRequest(collection=collection, ids=part)
        return Call(DELETE_RECORDS, request, lambda response: response.deleted_count, "ids", first, len(part))

    return Job((call(*part) for part in _id_chunks(ids)), _Sum(), ordered=True)


def list_records(
    collection: str, page_token: str, *, where: Where | None, with_vectors: bool, page_size: int
) -> Call[pb.ListRecordsResponse, Page[Record]]:
    """Return the call for one page of `Client.records`."""
    request = pb.ListRecordsRequest(
        collection=_checks.text(collection, "collection"),
        page_size=_checks.count(page_size, "page_size"),
        page_token=page_token,
        filter=filter_of(where),
        parts=_parts(with_vectors),
    )
    return Call(
        LIST_RECORDS,
        request,
        lambda response: Page(read_records(response.records, response.vectors), response.next_page_token),
    )


def count(collection: str, where: Where | None) -> Call[pb.CountRecordsResponse, int]:
    """Return the call of `Client.count`."""
    request = pb.CountRecordsRequest(collection=_checks.text(collection, "collection"), filter=filter_of(where))
    return Call(COUNT_RECORDS, request, lambda response: response.count)


def search(
    collection: str,
    queries: Iterable[Query | SearchQuery],
    *,
    top_k: int,
    ef: int,
    min_recall: float,
    where: Where | None,
    mode: SearchMode,
    dense_weight: float | None,
    fusion: Fusion | None,
    with_vectors: bool,
    name: str = "queries[{}]",
) -> Job[list[SearchResult], list[SearchResult]]:
    """Return the calls of `Client.search_batch`; `name` is what messages call query `{}`."""
    if isinstance(queries, (str, RecordId, SearchQuery)) or not isinstance(queries, Iterable):
        raise InputTypeError(f"queries is one {type(queries).__name__}, it must be a list; use `search` for one query")
    messages = [_query(query, name.format(i)) for i, query in enumerate(queries)]
    template = pb.SearchRequest(
        collection=_checks.text(collection, "collection"),
        top_k=_checks.count(top_k, "top_k"),
        ef=_checks.count(ef, "ef"),
        min_recall=_checks.number(min_recall, "min_recall"),
        filter=filter_of(where),
        mode=value_of("mode", mode, SEARCH_MODES),
        dense_weight=None if dense_weight is None else _checks.number(dense_weight, "dense_weight"),
        fusion=pb.SEARCH_FUSION_UNSPECIFIED if fusion is None else value_of("fusion", fusion, FUSIONS),
        parts=_parts(with_vectors),
    )

    def call(first: int, part: list[pb.SearchQuery]) -> Call[pb.SearchResponse, list[SearchResult]]:
        def decode(response: pb.SearchResponse) -> list[SearchResult]:
            check_count(len(response.results), len(part), "results")
            return [_result(message) for message in response.results]

        request = pb.SearchRequest(queries=part)
        request.MergeFrom(template)
        return Call(SEARCH, request, decode, "queries", first, len(part))

    parts = chunks(messages, _QUERIES, lambda message: message.ByteSize())
    return Job((call(*part) for part in parts), ListCollector[SearchResult]())


def _id_chunks(ids: Sequence[str]) -> Iterable[tuple[int, list[str]]]:
    return chunks(_checks.texts(ids, "ids"), _IDS, lambda record_id: 4 * len(record_id))


def _parts(with_vectors: bool) -> list[pb.RecordPart.ValueType]:
    with_vectors = _checks.flag(with_vectors, "with_vectors")
    return [*_TEXT_AND_METADATA, *([pb.RECORD_PART_VECTOR] if with_vectors else [])]


def _query(query: Query | SearchQuery, name: str) -> pb.SearchQuery:
    if isinstance(query, SearchQuery):
        message = _query(query.query, f"{name}.query")
        options = pb.SearchQuery(
            filter=filter_of(query.where, f"{name}.where"),
            top_k=_checks.count(query.top_k, f"{name}.top_k"),
            ef=_checks.count(query.ef, f"{name}.ef"),
        )
        message.MergeFrom(options)
        return message
    if isinstance(query, str):
        return pb.SearchQuery(text=_checks.text(query, name))
    if isinstance(query, RecordId):
        return pb.SearchQuery(record_id=_checks.text(query.id, f"{name}.id"))
    return pb.SearchQuery(vector=vectors.encode(_checks.vector(query, name)[None]))


def _write(response: pb.UpsertRecordsResponse) -> UpsertResult:
    return UpsertResult(response.inserted_count, response.updated_count, response.receipt.sequence)


def _result(message: pb.SearchResult) -> SearchResult:
    records = read_records([hit.record for hit in message.hits], message.vectors)
    return SearchResult(
        hits=tuple(Hit(record, hit.score) for record, hit in zip(records, message.hits, strict=True)),
        plan=SearchPlan(
            strategy=word_of(message.plan.strategy, STRATEGIES),
            ef=message.plan.ef,
            compared_count=message.plan.compared_count,
            shortfall_reason=message.plan.shortfall_reason,
            lexical_count=message.plan.lexical_count,
        ),
    )


def read_collection(message: pb.Collection) -> Collection:
    """Return what an answer says of a collection."""
    return Collection(
        name=message.name,
        model=message.model,
        model_fingerprint=message.model_fingerprint,
        dimensions=message.dimensions,
        distance=word_of(message.distance, DISTANCES),
        truncation=word_of(message.truncation, TRUNCATIONS),
        m=message.hnsw.m,
        ef_construction=message.hnsw.ef_construction,
        record_count=message.record_count,
        sequence=message.sequence,
        size_bytes=message.size_bytes,
        create_time=moment(message.create_time) if message.HasField("create_time") else None,
        problem=message.problem,
        reembedding=_reembedding(message.reembedding) if message.HasField("reembedding") else None,
        indexed_fields=tuple(message.indexed_fields),
    )


def _reembedding(message: pb.Reembedding) -> Reembedding:
    return Reembedding(
        model=message.model,
        done=message.done,
        total=message.total,
        start_time=moment(message.start_time) if message.HasField("start_time") else None,
        problem=message.problem,
    )
