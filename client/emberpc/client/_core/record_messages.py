"""Convert records of the client to messages of the API, and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from emberpc.client._core import checks
from emberpc.client._core.json_values import mapping, struct, to_datetime
from emberpc.client._core.rpc_call import check_count
from emberpc.client.exceptions import InputError, InputTypeError
from emberpc.client.types import Matrix, Record, Vector
from emberpc.v1 import index_pb2, types_pb2
from emberpc.wire import vectors

#: Longest time to live of a record, in seconds: a hundred years, the limit of the API.
_MAX_TIME_TO_LIVE = 100 * 365 * 24 * 3600
#: Keys that a dict of a record to write may have.
_KEYS = ("id", "text", "metadata", "label", "vector", "time_to_live")


@dataclass(frozen=True)
class NewRecord:
    """A validated record: the message to send, and the vector, which becomes a row of the request's field `vectors`.

    `vector` is float32, shape (dimensions,); None: the server embeds the text.
    """

    message: index_pb2.Record
    vector: Vector | None

    @property
    def size(self) -> int:
        """Bytes of the serialized message and of the vector as float32."""
        return self.message.ByteSize() + (0 if self.vector is None else self.vector.nbytes)


def new_records(
    records: Iterable[Record | Mapping[str, Any]], matrix: npt.ArrayLike | None = None
) -> Iterable[NewRecord]:
    """Return an iterator that validates each record when the record is read from it.

    Args:
        records: the records, or dicts with their fields. With `matrix`, this function reads all records, without
            validating them.
        matrix: shape (records, dimensions): vectors of the records; ignored if there are no records. None: vectors, if
            any, are in the records.

    Raises:
        InputTypeError: `records` is no iterable, or is a str, bytes, a mapping or one Record; an item of `matrix` is no
            vector, or an element is no real number. When a record is read: as `new_record` raises.
        InputError: `matrix` has another shape, or a vector is not finite. When a record is read: as `new_record`
            raises, for example if the record and `matrix` both have a vector.
    """
    if isinstance(records, (*checks.SINGLE, Record)) or not isinstance(records, Iterable):
        raise InputTypeError(f"records is of type {type(records).__name__}; it must be a list of Record or dict")
    if matrix is None:
        return (new_record(record, f"records[{i}]") for i, record in enumerate(records))
    listed = list(records)
    rows = checks.matrix(matrix, "vectors", len(listed)) if listed else np.empty((0, 0), dtype=np.float32)
    return (new_record(record, f"records[{i}]", rows[i]) for i, record in enumerate(listed))


def block(records: Sequence[NewRecord], first: int) -> types_pb2.Vectors | None:
    """Return the vectors of records as one message, a row for each record; None if no record has a vector.

    Args:
        records: the records of one request, at least one.
        first: index of the first record in the caller's list, for errors.

    Raises:
        InputError: only some records have a vector, or two vectors have different dimensions.
    """
    lead = records[0].vector
    for i, record in enumerate(records, first):
        if (record.vector is None) != (lead is None):
            raise InputError(
                f"records[{i}] has {'no' if record.vector is None else 'a'} vector and records[{first}] has "
                f"{'none' if lead is None else 'one'}; give all records vectors, or none"
            )
        if record.vector is not None and lead is not None and len(record.vector) != len(lead):
            raise InputError(
                f"records[{i}].vector has {len(record.vector)} dimensions and records[{first}].vector has "
                f"{len(lead)}; they must be alike"
            )
    if lead is None:
        return None
    return vectors.encode(np.stack([record.vector for record in records if record.vector is not None]))


def read_records(messages: Sequence[index_pb2.Record], vectors_of: types_pb2.Vectors) -> list[Record]:
    """Convert the records of a response to the client's type.

    Args:
        messages: the records.
        vectors_of: row i is the vector of record i. Without rows, `vector` of all records is None.

    Raises:
        Internal: the numbers of vectors and records differ.
        VectorFormatError: `vectors_of` is malformed; `Call.read` converts this error to Internal.
    """
    if not vectors_of.rows:
        return [read_record(message, None) for message in messages]
    check_count(vectors_of.rows, len(messages), "vectors")
    # The array that `decode` returns may be read-only. It is copied, so that the caller can change the vectors.
    matrix: Matrix = vectors.decode(vectors_of).copy()
    return [read_record(message, row) for message, row in zip(messages, matrix, strict=True)]


def read_record(message: index_pb2.Record, vector: Vector | None) -> Record:
    """Convert one record of a response, and its vector if there is one, to the client's type."""
    return Record(
        id=message.id,
        text=message.text,
        metadata=mapping(message.metadata),
        label=message.label,
        vector=vector,
        time_to_live=message.time_to_live.ToMilliseconds() / 1000 if message.HasField("time_to_live") else None,
        revision=message.revision,
        create_time=to_datetime(message.create_time) if message.HasField("create_time") else None,
        update_time=to_datetime(message.update_time) if message.HasField("update_time") else None,
    )


def new_record(record: Record | Mapping[str, Any], name: str, vector: Vector | None = None) -> NewRecord:
    """Validate one record, and return the message to send, with the vector.

    Args:
        record: the record, or a dict with its fields; `id` is required.
        name: name of the record in errors, such as `records[3]`.
        vector: vector of the record, already validated: float32, shape (dimensions,). None: the vector, if any, is in
            `record`.

    Raises:
        InputTypeError: the record or one of its fields has the wrong type.
        InputError: a field is unknown or cannot be sent, `id` is missing, the time to live is out of range, the caller
            set a field that only the server sets, or `record` and `vector` both have a vector. The server checks
            lengths, and whether `id` is empty.
    """
    if isinstance(record, Mapping):
        for key in record:
            if key not in _KEYS:
                raise InputError(f"{name} has a field {key!r}; a record has {', '.join(_KEYS)}")
        if "id" not in record:
            raise InputError(f"{name} has no id; give each record one")
        record = Record(**record)
    if not isinstance(record, Record):
        raise InputTypeError(f"{name} is of type {type(record).__name__}; it must be a Record or a dict")
    _refuse_hand_made_output(record, name)
    if record.vector is not None and vector is not None:
        raise InputError(f"{name} has a vector, and so has `vectors`; give it once")
    if record.vector is not None:
        vector = checks.vector(record.vector, f"{name}.vector")
    message = index_pb2.Record(
        id=checks.text(record.id, f"{name}.id"),
        text=checks.text(record.text, f"{name}.text"),
        label=checks.text(record.label, f"{name}.label"),
    )
    if record.metadata is not None:
        message.metadata.CopyFrom(struct(record.metadata, f"{name}.metadata"))
    if record.time_to_live is not None:
        seconds = checks.number(record.time_to_live, f"{name}.time_to_live")
        if not 0 < seconds <= _MAX_TIME_TO_LIVE:
            raise InputError(
                f"{name}.time_to_live is {seconds:g} s; it must be above 0 and at most {_MAX_TIME_TO_LIVE} s"
            )
        message.time_to_live.FromMilliseconds(max(round(seconds * 1000), 1))
    return NewRecord(message, vector)


def _refuse_hand_made_output(record: Record, name: str) -> None:
    """Raise InputError if `revision`, `create_time` or `update_time` is set, but not both times.

    Only the server sets these fields. If both times are set, the record counts as one of a response, which may be
    written again; the write ignores the three fields.
    """
    if record.update_time is not None and record.create_time is not None:
        return
    for field in ("revision", "create_time", "update_time"):
        value = getattr(record, field)
        if value:
            raise InputError(
                f"{name}.{field} is {value}, which only the server sets; leave it out, and use expected_revisions of "
                "`upsert` to write only what is unchanged"
            )


def parts_of(with_vectors: bool) -> list[index_pb2.RecordPart.ValueType]:
    """Return the parts of records to request from the server: text and metadata, and the vector if `with_vectors`.

    Raises:
        InputTypeError: `with_vectors` is not a bool.
    """
    parts = [index_pb2.RECORD_PART_TEXT, index_pb2.RECORD_PART_METADATA]
    return [*parts, index_pb2.RECORD_PART_VECTOR] if checks.flag(with_vectors, "with_vectors") else parts
