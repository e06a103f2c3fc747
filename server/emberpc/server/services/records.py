"""Collections and records: between the messages of index.proto and the index's own types."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

import numpy as np
import numpy.typing as npt
from google.protobuf import json_format
from google.protobuf.struct_pb2 import Struct
from google.protobuf.timestamp_pb2 import Timestamp

from emberpc.server import cancellation
from emberpc.server.collections import (
    MAX_METADATA_BYTES,
    CollectionBackend,
    CollectionSpec,
    Distance,
    NewRecord,
    RecordParts,
    StoredRecord,
)
from emberpc.server.errors import invalid
from emberpc.server.services.requests import MAX_PARTS
from emberpc.v1 import index_pb2 as pb
from emberpc.v1 import types_pb2
from emberpc.wire import vectors

#: Bytes of metadata as a message, which takes at most four times as many as JSON: a number has 11 and 3 bytes.
_MAX_METADATA_MESSAGE = 4 * MAX_METADATA_BYTES
#: Seconds; a hundred years.
_MAX_TIME_TO_LIVE = 100 * 365 * 24 * 3600

Matrix = npt.NDArray[np.float32]

DISTANCES: dict[pb.Distance.ValueType, Distance] = {
    pb.DISTANCE_COSINE: Distance.COSINE,
    pb.DISTANCE_DOT_PRODUCT: Distance.DOT_PRODUCT,
    pb.DISTANCE_EUCLIDEAN: Distance.EUCLIDEAN,
}
_DISTANCE_VALUES = {distance: value for value, distance in DISTANCES.items()}
_CALLER_DTYPES = (types_pb2.DATA_TYPE_UNSPECIFIED, types_pb2.DATA_TYPE_FLOAT32, types_pb2.DATA_TYPE_FLOAT16)


class Parts:
    """Which parts of a record an answer has; with none asked for, text and metadata."""

    def __init__(self, parts: Sequence[pb.RecordPart.ValueType]) -> None:
        """Read them from a request.

        Raises:
            ServiceError: INVALID_ARGUMENT for a part that this server does not know.
        """
        if len(parts) > MAX_PARTS:
            raise invalid("parts", f"has {len(parts)} items, it may have {MAX_PARTS}; name each part once")
        for i, part in enumerate(parts):
            if part not in (pb.RECORD_PART_TEXT, pb.RECORD_PART_METADATA, pb.RECORD_PART_VECTOR):
                raise invalid(f"parts[{i}]", f"is {part}; use TEXT, METADATA or VECTOR")
        self.text = not parts or pb.RECORD_PART_TEXT in parts
        self.metadata = not parts or pb.RECORD_PART_METADATA in parts
        self.vector = pb.RECORD_PART_VECTOR in parts
        #: What tells the messages of one record apart; a vector comes beside it.
        self.of_record = RecordParts(self.text, self.metadata)

    @classmethod
    def of(cls, parts: Sequence[pb.RecordPart.ValueType]) -> Parts:
        """Read them as the constructor does; what most requests ask for is not made anew."""
        return cls(parts) if parts else _DEFAULT_PARTS


_DEFAULT_PARTS = Parts(())


def collection_message(collection: CollectionBackend) -> pb.Collection:
    """Describe a collection."""
    info = collection.info()
    message = spec_message(collection.spec)
    message.record_count, message.sequence, message.size_bytes = info.record_count, info.sequence, info.size_bytes
    _set_moment(message.create_time, info.create_time)
    return message


def spec_message(spec: CollectionSpec, problem: str = "") -> pb.Collection:
    """Describe what a collection is, and why it cannot be used, without opening it."""
    return pb.Collection(
        name=spec.name,
        model=spec.model,
        model_fingerprint=spec.model_fingerprint,
        dimensions=spec.dimensions,
        distance=_DISTANCE_VALUES[spec.distance],
        truncation=types_pb2.Truncation.Value(f"TRUNCATION_{spec.truncation.upper()}"),
        hnsw=pb.HnswParameters(m=spec.m, ef_construction=spec.ef_construction),
        indexed_fields=spec.indexed_fields,
        problem=problem,
    )


def record_message(record: StoredRecord, parts: Parts) -> pb.Record:
    """Describe a record by the parts asked for."""
    message = pb.Record()
    fill_record(message, record, parts)
    return message


def fill_record(message: pb.Record, record: StoredRecord, parts: Parts) -> None:
    """Describe a record in a message that is empty: in an answer of a thousand hits, half as dear as a message each."""
    message.id = record.id
    message.label = record.label
    message.revision = record.revision
    _set_moment(message.create_time, record.create_time)
    _set_moment(message.update_time, record.update_time)
    if record.expire_time is not None:
        left = (record.expire_time - datetime.now(timezone.utc)).total_seconds()
        message.time_to_live.FromMilliseconds(max(round(left * 1000), 1))
    if parts.text:
        message.text = record.text
    if parts.metadata and record.metadata:
        message.metadata.update(record.metadata)


def record_vectors(records: Sequence[StoredRecord], parts: Parts) -> types_pb2.Vectors | None:
    """Return the records' vectors as one block, if they are asked for."""
    if not parts.vector or not records:
        return None
    return vectors.encode(np.stack([record.vector for record in records if record.vector is not None]))


def new_records(messages: Sequence[pb.Record]) -> list[NewRecord]:
    """Read records from a request.

    Raises:
        ServiceError: INVALID_ARGUMENT naming a record whose metadata cannot be JSON, or whose time to live is none;
            DEADLINE_EXCEEDED if the call is cancelled.
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


def caller_vectors(block: types_pb2.Vectors, rows: int, field: str) -> Matrix:
    """Read vectors that a caller gave.

    Args:
        block: the vectors, FLOAT32 or FLOAT16.
        rows: how many there must be.
        field: what the request calls them.

    Returns:
        float32, shape (rows, dimensions); whether the dimensions are right and the values finite is for the index to
        check.

    Raises:
        ServiceError: INVALID_ARGUMENT if the block contradicts itself or has another number of rows.
    """
    if block.dtype not in _CALLER_DTYPES:
        raise invalid(f"{field}.dtype", f"is {block.dtype}; send FLOAT32 or FLOAT16")
    if block.rows != rows:
        raise invalid(f"{field}.rows", f"is {block.rows}; it must be {rows}, one vector for each item")
    try:
        return vectors.decode(block)
    except vectors.VectorFormatError as error:
        raise invalid(f"{field}.{error.field}", str(error)) from error


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


def _set_moment(timestamp: Timestamp, moment: datetime) -> None:
    # Timestamp.FromDatetime takes five times as long.
    seconds = moment.timestamp()
    timestamp.seconds = int(seconds)
    timestamp.nanos = moment.microsecond * 1000
