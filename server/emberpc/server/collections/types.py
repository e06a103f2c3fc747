"""The values that an index backend takes and returns, such as specs, records, results and plans."""

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

#: Decodes a JSON text without white space at its start; returns the value and the index of its end. `json.loads` takes
#: twice the time, since it first skips white space and checks the type of the text.
_DECODE = json.JSONDecoder().raw_decode
#: Metadata as JSON of a record without metadata, and of a record that is returned without its metadata.
NO_METADATA = "{}"

MAX_DIMENSIONS = 16_000
#: Default of the limit of the bytes of the records in one response.
MAX_RESPONSE_BYTES = 32 * 2**20
#: Values of the engine's `Truncation`. They are repeated here, since this package does not import the engine.
_TRUNCATIONS = ("refuse", "end", "start")


class Distance(str, Enum):
    """The measure that compares two vectors."""

    COSINE = "cosine"
    DOT_PRODUCT = "dot_product"
    EUCLIDEAN = "euclidean"


class SearchStrategy(str, Enum):
    """How the hits of a query were found.

    EXACT: by comparing the query with all vectors, or with those of the records that meet the filter. HNSW: by
    searching the graph and comparing the query with the buffer; with Milvus, by a search in Milvus. LEXICAL: by words.
    """

    EXACT = "exact"
    HNSW = "hnsw"
    LEXICAL = "lexical"


class Fusion(str, Enum):
    """The rule that joins a dense and a lexical ranking.

    `BOUNDS` scales scores by the greatest possible ones, `SCORES` by those of the ranking, and `RANKS` uses reciprocal
    ranks; see `index/search/fusion.py`.
    """

    BOUNDS = "bounds"
    SCORES = "scores"
    RANKS = "ranks"


@dataclass(frozen=True)
class CollectionSpec:
    """The properties of a collection, fixed at its creation with three exceptions.

    `IndexBackend.update` changes the truncation, `IndexBackend.update_fingerprint` the fingerprint, and a reembedding
    the model, the fingerprint and the dimensions.

    Attributes:
        name: name of the collection.
        dimensions: dimensions of the vectors.
        model: name of the model that embeds the texts; empty: the collection has no model.
        model_fingerprint: fingerprint (present or legacy) of the model that made the vectors; empty without a model.
        distance: the measure that compares vectors.
        truncation: default for texts of records with more tokens than the model reads: `refuse`, `end` or `start`.
        m: maximum number of links of a node in a layer of the graph; in the lowest layer, a node may have twice as
            many.
        ef_construction: number of candidate neighbours that an insertion into the graph keeps.
        indexed_fields: metadata fields with an index in the database; with Milvus, they get none.
    """

    name: str
    dimensions: int
    model: str = ""
    model_fingerprint: str = ""
    distance: Distance = Distance.COSINE
    truncation: str = "refuse"
    m: int = 16
    ef_construction: int = 200
    indexed_fields: tuple[str, ...] = ()

    def check(self) -> None:
        """Raise INVALID_ARGUMENT, naming the first wrong field, unless name, numbers and truncation are valid.

        Dimensions of 0 are refused, also with a model. Model, fingerprint and indexed fields are not checked.
        """
        check_name(self.name, "collection.name")
        bounds = {
            "dimensions": (self.dimensions, 1, MAX_DIMENSIONS),
            "hnsw.m": (self.m, 4, 64),
            "hnsw.ef_construction": (self.ef_construction, 16, 2000),
        }
        if not (self.dimensions or self.model):
            raise invalid(
                "collection.dimensions", f"is needed without a model; name a model, or give 1 to {MAX_DIMENSIONS}"
            )
        for name, (value, low, high) in bounds.items():
            if not low <= value <= high:
                raise invalid(f"collection.{name}", f"is {value}; it must be {low} to {high}")
        if self.truncation not in _TRUNCATIONS:
            raise invalid("collection.truncation", f"is {self.truncation!r}; it must be one of {_TRUNCATIONS}")

    def to_json(self) -> str:
        """Return the spec as a JSON object, as the catalogue stores it."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> CollectionSpec:
        """Return the spec that `to_json` encoded. The types and ranges of most values are not checked.

        Raises:
            ValueError, TypeError, KeyError, AttributeError, RecursionError: the text is damaged.
        """
        values = json.loads(text)
        values["distance"] = Distance(values["distance"])
        values["indexed_fields"] = tuple(values["indexed_fields"])
        return cls(**values)


@dataclass(frozen=True)
class CollectionInfo:
    """State of a collection.

    Attributes:
        record_count: number of records, damaged or not.
        sequence: sequence of the last write of records; 0: none so far. With Milvus, only writes by this server since
            its start count.
        create_time: when the collection was created; of a restored collection, the time in the backup.
        size_bytes: bytes on disk; 0 with Milvus, where the size is not known.
    """

    record_count: int
    sequence: int
    create_time: datetime
    size_bytes: int


@dataclass(frozen=True)
class NewRecord:
    """A record to be written. Its vector is not part of this object, but a row of a matrix that is passed beside it."""

    id: str
    text: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""
    #: Seconds from the write after which the record expires and is deleted; None: it never expires.
    time_to_live: float | None = None


class _RecordFields(NamedTuple):
    id: str
    text: str
    #: The metadata as JSON text. As Python objects, nested metadata would take about 25 times as many bytes.
    metadata_text: str
    label: str
    revision: int
    create_time: datetime
    update_time: datetime
    #: The vector as it was written, not prepared: float32 (dimensions,); None if it was not requested.
    vector: Matrix | None = None
    #: End of the record's time to live, after which the record is deleted; None: it never expires.
    expire_time: datetime | None = None


class RecordParts(NamedTuple):
    """Whether a response contains the text and the metadata of a record.

    A response always contains id, label, revision and times. Vectors are requested by a parameter of their own.
    """

    text: bool = True
    metadata: bool = True


WHOLE_RECORD = RecordParts()


class StoredRecord(_RecordFields):
    """A record that was read. If its text or metadata was not requested, that part may be empty.

    It is a tuple, since a response may have thousands of records, and a dataclass takes four times as long to create.
    """

    @property
    def metadata(self) -> dict[str, Any]:
        """The metadata as Python objects, decoded again at each access, so that they take memory only while in use.

        Raises `TypeError`, `ValueError` or `RecursionError` if the stored metadata is damaged.
        """
        return decode_metadata(self.metadata_text)

    @cached_property
    def serialized(self) -> dict[Hashable, bytes]:
        """Cache that callers fill and read: serialized forms of this record, by the parts that a request names."""
        return {}


@dataclass(frozen=True)
class WriteResult:
    """Result of a write.

    Attributes:
        sequence: sequence of the write; if a delete found no record, that of the last write, as in `CollectionInfo`.
        inserted: number of new records.
        updated: number of replaced records.
        deleted: number of deleted records.
        synced: whether the write is on disk. False with Milvus: this server then does not know.
    """

    sequence: int
    inserted: int = 0
    updated: int = 0
    deleted: int = 0
    synced: bool = True


@dataclass(frozen=True)
class Plan:
    """How a query was answered.

    Attributes:
        strategy: how the hits were found; for a hybrid search, those of its dense ranking.
        ef: candidates that the search of the graph kept; if it was repeated, those of the last search for this query.
            0: the graph was not used.
        compared_count: EXACT: number of vectors that were compared. HNSW: number of vectors of the buffer, which are
            compared one by one; 0 with Milvus. LEXICAL: 0.
        shortfall_reason: why there are fewer than `top_k` hits; empty if there are `top_k` hits.
        lexical_count: number of hits of a lexical search, or of the lexical ranking of a hybrid search before fusion; 0
            for a dense search.
    """

    strategy: SearchStrategy
    ef: int
    compared_count: int
    shortfall_reason: str = ""
    lexical_count: int = 0


class SearchOutcome(NamedTuple):
    """The hits of one query, best first, each with its score (greater is better), and the plan of the query."""

    hits: list[tuple[StoredRecord, float]]
    plan: Plan


def decode_metadata(metadata_text: str) -> dict[str, Any]:
    """Decode the metadata of a record from its JSON text `metadata_text`. Text after the JSON object is ignored.

    Raises:
        TypeError, ValueError, RecursionError: the text is damaged: it does not start with a JSON object (white space
            before the object is not allowed), or the object is nested too deeply.
    """
    if metadata_text == NO_METADATA:
        return {}
    found = _DECODE(metadata_text)[0]
    if type(found) is not dict:
        raise TypeError
    return found


def check_name(name: str, field: str) -> None:
    """Raise INVALID_ARGUMENT, naming the request field `field`, unless `name` is a valid name of a collection.

    A name has 1 to 128 ASCII letters, digits, '.', '_' and '-', and starts with a letter or digit.
    """
    if not NAME.fullmatch(name):
        raise invalid(
            field, f"is {name!r}; use 1 to 128 letters, digits, '.', '_' and '-', the first a letter or digit"
        )


def check_page_size(page_size: int) -> None:
    """Raise INVALID_ARGUMENT, naming the field `page_size`, unless `page_size` is 1 to 1000."""
    if not 1 <= page_size <= MAX_PAGE_SIZE:
        raise invalid("page_size", f"is {page_size}; it must be 1 to {MAX_PAGE_SIZE}")


@dataclass(frozen=True)
class Change:
    """Effect of a write. A label is here a number in database and graph: each write gives a record a new label.

    Attributes:
        sequence: sequence of the write; of the last write if this one changed nothing, or copied records.
        added: labels of the records that were written, int64 (records,).
        removed: old labels of the records that were replaced or deleted.
        inserted: number of new records; 0 if records were copied.
        updated: number of replaced records; 0 if records were copied.
    """

    sequence: int
    added: Labels
    removed: set[int]
    inserted: int = 0
    updated: int = 0


@dataclass(frozen=True)
class Piece:
    """A piece of a backup.

    Attributes:
        data: the next bytes.
        total: bytes of the whole backup.
        sha256: SHA-256 (hex) of the whole backup in the last piece; empty in the other pieces.
    """

    data: bytes
    total: int
    sha256: str = ""


@dataclass(frozen=True)
class Cluster:
    """The number of records of a cluster, and some of its records: those nearest to its centre, nearest first."""

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
        """Sort key of a pair: the negative score, so that the greatest score comes first, and then the two ids."""
        return -self.score, self.first_id, self.second_id


@dataclass(frozen=True)
class ProbeFigures:
    """Measured recall of a collection's searches. A probed search is repeated exactly, and the hits are compared.

    Attributes:
        count: number of searches whose recall was measured.
        recall: mean recall (0 to 1) of the latest of these searches, at most 256; NaN if there are none.
    """

    count: int
    recall: float


@dataclass(frozen=True)
class Problem:
    """A problem that a verification found, with a reason for programs and a message for people.

    `id` is the id of the record with the problem; empty if the whole collection has the problem. An id that is damaged
    and no string is in a printable form.
    """

    id: str
    reason: str
    message: str


@dataclass(frozen=True)
class Verified:
    """Progress of a verification.

    Attributes:
        checked: number of records that were checked so far.
        total: number of records at the start, or `checked` if that is greater; at the end, `checked`.
        problems: problems that were found since the previous progress.
        done: whether the verification is complete.
    """

    checked: int
    total: int
    problems: Sequence[Problem] = ()
    done: bool = False
