"""Convert names, specs, records and scores between emberpc and Milvus; check records; select records by id."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

import numpy as np
from pymilvus import DataType, MilvusClient

from emberpc.server.collections.types import CollectionSpec, Distance, Matrix, NewRecord, StoredRecord
from emberpc.server.errors import Violation, invalid, invalid_fields
from emberpc.server.milvus import terms
from emberpc.server.milvus.literals import quoted
from emberpc.server.names import NAME

#: Prefix of the names of emberpc's collections in Milvus. Other collections of the Milvus database are ignored.
_PREFIX = "emberpc_"
#: Replacements of the characters that Milvus does not allow in names, where only letters, digits and `_` are allowed.
#: `_` is replaced too, since it begins a replacement.
_ESCAPES = {"_": "_u", ".": "_d", "-": "_h"}
_UNESCAPES = {escape: character for character, escape in _ESCAPES.items()}
#: Milvus's limit of the characters of a collection's name.
_MAX_NAME = 255
#: Key of a property of a Milvus collection. The value has the spec and the creation time as JSON.
_PROPERTY = "emberpc.collection"

#: Milvus's limit of the bytes (UTF-8) of a string, and so of a record's text. emberpc's own limit of a label is less.
MAX_TEXT_BYTES = 65_535
#: Limit of the bytes (UTF-8) of an id, which is the primary key in Milvus. emberpc's own limit is the same.
_MAX_ID_BYTES = 512
#: Minimum number of dimensions of a vector in Milvus.
_MIN_DIMENSIONS = 2
#: Minimum length (Euclidean norm) of a vector under COSINE. Milvus squares lengths in float32, where the square of a
#: much lesser length becomes zero.
_MIN_LENGTH = 1e-15

VECTOR = "vector"
ID = "id"
_FIELDS = [ID, "text", "metadata", "label", "revision", "created", "updated"]
_METRICS = {Distance.COSINE: "COSINE", Distance.DOT_PRODUCT: "IP", Distance.EUCLIDEAN: "L2"}


def milvus_name(name: str) -> str:
    """Return the name in Milvus of a collection with the valid name `name`: the prefix, and the escaped `name`.

    Raises:
        ServiceError: INVALID_ARGUMENT if the name in Milvus would have more than 255 characters.
    """
    escaped = _escaped(name)
    if len(escaped) > _MAX_NAME:
        raise invalid(
            "collection.name",
            f"is too long for Milvus, where '_', '.' and '-' count twice: {len(escaped)} of {_MAX_NAME}; shorten it",
        )
    return escaped


def is_possible(name: str) -> bool:
    """Return whether `name` is a valid name of a collection, and not too long for Milvus when it is escaped."""
    return bool(NAME.fullmatch(name)) and len(_escaped(name)) <= _MAX_NAME


def own_name(escaped: str) -> str | None:
    """Return the collection's name from its name in Milvus; None without the prefix or with an unknown escape."""
    if not escaped.startswith(_PREFIX):
        return None
    name, rest = "", escaped[len(_PREFIX) :]
    while rest:
        length = 2 if rest[0] == "_" else 1
        if length == 2 and rest[:2] not in _UNESCAPES:
            return None
        name += _UNESCAPES.get(rest[:length], rest[:length])
        rest = rest[length:]
    return name


def creation(spec: CollectionSpec, created: datetime) -> dict[str, Any]:
    """Return the arguments of `MilvusClient.create_collection`, without the name, for a new collection.

    The spec and the creation time are stored twice: in the description, which a Milvus server always keeps, and in a
    property, since milvus-lite does not keep descriptions.

    Raises:
        ServiceError: INVALID_ARGUMENT if the vectors have fewer than 2 dimensions, which Milvus does not support.
    """
    if spec.dimensions < _MIN_DIMENSIONS:
        raise invalid("collection.dimensions", f"is {spec.dimensions}; Milvus needs {_MIN_DIMENSIONS} or more")
    about = _about(spec, created)
    schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False, description=about)
    schema.add_field(ID, DataType.VARCHAR, is_primary=True, max_length=_MAX_ID_BYTES)
    schema.add_field("text", DataType.VARCHAR, max_length=MAX_TEXT_BYTES)
    schema.add_field("metadata", DataType.JSON)
    schema.add_field("label", DataType.VARCHAR, max_length=MAX_TEXT_BYTES)
    for number in ("revision", "created", "updated"):
        schema.add_field(number, DataType.INT64)
    schema.add_field(
        terms.FIELD,
        DataType.ARRAY,
        element_type=DataType.VARCHAR,
        max_capacity=terms.MAX_TERMS,
        max_length=terms.TERM_BYTES,
    )
    schema.add_field(VECTOR, DataType.FLOAT_VECTOR, dim=spec.dimensions)
    return {
        "schema": schema,
        "properties": properties(spec, created),
        # With several shards, Milvus would divide the records of a write, and could store one part and not the other.
        "num_shards": 1,
        "consistency_level": "Strong",
    }


def properties(spec: CollectionSpec, created: datetime) -> dict[str, str]:
    """Return the property, by its key, that stores spec and creation time of a collection in Milvus as JSON.

    A change of the spec is written only to the property, so `read_description` prefers it to the description.
    """
    return {_PROPERTY: _about(spec, created)}


def _about(spec: CollectionSpec, created: datetime) -> str:
    return json.dumps({"spec": spec.to_json(), "created": created.timestamp()})


def graph(spec: CollectionSpec) -> Any:
    """Return the parameters of the HNSW index of a collection's vectors, for `MilvusClient.create_index`."""
    parameters = MilvusClient.prepare_index_params()
    parameters.add_index(
        field_name=VECTOR,
        index_type="HNSW",
        metric_type=_METRICS[spec.distance],
        params={"M": spec.m, "efConstruction": spec.ef_construction},
    )
    return parameters


def read_description(described: dict[str, Any]) -> tuple[CollectionSpec, datetime] | None:
    """Return spec and creation time from the result of `MilvusClient.describe_collection`.

    They are read from the property; without the property, from the description. None if emberpc did not create the
    collection, or they are damaged.
    """
    text = (described.get("properties") or {}).get(_PROPERTY) or described.get("description") or ""
    try:
        about = json.loads(text)
        return CollectionSpec.from_json(about["spec"]), datetime.fromtimestamp(about["created"], timezone.utc)
    except (KeyError, TypeError, ValueError, OverflowError, OSError):  # the last two: a time that cannot be
        return None


def check_fit(
    records: Sequence[NewRecord], found_terms: Sequence[Sequence[str]], vectors: Matrix, distance: Distance
) -> None:
    """Check that Milvus can store records and vectors that are valid for emberpc.

    Args:
        records: the records.
        found_terms: the terms of each record's metadata, see `terms.terms`.
        vectors: the vectors of the records, float32 (records, dimensions).
        distance: the distance of the collection.

    Raises:
        ServiceError: INVALID_ARGUMENT, naming each text or label of more than 65,535 bytes, the metadata of each record
            with more than 4096 terms, and under COSINE each vector shorter than 1e-15.
    """
    violations = []
    for i, record in enumerate(records):
        for field, text in (("text", record.text), ("label", record.label)):
            if (size := len(text.encode())) > MAX_TEXT_BYTES:
                violations.append(
                    Violation(f"records[{i}].{field}", f"has {size} bytes, Milvus holds {MAX_TEXT_BYTES}; split it")
                )
        if (count := len(found_terms[i])) > terms.MAX_TERMS:
            violations.append(
                Violation(
                    f"records[{i}].metadata",
                    f"has fields and values that come to {count} terms, Milvus holds {terms.MAX_TERMS}; leave some out",
                )
            )
    if distance is Distance.COSINE:
        lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
        violations += [
            Violation(f"vectors[{i}]", f"is shorter than {_MIN_LENGTH:g}, too short for Milvus; scale the vectors up")
            for i in np.flatnonzero(lengths < _MIN_LENGTH)
        ]
    if violations:
        raise invalid_fields(violations)


def row(
    record: NewRecord,
    metadata_text: str,
    found_terms: Sequence[str],
    vector: Matrix,
    revision: int,
    created: int,
    updated: int,
) -> dict[str, Any]:
    """Return a record as a row of Milvus: its values by field name.

    Args:
        record: the record.
        metadata_text: the record's metadata as JSON.
        found_terms: the terms of the metadata, see `terms.terms`.
        vector: float32 (dimensions,).
        revision: revision of the record.
        created: creation time in microseconds since 1970.
        updated: time of this write in microseconds since 1970.
    """
    return {
        ID: record.id,
        "text": record.text,
        "metadata": metadata_text,
        "label": record.label,
        terms.FIELD: list(found_terms),
        "revision": revision,
        "created": created,
        "updated": updated,
        VECTOR: vector,
    }


def fields(*, with_vectors: bool) -> list[str]:
    """Return the names of the fields that `stored` reads from a row; with the vector only if `with_vectors`."""
    return [*_FIELDS, VECTOR] if with_vectors else _FIELDS


def stored(found: dict[str, Any]) -> StoredRecord:
    """Convert a row of Milvus with the fields of `fields` to a record; `vector` is None if the row has no vector."""
    return StoredRecord(
        id=found[ID],
        text=found["text"],
        metadata_text=_metadata_text(found),
        label=found["label"],
        revision=found["revision"],
        create_time=_moment(found["created"]),
        update_time=_moment(found["updated"]),
        vector=np.asarray(found[VECTOR], dtype=np.float32) if VECTOR in found else None,
    )


def metadata(found: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata of a row of Milvus, which has it as JSON or as a mapping, as a dict of Python objects."""
    value = found["metadata"]
    return json.loads(value) if isinstance(value, (str, bytes)) else dict(value)


def _metadata_text(found: dict[str, Any]) -> str:
    """Return the metadata of a row of Milvus as JSON text, without white space at its ends, for `decode_metadata`."""
    value = found["metadata"]
    return value.strip() if isinstance(value, str) else json.dumps(metadata(found), ensure_ascii=False)


def behind(record_id: str) -> str:
    """Return Milvus's filter expression for the records with ids after `record_id` in byte order; empty id: all."""
    return f"{ID} > {quoted(record_id)}"


def one_of(ids: Sequence[str]) -> str:
    """Return Milvus's filter expression for the records with the given ids."""
    return f"{ID} in [{', '.join(map(quoted, ids))}]"


def score(distance: Distance, value: float) -> float:
    """Convert `value`, which Milvus reports for a hit, to the score of the hit; greater is nearer.

    Under EUCLIDEAN, `value` is the square of the distance, and the score is the negative distance. Otherwise `value` is
    the score.
    """
    return -(max(value, 0.0) ** 0.5) if distance is Distance.EUCLIDEAN else value


def _escaped(name: str) -> str:
    return _PREFIX + "".join(_ESCAPES.get(character, character) for character in name)


def _moment(microseconds: int) -> datetime:
    return datetime.fromtimestamp(microseconds / 1e6, timezone.utc)
