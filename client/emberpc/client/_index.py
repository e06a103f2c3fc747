"""IndexService: requests from arguments, results from answers."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy.typing as npt

from emberpc.client import _checks
from emberpc.client._calls import Call, Job, ListCollector, Method, Page, check_count, chunks, divisible
from emberpc.client._records import NewRecord, block, new_records, read_records
from emberpc.client._words import FUSIONS, SEARCH_MODES, STRATEGIES, TRUNCATIONS, value_of, word_of
from emberpc.client.exceptions import FilterWarning, InputError, InputTypeError
from emberpc.client.filters import Where, filter_of
from emberpc.client.types import (
    Fusion,
    Hit,
    Progress,
    Query,
    Record,
    RecordId,
    SearchMode,
    SearchPlan,
    SearchQuery,
    SearchResult,
    Truncation,
    UpsertResult,
)
from emberpc.v1 import index_pb2 as pb
from emberpc.v1 import types_pb2
from emberpc.wire import vectors

_SERVICE = "/emberpc.v1.IndexService/"
UPSERT_RECORDS = Method(_SERVICE + "UpsertRecords", pb.UpsertRecordsResponse)
BATCH_GET_RECORDS = Method(_SERVICE + "BatchGetRecords", pb.BatchGetRecordsResponse)
DELETE_RECORDS = Method(_SERVICE + "DeleteRecords", pb.DeleteRecordsResponse)
LIST_RECORDS = Method(_SERVICE + "ListRecords", pb.ListRecordsResponse)
COUNT_RECORDS = Method(_SERVICE + "CountRecords", pb.CountRecordsResponse)
SEARCH = Method(_SERVICE + "Search", pb.SearchResponse)

#: Ids of one request; the API takes 10,000.
_IDS = 1000
#: Queries of one request; the API takes 1000.
_QUERIES = 100
#: How the names of this package's modules begin.
_CLIENT = "emberpc.client."
_TEXT_AND_METADATA = (pb.RECORD_PART_TEXT, pb.RECORD_PART_METADATA)


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
    truncation: Truncation | None,
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
            truncation=truncation_of(truncation),
            expected_revisions=expected[first : first + len(part)],
        )
        return Call(UPSERT_RECORDS, request, _write, "records", first, len(part))

    partly_done = "the first {} records of this call are written already"
    if expected:
        partly_done += ", with new revisions: repeat it without them"
    calls = (call(*part) for part in parts)
    return Job(calls, _Writes(), progress=progress, ordered=True, partly_done=partly_done)


def _revisions(values: Iterable[int], records: int) -> list[int]:
    """Check the revisions that a write of `records` records expects."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise InputTypeError(f"expected_revisions is of type {type(values).__name__}; it must be a list of int")
    checked = [_checks.count(value, f"expected_revisions[{i}]", bits=63) for i, value in enumerate(values)]
    if len(checked) != records:
        raise InputError(f"expected_revisions has {len(checked)} items for {records} records; give one for each")
    return checked


def get(collection: str, ids: Iterable[str], *, with_vectors: bool) -> Job[list[Record], list[Record]]:
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
            divisible(call, first, part),
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


def delete(collection: str, ids: Iterable[str] | None, where: Where | None) -> Job[int, int]:
    """Return the calls of `Client.delete`."""
    collection = _checks.text(collection, "collection")
    if (ids is None) == (where is None):
        raise InputError("give ids or where, one of the two")
    if ids is None:
        everywhere = pb.DeleteRecordsRequest(collection=collection, filter=filter_of(where))
        return Job(iter([Call(DELETE_RECORDS, everywhere, _read_deleted)]), _Sum())

    def call(first: int, part: list[str]) -> Call[pb.DeleteRecordsResponse, int]:
        request = pb.DeleteRecordsRequest(collection=collection, ids=part)
        return Call(DELETE_RECORDS, request, lambda response: response.deleted_count, "ids", first, len(part))

    partly_done = "the first {} ids of this call are deleted already"
    return Job((call(*part) for part in _id_chunks(ids)), _Sum(), ordered=True, partly_done=partly_done)


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
        _read_page,
    )


def count(collection: str, where: Where | None) -> Call[pb.CountRecordsResponse, int]:
    """Return the call of `Client.count`."""
    request = pb.CountRecordsRequest(collection=_checks.text(collection, "collection"), filter=filter_of(where))
    return Call(COUNT_RECORDS, request, _read_count)


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
    truncation: Truncation,
    with_vectors: bool,
    name: str = "queries[{}]",
) -> Job[list[SearchResult], list[SearchResult]]:
    """Return the calls of `Client.search_batch`; `name` is what messages call query `{}`."""
    if isinstance(queries, (str, RecordId, SearchQuery, Mapping)) or not isinstance(queries, Iterable):
        raise InputTypeError(f"queries is one {type(queries).__name__}, it must be a list; use `search` for one query")
    messages = [_query(query, name.format(i)) for i, query in enumerate(queries)]
    template = pb.SearchRequest(
        collection=_checks.text(collection, "collection"),
        top_k=_checks.count(top_k, "top_k", 1),
        ef=_checks.count(ef, "ef"),
        min_recall=_checks.number(min_recall, "min_recall"),
        filter=filter_of(where),
        mode=value_of("mode", mode, SEARCH_MODES),
        dense_weight=None if dense_weight is None else _checks.number(dense_weight, "dense_weight"),
        fusion=pb.SEARCH_FUSION_UNSPECIFIED if fusion is None else value_of("fusion", fusion, FUSIONS),
        truncation=value_of("truncation", truncation, TRUNCATIONS),
        parts=_parts(with_vectors),
    )

    def call(first: int, part: list[pb.SearchQuery]) -> Call[pb.SearchResponse, list[SearchResult]]:
        def decode(response: pb.SearchResponse) -> list[SearchResult]:
            check_count(len(response.results), len(part), "results")
            warn(response.warnings)
            return [_result(message) for message in response.results]

        request = pb.SearchRequest(queries=part)
        request.MergeFrom(template)
        return Call(SEARCH, request, decode, "queries", first, len(part), divisible(call, first, part))

    parts = chunks(messages, _QUERIES, lambda message: message.ByteSize())
    return Job((call(*part) for part in parts), ListCollector[SearchResult]())


def warn(sentences: Iterable[str]) -> None:
    """Warn of a filter that matches nothing, and probably does not mean what was intended; names the caller's line."""
    for sentence in sentences:
        warnings.warn(sentence, FilterWarning, stacklevel=_callers_level())


def _callers_level() -> int:
    """Return the `stacklevel` with which the caller of this function warns of the line that called the client."""
    level = 2
    frame = sys._getframe(2)
    while frame.f_back is not None and f"{frame.f_globals.get('__name__')}.".startswith(_CLIENT):
        level += 1
        frame = frame.f_back
    return level


def truncation_of(truncation: Truncation | None) -> types_pb2.Truncation.ValueType:
    """Return the API's value; None is what the collection says."""
    return types_pb2.TRUNCATION_UNSPECIFIED if truncation is None else value_of("truncation", truncation, TRUNCATIONS)


def _read_page(response: pb.ListRecordsResponse) -> Page[Record]:
    warn(response.warnings)
    return Page(read_records(response.records, response.vectors), response.next_page_token)


def _read_count(response: pb.CountRecordsResponse) -> int:
    warn(response.warnings)
    return response.count


def _read_deleted(response: pb.DeleteRecordsResponse) -> int:
    warn(response.warnings)
    return response.deleted_count


def _id_chunks(ids: Iterable[str]) -> Iterable[tuple[int, list[str]]]:
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
    if isinstance(query, Sequence) and any(isinstance(item, str) for item in query):
        raise InputTypeError(f"{name} is a list of texts; it must be one text, or use `search_batch` for several")
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
        truncated=message.usage.truncated,
    )
