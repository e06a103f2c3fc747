"""What calls read of a collection, within the limit of a response. To be run in the pool."""

from __future__ import annotations

from collections.abc import Sequence

from emberpc.server.collections import CollectionBackend, StoredRecord
from emberpc.server.collections.filters import Filter
from emberpc.server.services import requests
from emberpc.server.services.records import Parts, fill_record, record_vectors
from emberpc.v1 import index_pb2 as pb

_REMEDY = "ask for fewer records"


def batch_get(
    collection: CollectionBackend, ids: Sequence[str], parts: Parts, limits: requests.Limits
) -> pb.BatchGetRecordsResponse:
    """Return the records of ids.

    Raises:
        ServiceError: RESOURCE_EXHAUSTED if the response would be too large.
    """
    _check_vectors(collection, len(ids), parts, limits)
    records = collection.get(ids, with_vectors=parts.vector, parts=parts.of_record)
    found = {record.id for record in records}
    response = pb.BatchGetRecordsResponse(missing_ids=[record_id for record_id in ids if record_id not in found])
    _add_records(response, records, parts, limits)
    return response


def page(
    collection: CollectionBackend,
    size: int,
    token: str,
    condition: Filter | None,
    parts: Parts,
    limits: requests.Limits,
) -> pb.ListRecordsResponse:
    """Return a page of records, fewer than `size` if their texts are long.

    Raises:
        ServiceError: RESOURCE_EXHAUSTED if the response would be too large.
    """
    _check_vectors(collection, size, parts, limits)
    records, next_token = collection.page(
        size, token, with_vectors=parts.vector, condition=condition, parts=parts.of_record
    )
    response = pb.ListRecordsResponse(next_page_token=next_token)
    _add_records(response, records, parts, limits)
    if not token:
        response.warnings.extend(warnings(collection, condition, len(records)))
    return response


def warnings(collection: CollectionBackend, condition: Filter | None, found: int) -> list[str]:
    """Return sentences that say why a filter which matches no record probably does not.

    Args:
        collection: the collection.
        condition: the filter; None: there is none.
        found: records that meet it.
    """
    return [] if condition is None or found else collection.mismatches(condition)


def _check_vectors(collection: CollectionBackend, count: int, parts: Parts, limits: requests.Limits) -> None:
    if parts.vector:
        limits.check_response(4 * count * collection.spec.dimensions, _REMEDY)


def _add_records(
    response: pb.BatchGetRecordsResponse | pb.ListRecordsResponse,
    records: Sequence[StoredRecord],
    parts: Parts,
    limits: requests.Limits,
) -> None:
    """Add records to a response; a record that is asked for several times counts each time."""
    size = 0
    for record in records:
        message = response.records.add()
        fill_record(message, record, parts)
        size += message.ByteSize()
        limits.check_response(size, _REMEDY)
    vectors = record_vectors(records, parts)
    if vectors is not None:
        response.vectors.CopyFrom(vectors)
