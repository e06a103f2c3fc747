"""Upsert, get, list, count and delete records: build requests, decode responses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy.typing as npt

from emberpc.client._core import checks
from emberpc.client._core.details import report
from emberpc.client._core.enums import TRUNCATIONS, value_of
from emberpc.client._core.filter_warnings import warn
from emberpc.client._core.joined_calls import JoinedCalls, ListCollector
from emberpc.client._core.record_messages import NewRecord, block, new_records, parts_of, read_records
from emberpc.client._core.request_chunks import chunks, divisible
from emberpc.client._core.rpc_call import Call, Method, Page
from emberpc.client.details import Details
from emberpc.client.exceptions import InputError, InputTypeError
from emberpc.client.filters import Where, filter_of
from emberpc.client.types import Progress, Record, Truncation, UpsertResult
from emberpc.v1 import index_pb2 as pb
from emberpc.v1 import types_pb2

_SERVICE = "/emberpc.v1.IndexService/"
UPSERT_RECORDS = Method(_SERVICE + "UpsertRecords", pb.UpsertRecordsResponse)
BATCH_GET_RECORDS = Method(_SERVICE + "BatchGetRecords", pb.BatchGetRecordsResponse)
DELETE_RECORDS = Method(_SERVICE + "DeleteRecords", pb.DeleteRecordsResponse)
LIST_RECORDS = Method(_SERVICE + "ListRecords", pb.ListRecordsResponse)
COUNT_RECORDS = Method(_SERVICE + "CountRecords", pb.CountRecordsResponse)

#: Maximum number of ids in one request of `get` or `delete`. The API accepts 10,000, but smaller requests take less of
#: the timeout.
_IDS = 1000


class _Writes:
    """Adds up the numbers of inserted and updated records of the requests of one upsert."""

    def __init__(self) -> None:
        self._total = UpsertResult(0, 0, 0)

    def add(self, part: UpsertResult) -> None:
        """Add the numbers of the next request's result, and keep its sequence number in place of the one before."""
        total = self._total
        self._total = UpsertResult(total.inserted + part.inserted, total.updated + part.updated, part.sequence)

    def result(self) -> UpsertResult:
        """Return the sums, and the sequence number of the last request; all are 0 if there was no request."""
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
    details: Details | None,
) -> JoinedCalls[UpsertResult, UpsertResult]:
    """Return the calls of `Client.upsert`. A wrong argument raises InputError or InputTypeError.

    This function validates all arguments but `records` and `truncation`. These two are validated when the calls are
    read, and reading then raises the error. With `matrix` or `expected_revisions`, this function reads all
    records; with `expected_revisions` it also validates each record.
    """
    checks.function(details, "details")
    collection = checks.text(collection, "collection")
    items = new_records(records, matrix)
    vector = "records[{}].vector" if matrix is None else "vectors[{}]"
    expected: list[int] = []
    if expected_revisions is not None:
        items = list(items)
        expected = _revisions(expected_revisions, len(items))
    parts = chunks(items, checks.count(batch_size, "batch_size", 1), lambda record: record.size)

    def call(first: int, part: list[NewRecord]) -> Call[pb.UpsertRecordsResponse, UpsertResult]:
        def decode(response: pb.UpsertRecordsResponse) -> UpsertResult:
            report(details, response, first, len(part))
            return UpsertResult(response.inserted_count, response.updated_count, response.receipt.sequence)

        request = pb.UpsertRecordsRequest(
            collection=collection,
            records=[record.message for record in part],
            vectors=block(part, first),
            truncation=truncation_of(truncation),
            expected_revisions=expected[first : first + len(part)],
        )
        return Call(UPSERT_RECORDS, request, decode, "records", first, len(part), vector=vector)

    partly_done = "the first {} records of this call are written already"
    if expected:
        partly_done += ", with new revisions: repeat it without them"
    calls = (call(*part) for part in parts)
    return JoinedCalls(calls, _Writes(), progress=progress, ordered=True, partly_done=partly_done)


def _revisions(values: Iterable[int], records: int) -> list[int]:
    """Validate the expected revisions of a write and return them as a list.

    `records` is the number of records to write. A wrong type raises InputTypeError. A number of revisions other than
    `records`, or a revision below 0 or not below 2**63, raises InputError.
    """
    if isinstance(values, checks.SINGLE) or not isinstance(values, Iterable):
        raise InputTypeError(f"expected_revisions is of type {type(values).__name__}; it must be a list of int")
    checked = [checks.count(value, f"expected_revisions[{i}]", bits=63) for i, value in enumerate(values)]
    if len(checked) != records:
        raise InputError(f"expected_revisions has {len(checked)} items for {records} records; give one for each")
    return checked


def get(
    collection: str, ids: Iterable[str], *, with_vectors: bool, details: Details | None
) -> JoinedCalls[list[Record], list[Record]]:
    """Return the calls of `Client.get`. A wrong argument raises InputError or InputTypeError.

    For a wrong `with_vectors`, the error is raised when the calls are read.
    """
    checks.function(details, "details")
    collection = checks.text(collection, "collection")

    def call(first: int, part: list[str]) -> Call[pb.BatchGetRecordsResponse, list[Record]]:
        def decode(response: pb.BatchGetRecordsResponse) -> list[Record]:
            found = read_records(response.records, response.vectors)
            report(details, response, first, len(part))
            return found

        request = pb.BatchGetRecordsRequest(collection=collection, ids=part, parts=parts_of(with_vectors))
        return Call(
            BATCH_GET_RECORDS,
            request,
            decode,
            "ids",
            first,
            len(part),
            divisible(call, first, part),
        )

    return JoinedCalls((call(*part) for part in _id_chunks(ids)), ListCollector[Record]())


class _Sum:
    """Adds up the numbers that several calls return."""

    def __init__(self) -> None:
        self._sum = 0

    def add(self, part: int) -> None:
        """Add the number that the next call returned."""
        self._sum += part

    def result(self) -> int:
        """Return the sum."""
        return self._sum


def delete(
    collection: str, ids: Iterable[str] | None, where: Where | None, details: Details | None
) -> JoinedCalls[int, int]:
    """Return the calls of `Client.delete`. A wrong argument raises InputError or InputTypeError.

    With `where` there is one call. Otherwise each call has at most 1000 ids and 8 MiB of ids, a character counted as
    4 bytes. Exactly one of `ids` and `where` must be given, or else InputError.
    """
    checks.function(details, "details")

    def decode(response: pb.DeleteRecordsResponse, first: int = 0, count: int = 1) -> int:
        warn(response.warnings)
        report(details, response, first, count)
        return response.deleted_count

    collection = checks.text(collection, "collection")
    if (ids is None) == (where is None):
        raise InputError("give ids or where, one of the two")
    if ids is None:
        everywhere = pb.DeleteRecordsRequest(collection=collection, filter=filter_of(where))
        return JoinedCalls(iter([Call(DELETE_RECORDS, everywhere, decode)]), _Sum())

    def call(first: int, part: list[str]) -> Call[pb.DeleteRecordsResponse, int]:
        def decode_part(response: pb.DeleteRecordsResponse) -> int:
            return decode(response, first, len(part))

        request = pb.DeleteRecordsRequest(collection=collection, ids=part)
        return Call(DELETE_RECORDS, request, decode_part, "ids", first, len(part))

    partly_done = "the first {} ids of this call are deleted already"
    return JoinedCalls((call(*part) for part in _id_chunks(ids)), _Sum(), ordered=True, partly_done=partly_done)


def list_records(
    collection: str, page_token: str, *, where: Where | None, with_vectors: bool, page_size: int
) -> Call[pb.ListRecordsResponse, Page[Record]]:
    """Return the call for one page of `Client.records`; the token of the first page is empty.

    A wrong argument raises InputError or InputTypeError.
    """
    request = pb.ListRecordsRequest(
        collection=checks.text(collection, "collection"),
        page_size=checks.count(page_size, "page_size"),
        page_token=page_token,
        filter=filter_of(where),
        parts=parts_of(with_vectors),
    )
    return Call(
        LIST_RECORDS,
        request,
        _read_page,
    )


def count(collection: str, where: Where | None) -> Call[pb.CountRecordsResponse, int]:
    """Return the call of `Client.count`. A wrong argument raises InputError or InputTypeError."""
    request = pb.CountRecordsRequest(collection=checks.text(collection, "collection"), filter=filter_of(where))
    return Call(COUNT_RECORDS, request, _read_count)


def truncation_of(truncation: Truncation | None) -> types_pb2.Truncation.ValueType:
    """Return the enum value of a truncation; None: UNSPECIFIED, for which the server uses the collection's setting.

    A wrong value raises InputError or InputTypeError.
    """
    return types_pb2.TRUNCATION_UNSPECIFIED if truncation is None else value_of("truncation", truncation, TRUNCATIONS)


def _read_page(response: pb.ListRecordsResponse) -> Page[Record]:
    warn(response.warnings)
    return Page(read_records(response.records, response.vectors), response.next_page_token)


def _read_count(response: pb.CountRecordsResponse) -> int:
    warn(response.warnings)
    return response.count


def _id_chunks(ids: Iterable[str]) -> Iterable[tuple[int, list[str]]]:
    return chunks(checks.texts(ids, "ids"), _IDS, lambda record_id: 4 * len(record_id))
