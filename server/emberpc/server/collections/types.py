"""Specs, records, results and plans: the values that an index backend takes and returns."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from emberpc.server.errors import invalid
from emberpc.server.names import NAME
from emberpc.server.paging import MAX_PAGE_SIZE

Matrix = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]

#: `json.loads` first detects encodings and skips blanks, which takes as long again.
_DECODE = json.JSONDecoder().raw_decode
#: The document of a record without metadata.
NO_METADATA = "{}"

MAX_DIMENSIONS = 16_000
#: Default limit of the bytes of the records in one response.
MAX_RESPONSE_BYTES = 32 * 2**20
#: Values of the engine's `Truncation`.
_TRUNCATIONS = ("refuse", "end", "start")


class Distance(str, Enum):
    """The measure that compares two vectors."""

    COSINE = "cosine"
    DOT_PRODUCT = "dot_product"
    EUCLIDEAN = "euclidean"


class Strategy(str, Enum):
    """The kind of search that found a result."""

    EXACT = "exact"
    HNSW = "hnsw"
    LEXICAL = "lexical"


class Fusion(str, Enum):
    """The rule that joins a dense and a lexical ranking."""

    SCORES = "scores"
    RANKS = "ranks"


@dataclass(frozen=True)
class CollectionSpec:
    """The properties of a collection; fixed at its creation except truncation and model binding."""

    name: str
    dimensions: int
    model: str = ""
    model_fingerprint: str = ""
    distance: Distance = Distance.COSINE
    #: How over-long texts are truncated, as the name of an engine's `Truncation`.
    truncation: str = "refuse"
    m: int = 16
    ef_construction: int = 200
    indexed_fields: tuple[str, ...] = ()

    def check(self) -> None:
        """Raise INVALID_ARGUMENT, naming the field, unless all values are valid."""
        check_name(self.name, "collection.name")
        bounds = {
            "dimensions": (self.dimensions, 1, MAX_DIMENSIONS),
            "hnsw.m": (self.m, 4, 64),
            "hnsw.ef_construction": (self.ef_construction, 16, 2000),
        }
        if not (self.dimensions or self.model):
            raise invalid(
                "collection.dimensions", f"is 0, and no model is named; name a model, or give 1 to {MAX_DIMENSIONS}"
            )
        for name, (value, low, high) in bounds.items():
            if not low <= value <= high:
                raise invalid(f"collection.{name}", f"is {value}; it must be {low} to {high}")
        if self.truncation not in _TRUNCATIONS:
            raise invalid("collection.truncation", f"is {self.truncation!r}; it must be one of {_TRUNCATIONS}")

    def to_json(self) -> str:
        """Encode the spec as JSON, as the catalogue stores it."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> CollectionSpec:
        """Decode the result of `to_json`.

        Raises:
            ValueError, TypeError, KeyError, AttributeError: the text is damaged.
        """
        values = json.loads(text)
        values["distance"] = Distance(values["distance"])
        values["indexed_fields"] = tuple(values["indexed_fields"])
        return cls(**values)


@dataclass(frozen=True)
class CollectionInfo:
    """State of a collection: number of records, sequence of its last write, creation time, and bytes on disk."""

    record_count: int
    sequence: int
    create_time: datetime
    size_bytes: int


@dataclass(frozen=True)
class NewRecord:
    """A record to be written; its vector is passed separately."""

    id: str
    text: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""
    #: Seconds until it expires; None: never.
    time_to_live: float | None = None


class _RecordFields(NamedTuple):
    id: str
    text: str
    #: The metadata as JSON: as Python objects, nested metadata takes about 25 times as many bytes.
    document: str
    label: str
    revision: int
    create_time: datetime
    update_time: datetime
    #: float32 (dimensions,) as it was given, or None if it was not requested.
    vector: Matrix | None = None
    #: When it expires; None: never.
    expire_time: datetime | None = None


class RecordParts(NamedTuple):
    """The parts of a record that a response contains besides id, label and times; vectors are requested separately."""

    text: bool = True
    metadata: bool = True


WHOLE_RECORD = RecordParts()


class StoredRecord(_RecordFields):
    """A record as it is stored.

    A tuple, since a response may have thousands, and creating a dataclass takes four times as long.
    """

    @property
    def metadata(self) -> dict[str, Any]:
        """The metadata, decoded each time, so that it takes memory only while it is used."""
        return decode_document(self.document)

    @cached_property
    def serialized(self) -> dict[Hashable, bytes]:
        """Serialized forms of the record by requested parts, so that a repeated hit is not serialized again."""
        return {}


@dataclass(frozen=True)
class WriteResult:
    """Result of a write; `synced` is whether this server knows it to be on disk."""

    sequence: int
    inserted: int = 0
    updated: int = 0
    deleted: int = 0
    synced: bool = True


@dataclass(frozen=True)
class Plan:
    """How a search was carried out .

    `ef` is 0 if the graph was not used; `lexical_count` is the number of hits of the lexical search.
    """

    strategy: Strategy
    ef: int
    compared_count: int
    shortfall_reason: str = ""
    lexical_count: int = 0


class SearchOutcome(NamedTuple):
    """The hits of one query, nearest first, each with its score (greater is nearer), and the plan."""

    hits: list[tuple[StoredRecord, float]]
    plan: Plan


def decode_document(document: str) -> dict[str, Any]:
    """Decode stored metadata.

    Raises:
        TypeError, ValueError, RecursionError: it is no JSON object.
    """
    if document == NO_METADATA:
        return {}
    found = _DECODE(document)[0]
    if type(found) is not dict:
        raise TypeError
    return found


def check_name(name: str, field: str) -> None:
    """Raise INVALID_ARGUMENT, naming the field, unless `name` is a valid name of a collection."""
    if not NAME.fullmatch(name):
        raise invalid(
            field, f"is {name!r}; use 1 to 128 letters, digits, '.', '_' and '-', the first a letter or digit"
        )


def check_page_size(page_size: int) -> None:
    """Raise INVALID_ARGUMENT unless the page size is within the limits."""
    if not 1 <= page_size <= MAX_PAGE_SIZE:
        raise invalid("page_size", f"is {page_size}; it must be 1 to {MAX_PAGE_SIZE}")


@dataclass(frozen=True)
class Change:
    """Effect of a write: its sequence, added and removed labels, and how many ids were new or replaced."""

    sequence: int
    added: Labels
    removed: set[int]
    inserted: int = 0
    updated: int = 0


@dataclass(frozen=True)
class Piece:
    """The next bytes of a backup, and its total size; the last piece has the SHA-256 (hex) of the whole."""

    data: bytes
    total: int
    sha256: str = ""


@dataclass(frozen=True)
class Cluster:
    """The number of records of a cluster, and the records nearest to its centre, nearest first."""

    record_count: int
    examples: list[StoredRecord]


@dataclass(frozen=True)
class DuplicatePair:
    """The ids of two records, the lesser first, and the cosine of their vectors."""

    first_id: str
    second_id: str
    score: float

    @property
    def order(self) -> tuple[float, str, str]:
        """Sort key: greatest score first."""
        return -self.score, self.first_id, self.second_id


@dataclass(frozen=True)
class ProbeFigures:
    """The number of probed searches, and the mean recall of the latest of them; NaN if there are none."""

    count: int
    recall: float


@dataclass(frozen=True)
class Problem:
    """A problem of a record; of the whole collection if `id` is empty."""

    id: str
    reason: str
    message: str


@dataclass(frozen=True)
class Verified:
    """Progress of a verification, and the problems found since the last step."""

    checked: int
    total: int
    problems: Sequence[Problem] = ()
    done: bool = False
