"""Build the responses of BatchGetRecords, ListRecords, CountRecords, ClusterRecords and VerifyCollection.

Responses with records are returned as serialized bytes, see `record_bytes`.

`batch_get`, `page` and `count` also read from the collection. They block, so callers run them in the pool.
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
    """Read records by id, and return a serialized BatchGetRecordsResponse. Blocks.

    Args:
        collection: the collection.
        ids: ids of the records. The records are in this order; a repeated id repeats its record. Ids without a record
            are listed in `missing_ids` of the response.
        parts: the parts of the records to return.
        limits: has the limit of the response's bytes.

    Raises:
        ServiceError: RESOURCE_EXHAUSTED if the records, or one vector for each id (if `parts` names vectors), have more
            bytes than a response may have; as `CollectionBackend.get` does.
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
    """Read a page of the records, sorted by id, and return a serialized ListRecordsResponse. Blocks.

    Args:
        collection: the collection.
        size: maximum number of records of the page. A page may end earlier, so that its bytes stay within the limit of
            a response.
        token: token of the page; empty: the first page.
        condition: the filter; None: all records. If the first page has no record, the response has a warning for each
            probable reason that was found.
        parts: the parts of the records to return.
        limits: has the limit of the response's bytes.

    Raises:
        ServiceError: RESOURCE_EXHAUSTED if the records, or `size` vectors (if `parts` names vectors), have more bytes
            than a response may have; as `CollectionBackend.page` and `CollectionBackend.mismatches` do.
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
    """Count the records that match the filter `condition`; None: all records. Blocks.

    If there is a filter and no record matches, the response has a warning for each probable reason that was found.
    Errors are those of `CollectionBackend.count` and `CollectionBackend.mismatches`.
    """
    found = collection.count(condition)
    return pb.CountRecordsResponse(count=found, warnings=filter_warnings(collection, condition, found))


def clusters(found: Sequence[Cluster], limits: Limits) -> bytes:
    """Return a serialized ClusterRecordsResponse with the clusters `found`; examples have text and metadata.

    Raises:
        ServiceError: RESOURCE_EXHAUSTED if the clusters have more bytes than a response may have.
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
    """Return the response for one step of a verification: the progress, and the problems that this step found."""
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
    """Serialize the response of BatchGetRecords or ListRecords.

    Args:
        records: the records of the response. A repeated record counts each time for the limit.
        parts: the parts of the records to return.
        limits: has the limit of the response's bytes.
        rest: the response without records. If `parts` names vectors, this function adds them to `rest`.

    Raises:
        ServiceError: RESOURCE_EXHAUSTED if records, vectors and `rest` together have more bytes than a response may
            have; a few bytes for each record are not counted.
    """
    pieces: list[bytes] = []
    vectors = record_vectors(records, parts)
    if vectors is not None:
        rest.vectors.CopyFrom(vectors)
    serialized_rest = rest.SerializeToString()
    size = len(serialized_rest)
    limits.check_response(size, _REMEDY)
    for record in records:
        serialized = record_bytes(record, parts)
        pieces += (FIRST, varint(len(serialized)), serialized)
        size += len(serialized)
        limits.check_response(size, _REMEDY)
    pieces.append(serialized_rest)
    return b"".join(pieces)
