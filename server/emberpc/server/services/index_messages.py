"""Convert collections, records, vectors and times between the messages of index.proto and the types of the server."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

import numpy as np
import numpy.typing as npt
from google.protobuf import json_format
from google.protobuf.struct_pb2 import Struct
from google.protobuf.timestamp_pb2 import Timestamp

from emberpc.server import cancellation
from emberpc.server.collections import (
    MAX_METADATA_BYTES,
    CollectionSpec,
    Distance,
    NewRecord,
    RecordParts,
    StoredRecord,
)
from emberpc.server.errors import ServiceError, Violation, invalid, invalid_fields
from emberpc.server.pipelines.collection_management import CollectionDescription
from emberpc.server.pipelines.limits import MAX_PARTS, Limits
from emberpc.server.pipelines.upsert_stream import FailedRecord
from emberpc.server.services import requests
from emberpc.v1 import index_pb2 as pb
from emberpc.v1 import types_pb2
from emberpc.wire import vectors

#: Limit of the bytes of metadata as a protobuf message. Larger metadata is refused before it is converted, since it
#: exceeds the limit as JSON too: the message has at most four times as many bytes as the JSON.
_MAX_METADATA_MESSAGE = 4 * MAX_METADATA_BYTES
#: Limit of a record's time to live, in seconds: 100 years.
_MAX_TIME_TO_LIVE = 100 * 365 * 24 * 3600

Matrix = npt.NDArray[np.float32]

_DISTANCES: dict[pb.Distance.ValueType, Distance] = {
    pb.DISTANCE_COSINE: Distance.COSINE,
    pb.DISTANCE_DOT_PRODUCT: Distance.DOT_PRODUCT,
    pb.DISTANCE_EUCLIDEAN: Distance.EUCLIDEAN,
}
_DISTANCE_VALUES = {distance: value for value, distance in _DISTANCES.items()}
_CALLER_DTYPES = (types_pb2.DATA_TYPE_UNSPECIFIED, types_pb2.DATA_TYPE_FLOAT32, types_pb2.DATA_TYPE_FLOAT16)


class RequestedParts:
    """The parts of records that a request names; text and metadata if it names none.

    Attributes:
        text: whether records have their text.
        metadata: whether records have their metadata.
        vector: whether the response has the records' vectors.
        record_parts: `text` and `metadata`; also the key of `StoredRecord.serialized`.
    """

    def __init__(self, parts: Sequence[pb.RecordPart.ValueType]) -> None:
        """Read the field `parts` of a request.

        Raises:
            ServiceError: INVALID_ARGUMENT for a part that this server does not know, or more than 100 parts.
        """
        if len(parts) > MAX_PARTS:
            raise invalid("parts", f"has {len(parts)} items, it may have {MAX_PARTS}; name each part once")
        for i, part in enumerate(parts):
            if part not in (pb.RECORD_PART_TEXT, pb.RECORD_PART_METADATA, pb.RECORD_PART_VECTOR):
                raise invalid(f"parts[{i}]", f"is {part}; use TEXT, METADATA or VECTOR")
        self.text = not parts or pb.RECORD_PART_TEXT in parts
        self.metadata = not parts or pb.RECORD_PART_METADATA in parts
        self.vector = pb.RECORD_PART_VECTOR in parts
        #: The parts that are fields of the message `Record`, which has no vector. The serialized forms of a record are
        #: kept by these parts.
        self.record_parts = RecordParts(self.text, self.metadata)

    @classmethod
    def of(cls, parts: Sequence[pb.RecordPart.ValueType]) -> RequestedParts:
        """Return the parts as the constructor does, with its errors; all requests without parts share one object."""
        return cls(parts) if parts else _DEFAULT_PARTS


_DEFAULT_PARTS = RequestedParts(())


def read_collection(message: pb.Collection) -> CollectionSpec:
    """Return the spec of a new collection from its message.

    Defaults are filled in, with two exceptions: dimensions of 0 stay 0, and the fingerprint of the model stays empty.
    Other values than distance and truncation are not checked.

    Raises:
        ServiceError: INVALID_ARGUMENT for a distance or a truncation that this server does not know.
    """
    distance = message.distance or pb.DISTANCE_COSINE
    if distance not in _DISTANCES:
        raise invalid("collection.distance", f"is {distance}; use COSINE, DOT_PRODUCT or EUCLIDEAN")
    return CollectionSpec(
        name=message.name,
        model=message.model,
        dimensions=message.dimensions,
        distance=_DISTANCES[distance],
        truncation=requests.truncation(message.truncation, "collection.truncation").value,
        m=message.hnsw.m or CollectionSpec.m,
        ef_construction=message.hnsw.ef_construction or CollectionSpec.ef_construction,
        indexed_fields=tuple(message.indexed_fields),
    )


def collection_message(description: CollectionDescription) -> pb.Collection:
    """Return the message that describes a collection.

    If `description.info` is None, as for a damaged collection, record count, sequence, size and create time stay unset.
    """
    spec, info, reembedding = description.spec, description.info, description.reembedding
    message = pb.Collection(
        name=spec.name,
        model=spec.model,
        model_fingerprint=spec.model_fingerprint,
        dimensions=spec.dimensions,
        distance=_DISTANCE_VALUES[spec.distance],
        truncation=types_pb2.Truncation.Value(f"TRUNCATION_{spec.truncation.upper()}"),
        hnsw=pb.HnswParameters(m=spec.m, ef_construction=spec.ef_construction),
        indexed_fields=spec.indexed_fields,
        problem=description.problem,
    )
    if info is not None:
        message.record_count, message.sequence, message.size_bytes = info.record_count, info.sequence, info.size_bytes
        set_timestamp(message.create_time, info.create_time)
    if reembedding is not None:
        message.reembedding.CopyFrom(
            pb.Reembedding(
                model=reembedding.model,
                done=reembedding.done,
                total=reembedding.total,
                problem=reembedding.problem,
            )
        )
        message.reembedding.start_time.FromDatetime(reembedding.started)
    return message


def record_vectors(records: Sequence[StoredRecord], parts: RequestedParts) -> types_pb2.Vectors | None:
    """Return the vectors of records as one float32 block, in the order of the records.

    None if `parts.vector` is False or there are no records. Otherwise each record must have its vector.
    """
    if not parts.vector or not records:
        return None
    return vectors.encode(np.stack([record.vector for record in records if record.vector is not None]))


def new_records(messages: Sequence[pb.Record]) -> list[NewRecord]:
    """Convert the records of a request. This may take seconds, so run it in the pool.

    Ids, texts and labels are not checked here, nor the size of metadata as JSON.

    Raises:
        ServiceError: INVALID_ARGUMENT, naming the first wrong record, if its metadata has more than 256 KiB as a
            message or cannot be JSON, or its time to live is out of range; DEADLINE_EXCEEDED if the call that this
            thread runs is cancelled.
    """
    records = []
    for i, message in enumerate(messages):
        cancellation.check()
        records.append(
            NewRecord(
                id=message.id,
                text=message.text,
                metadata=_metadata(message.metadata, f"records[{i}].metadata"),
                label=message.label,
                time_to_live=_time_to_live(message, f"records[{i}].time_to_live"),
            )
        )
    return records


def read_each_record(messages: Sequence[pb.Record], limits: Limits) -> Iterator[NewRecord | FailedRecord]:
    """Yield each record of a stream's message in order; for an invalid record, yield its id and its error instead.

    Checked are the length of the text (it may be empty), and what `new_records` checks. The field paths of an error
    start at the record, such as `metadata`. This may take seconds, so run it in the pool. A record that is read after
    the call was cancelled has the error DEADLINE_EXCEEDED.
    """
    for message in messages:
        try:
            limits.check_texts([message.text], lambda _: "text", allow_empty=True)
            yield from new_records([message])
        except ServiceError as error:
            yield FailedRecord(message.id, _relative_to_record(error))


def _relative_to_record(error: ServiceError) -> ServiceError:
    """Return an error about `records[0]` as an error whose field paths start at the record; other errors unchanged."""
    if not error.violations:
        return error
    return invalid_fields(
        [
            Violation(violation.field.removeprefix("records[0]."), violation.description)
            for violation in error.violations
        ]
    )


def caller_vectors(block: types_pb2.Vectors, rows: int, field: str) -> Matrix:
    """Decode vectors that a caller sent.

    Args:
        block: the vectors, FLOAT32 (also if no element type is set) or FLOAT16.
        rows: the number of vectors that the block must have.
        field: path of the block in the request, for errors.

    Returns:
        float32, shape (rows, dimensions). The number of dimensions, and whether all values are finite, are not checked
        here. The array may be read-only.

    Raises:
        ServiceError: INVALID_ARGUMENT if the block has another element type or number of rows, its number of bytes is
            wrong, or its dimensions are negative.
    """
    if block.dtype not in _CALLER_DTYPES:
        raise invalid(f"{field}.dtype", f"is {block.dtype}; send FLOAT32 or FLOAT16")
    if block.rows != rows:
        raise invalid(f"{field}.rows", f"is {block.rows}; it must be {rows}, one vector for each item")
    try:
        return vectors.decode(block)
    except vectors.VectorFormatError as error:
        raise invalid(f"{field}.{error.field}", f"is wrong: {error}") from error


def _metadata(struct: Struct, field: str) -> dict[str, Any]:
    if (size := struct.ByteSize()) > _MAX_METADATA_MESSAGE:
        raise invalid(
            field, f"has {size} bytes, which are more than {MAX_METADATA_BYTES} bytes as JSON; shorten the metadata"
        )
    try:
        metadata: dict[str, Any] = json_format.MessageToDict(struct)
    except (json_format.SerializeToJsonError, ValueError, RecursionError) as error:
        raise invalid(field, "holds a number that JSON cannot hold, or is nested too deeply") from error
    return metadata


def _time_to_live(message: pb.Record, field: str) -> float | None:
    if not message.HasField("time_to_live"):
        return None
    seconds = message.time_to_live.seconds + message.time_to_live.nanos / 1e9
    if not 0 < seconds <= _MAX_TIME_TO_LIVE:
        raise invalid(field, f"is {seconds:g} s; it must be above 0 and at most {_MAX_TIME_TO_LIVE} s (100 years)")
    return seconds


def set_timestamp(timestamp: Timestamp, time: datetime) -> None:
    """Set a timestamp message to a time with a time zone, 1970 or later.

    Takes a fifth of the time of `Timestamp.FromDatetime`.
    """
    seconds = time.timestamp()
    timestamp.seconds = int(seconds)
    timestamp.nanos = time.microsecond * 1000
