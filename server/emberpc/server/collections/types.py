"""What goes into the index and what comes out of it."""

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

MAX_DIMENSIONS = 16_000
#: Most bytes of the records of one answer, unless the server's settings say otherwise.
MAX_RESPONSE_BYTES = 32 * 2**20
#: Values of the engine's `Truncation`.
_TRUNCATIONS = ("refuse", "end", "start")


class Distance(str, Enum):
    """How two vectors compare."""

    COSINE = "cosine"
    DOT_PRODUCT = "dot_product"
    EUCLIDEAN = "euclidean"


class Strategy(str, Enum):
    """How a result was found."""

    EXACT = "exact"
    HNSW = "hnsw"
    LEXICAL = "lexical"


class Fusion(str, Enum):
    """How a ranking by likeness and one by words become one."""

    SCORES = "scores"
    RANKS = "ranks"


@dataclass(frozen=True)
class CollectionSpec:
    """What a collection is; fixed at its creation."""

    name: str
    dimensions: int
    model: str = ""
    model_fingerprint: str = ""
    distance: Distance = Distance.COSINE
    #: The service's own term for what to do with over-long texts.
    truncation: str = "refuse"
    m: int = 16
    ef_construction: int = 200
    indexed_fields: tuple[str, ...] = ()

    def check(self) -> None:
        """Raise INVALID_ARGUMENT, naming the field, unless everything is within bounds."""
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
        """Return the spec as the catalogue keeps it."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> CollectionSpec:
        """Read what `to_json` wrote.

        Raises:
            ValueError, TypeError, KeyError, AttributeError: the text is damaged.
        """
        values = json.loads(text)
        values["distance"] = Distance(values["distance"])
        values["indexed_fields"] = tuple(values["indexed_fields"])
        return cls(**values)


@dataclass(frozen=True)
class CollectionInfo:
    """How a collection stands: number of records, of its last write, and bytes on disk."""

    record_count: int
    sequence: int
    create_time: datetime
    size_bytes: int


@dataclass(frozen=True)
class NewRecord:
    """A record to be written; its vector comes beside it."""

    id: str
    text: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""
    #: Seconds until it is gone; None: it stays.
    time_to_live: float | None = None


class _RecordFields(NamedTuple):
    id: str
    text: str
    metadata: dict[str, Any]
    label: str
    revision: int
    create_time: datetime
    update_time: datetime
    #: float32 (dimensions,) as it was given, or None where it was not asked for.
    vector: Matrix | None = None
    #: When it will be gone; None: it stays.
    expire_time: datetime | None = None


class RecordParts(NamedTuple):
    """Which parts of a record an answer holds beside its id, label and times; a vector is asked for separately."""

    text: bool = True
    metadata: bool = True


WHOLE_RECORD = RecordParts()


class StoredRecord(_RecordFields):
    """A record as it stands.

    A tuple, since an answer may have thousands, and a dataclass takes four times as long to make.
    """

    @cached_property
    def forms(self) -> dict[Hashable, bytes]:
        """What answers made of it, by what they asked for: one that is found again need not be put into words again."""
        return {}


@dataclass(frozen=True)
class WriteResult:
    """What a write came to; `synced` is whether this server knows it to be on disk."""

    sequence: int
    inserted: int = 0
    updated: int = 0
    deleted: int = 0
    synced: bool = True


@dataclass(frozen=True)
class Plan:
    """How a query was carried out; `ef` is 0 where the graph was not used, `lexical_count` how many hits words gave."""

    strategy: Strategy
    ef: int
    compared_count: int
    shortfall_reason: str = ""
    lexical_count: int = 0


class SearchOutcome(NamedTuple):
    """What was found for one query, nearest first, each with its score; greater is nearer."""

    hits: list[tuple[StoredRecord, float]]
    plan: Plan


def check_name(name: str, field: str) -> None:
    """Raise INVALID_ARGUMENT, naming the field, unless a collection may have this name."""
    if not NAME.fullmatch(name):
        raise invalid(
            field, f"is {name!r}; use 1 to 128 letters, digits, '.', '_' and '-', the first a letter or digit"
        )


def check_page_size(page_size: int) -> None:
    """Raise INVALID_ARGUMENT unless a page can have so many items."""
    if not 1 <= page_size <= MAX_PAGE_SIZE:
        raise invalid("page_size", f"is {page_size}; it must be 1 to {MAX_PAGE_SIZE}")


@dataclass(frozen=True)
class Change:
    """What a write did: its number, the labels that came and went, how many ids were new, and how many replaced."""

    sequence: int
    added: Labels
    removed: set[int]
    inserted: int = 0
    updated: int = 0


@dataclass(frozen=True)
class Piece:
    """The next bytes of a backup, and how many it has in all; with the last ones, the SHA-256 (hex) of the whole."""

    data: bytes
    total: int
    sha256: str = ""


@dataclass(frozen=True)
class Cluster:
    """How many records a cluster has, and those nearest to its centre, nearest first."""

    record_count: int
    examples: list[StoredRecord]


@dataclass(frozen=True)
class DuplicatePair:
    """Ids of two records, the lesser first, and the cosine of their vectors."""

    first_id: str
    second_id: str
    score: float

    @property
    def order(self) -> tuple[float, str, str]:
        """Most alike first."""
        return -self.score, self.first_id, self.second_id


@dataclass(frozen=True)
class ProbeFigures:
    """How many searches were probed, and the mean recall of the latest of them; NaN if there were none."""

    count: int
    recall: float


@dataclass(frozen=True)
class Problem:
    """What is wrong with a record; of the collection as a whole if `id` is empty."""

    id: str
    reason: str
    message: str


@dataclass(frozen=True)
class Verified:
    """How far a verification is, and the problems found since the last step."""

    checked: int
    total: int
    problems: Sequence[Problem] = ()
    done: bool = False
