"""Write the responses of IndexService that have records, within the limit of a response.

`batch_get`, `page` and `count` read the records too: they block, so they run in the pool.
"""

from __future__ import annotations

from collections.abc import Sequence

from emberpc.server.collections import Cluster, CollectionBackend, StoredRecord, Verified
from emberpc.server.collections.filters import Filter
from emberpc.server.errors import Code
from emberpc.server.pipelines.limits import Limits
from emberpc.server.pipelines.records import filter_warnings
from emberpc.server.services.index_messages import RequestedParts, fill_record, record_vectors
from emberpc.v1 import errors_pb2
from emberpc.v1 import index_pb2 as pb
from emberpc.wire import status

_REMEDY = "ask for fewer records"


def batch_get(
    collection: CollectionBackend, ids: Sequence[str], parts: RequestedParts, limits: Limits
) -> pb.BatchGetRecordsResponse:
    """Return the records with some ids.

    Raises:
        ServiceError: RESOURCE_EXHAUSTED if the response would be too large.
    """
    _check_vectors(collection, len(ids), parts, limits)
    records = collection.get(ids, with_vectors=parts.vector, parts=parts.record_parts)
    found = {record.id for record in records}
    response = pb.BatchGetRecordsResponse(missing_ids=[record_id for record_id in ids if record_id not in found])
    _add_records(response, records, parts, limits)
    return response


def page(
    collection: CollectionBackend,
    size: int,
    token: str,
    condition: Filter | None,
    parts: RequestedParts,
    limits: Limits,
) -> pb.ListRecordsResponse:
    """Return a page of records; fewer than `size` if their texts are long.

    Raises:
        ServiceError: RESOURCE_EXHAUSTED if the response would be too large.
    """
    _check_vectors(collection, size, parts, limits)
    records, next_token = collection.page(
        size, token, with_vectors=parts.vector, condition=condition, parts=parts.record_parts
    )
    response = pb.ListRecordsResponse(next_page_token=next_token)
    _add_records(response, records, parts, limits)
    if not token:
        response.warnings.extend(filter_warnings(collection, condition, len(records)))
    return response


def count(collection: CollectionBackend, condition: Filter | None) -> pb.CountRecordsResponse:
    """Return the number of records that match a filter; None: of all records."""
    found = collection.count(condition)
    return pb.CountRecordsResponse(count=found, warnings=filter_warnings(collection, condition, found))


def clusters(found: Sequence[Cluster], limits: Limits) -> pb.ClusterRecordsResponse:
    """Return clusters with their examples.

    Raises:
        ServiceError: RESOURCE_EXHAUSTED if the response would be too large.
    """
    response = pb.ClusterRecordsResponse()
    parts, size = RequestedParts(()), 0
    for cluster in found:
        message = response.clusters.add(record_count=cluster.record_count)
        for record in cluster.examples:
            fill_record(message.examples.add(), record, parts)
        size += message.ByteSize()
        limits.check_response(size, "ask for fewer examples")
    return response


def verification(step: Verified) -> pb.VerifyCollectionResponse:
    """Return the progress of a verification and the problems that its last step found."""
    failures = [
        pb.RecordFailure(
            id=problem.id,
            error=status.make(
                Code.INTERNAL.value, problem.message, [errors_pb2.ErrorInfo(reason=problem.reason, domain="emberpc")]
            ),
        )
        for problem in step.problems
    ]
    return pb.VerifyCollectionResponse(
        checked_count=step.checked, total_count=step.total, failures=failures, done=step.done
    )


def _check_vectors(collection: CollectionBackend, record_count: int, parts: RequestedParts, limits: Limits) -> None:
    if parts.vector:
        limits.check_response(4 * record_count * collection.spec.dimensions, _REMEDY)


def _add_records(
    response: pb.BatchGetRecordsResponse | pb.ListRecordsResponse,
    records: Sequence[StoredRecord],
    parts: RequestedParts,
    limits: Limits,
) -> None:
    """Add records to a response. A record that was requested several times counts each time."""
    size = 0
    for record in records:
        message = response.records.add()
        fill_record(message, record, parts)
        size += message.ByteSize()
        limits.check_response(size, _REMEDY)
    vectors = record_vectors(records, parts)
    if vectors is not None:
        response.vectors.CopyFrom(vectors)
