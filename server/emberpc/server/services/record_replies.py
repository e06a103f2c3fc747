"""Write the responses of IndexService that have records, within the limit of a response.

Responses with records are serialized bytes, see `record_bytes`.

`batch_get`, `page` and `count` read the records too: they block, so they run in the pool.
"""

from __future__ import annotations

from collections.abc import Sequence

from emberpc.server.collections import Cluster, CollectionBackend, StoredRecord, Verified
from emberpc.server.collections.filters import Filter
from emberpc.server.errors import Code
from emberpc.server.pipelines.limits import Limits
from emberpc.server.pipelines.records import filter_warnings
from emberpc.server.services.index_messages import RequestedParts, record_vectors
from emberpc.server.services.record_bytes import FIRST, SECOND, length_delimited, record_bytes, varint
from emberpc.v1 import errors_pb2
from emberpc.v1 import index_pb2 as pb
from emberpc.wire import status

_REMEDY = "ask for fewer records"


def batch_get(collection: CollectionBackend, ids: Sequence[str], parts: RequestedParts, limits: Limits) -> bytes:
    """Return a serialized BatchGetRecordsResponse: the records with some ids.

    Raises:
        ServiceError: RESOURCE_EXHAUSTED if the response would be too large.
    """
    _check_vectors(collection, len(ids), parts, limits)
    records = collection.get(ids, with_vectors=parts.vector, parts=parts.record_parts)
    found = {record.id for record in records}
    rest = pb.BatchGetRecordsResponse(missing_ids=[record_id for record_id in ids if record_id not in found])
    return _with_records(records, parts, limits, rest)


def page(
    collection: CollectionBackend,
    size: int,
    token: str,
    condition: Filter | None,
    parts: RequestedParts,
    limits: Limits,
) -> bytes:
    """Return a serialized ListRecordsResponse: a page of records; fewer than `size` if their texts are long.

    Raises:
        ServiceError: RESOURCE_EXHAUSTED if the response would be too large.
    """
    _check_vectors(collection, size, parts, limits)
    records, next_token = collection.page(
        size, token, with_vectors=parts.vector, condition=condition, parts=parts.record_parts
    )
    rest = pb.ListRecordsResponse(next_page_token=next_token)
    if not token:
        rest.warnings.extend(filter_warnings(collection, condition, len(records)))
    return _with_records(records, parts, limits, rest)


def count(collection: CollectionBackend, condition: Filter | None) -> pb.CountRecordsResponse:
    """Return the number of records that match a filter; None: of all records."""
    found = collection.count(condition)
    return pb.CountRecordsResponse(count=found, warnings=filter_warnings(collection, condition, found))


def clusters(found: Sequence[Cluster], limits: Limits) -> bytes:
    """Return a serialized ClusterRecordsResponse: clusters with their examples.

    Raises:
        ServiceError: RESOURCE_EXHAUSTED if the response would be too large.
    """
    parts, size = RequestedParts(()), 0
    pieces: list[bytes] = []
    for cluster in found:
        serialized = [pb.Cluster(record_count=cluster.record_count).SerializeToString()]
        serialized += [length_delimited(SECOND, record_bytes(record, parts)) for record in cluster.examples]
        pieces.append(length_delimited(FIRST, b"".join(serialized)))
        size += len(pieces[-1])
        limits.check_response(size, "ask for fewer examples")
    return b"".join(pieces)


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


def _with_records(
    records: Sequence[StoredRecord],
    parts: RequestedParts,
    limits: Limits,
    rest: pb.BatchGetRecordsResponse | pb.ListRecordsResponse,
) -> bytes:
    """Serialize a response of records and other fields. A record that was requested several times counts each time."""
    pieces: list[bytes] = []
    size = 0
    for record in records:
        serialized = record_bytes(record, parts)
        pieces += (FIRST, varint(len(serialized)), serialized)
        size += len(serialized)
        limits.check_response(size, _REMEDY)
    vectors = record_vectors(records, parts)
    if vectors is not None:
        rest.vectors.CopyFrom(vectors)
    pieces.append(rest.SerializeToString())
    return b"".join(pieces)
