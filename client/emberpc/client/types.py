"""What the client takes and gives: frozen dataclasses of plain Python values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from emberpc.client.details import ModelVersion
from emberpc.client.exceptions import EmberpcError, InputError, InputTypeError
from emberpc.v1 import filter_pb2 as pb

#: float32, shape (rows, dimensions).
Matrix: TypeAlias = npt.NDArray[np.float32]
#: float32, shape (dimensions,).
Vector: TypeAlias = npt.NDArray[np.float32]

#: What a text is for; the server puts the model's prompt for it before the text.
InputKind: TypeAlias = Literal["passage", "query"]
#: What to do with a text of more tokens than the model takes: fail, or drop what is past the limit at one side.
Truncation: TypeAlias = Literal["refuse", "end", "start"]
#: Element type of vectors on the wire; smaller ones are less exact. The client always gives float32.
DType: TypeAlias = Literal["float32", "float16", "int8", "binary"]
#: How two vectors compare.
Distance: TypeAlias = Literal["cosine", "dot_product", "euclidean"]
#: What a search goes by: likeness of vectors, words in common, or both.
SearchMode: TypeAlias = Literal["dense", "lexical", "hybrid"]
#: How a hybrid search makes one ranking of two: by their scores, scaled, or by their reciprocal ranks.
Fusion: TypeAlias = Literal["scores", "ranks"]
#: Whether somebody is waiting, or throughput matters and latency does not.
Priority: TypeAlias = Literal["interactive", "bulk"]

#: Told how many items are done so far.
Progress: TypeAlias = Callable[[int], None]
#: Told how many bytes are done, of how many.
ByteProgress: TypeAlias = Callable[[int, int], None]
#: Told what a server that changes its models is doing.
Stages: TypeAlias = Callable[[str], None]

#: One text of a stream, alone or with an id, as (id, text).
StreamItem: TypeAlias = "str | tuple[str, str]"


@dataclass(frozen=True)
class StreamedEmbedding:
    """What became of one text of a stream: it has a vector or an error, never both."""

    #: As it was given; of a text without one its number in the stream, from "0".
    id: str
    #: float32 (dimensions,).
    vector: Vector | None = field(default=None, compare=False)
    #: Why there is no vector: an InputError if the text could not be sent, else what the server said of it.
    error: EmberpcError | InputError | None = None
    #: Tokens that went through the model.
    tokens: int = 0
    #: Whether the text was cut to fit.
    truncated: bool = False
    #: The model that answered; None if the text could not be sent.
    model: ModelVersion | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Reembedding:
    """A collection's way to another model, while the one that it has answers."""

    #: The new model.
    model: str
    #: Records taken over, and how many there are.
    done: int
    total: int
    #: In UTC; None if the server did not say.
    start_time: datetime | None
    #: Why it does not go on now; it does when that has changed. Empty: it goes on.
    problem: str


@dataclass(frozen=True)
class Collection:
    """A set of records whose vectors may be compared with each other."""

    name: str
    #: The embedding model of its texts; empty if it takes vectors only.
    model: str
    model_fingerprint: str
    dimensions: int
    #: `cosine`, `dot_product` or `euclidean`.
    distance: str
    #: `refuse`, `end` or `start`.
    truncation: str
    #: Links of a node of its HNSW graph, per layer.
    m: int
    #: Candidates kept while inserting into the graph.
    ef_construction: int
    record_count: int
    #: Sequence number of its last write.
    sequence: int
    #: Bytes on disk.
    size_bytes: int
    #: In UTC; None if the server did not say.
    create_time: datetime | None
    #: Why it cannot be used, such as that it is damaged; empty if it can.
    problem: str = ""
    #: Its way to another model, if it is on one.
    reembedding: Reembedding | None = None
    #: Metadata fields that filters use often.
    indexed_fields: tuple[str, ...] = ()


@dataclass(frozen=True)
class Record:
    """One thing that can be found.

    To write one, give the first four fields, `vector` if the server is not to
    embed the text, and `time_to_live` if it is to go. The rest the server fills in. Numbers of `metadata` are
    doubles on the wire; a whole one comes back as an int.
    """

    id: str
    text: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""
    #: float32 (dimensions,); in an answer None unless asked for.
    vector: Vector | None = field(default=None, compare=False)
    #: Seconds that it stays, from the write on; in an answer, from then on. None: it stays for good.
    time_to_live: float | None = field(default=None, compare=False)
    #: Sequence number of the write that made it what it is. The server sets it and the two times; a write ignores them
    #: in a record from an answer, and refuses them in another. See `expected_revisions` of `Client.upsert`.
    revision: int = field(default=0, compare=False)
    create_time: datetime | None = field(default=None, compare=False)
    update_time: datetime | None = field(default=None, compare=False)


@dataclass(frozen=True)
class RecordId:
    """A query for the neighbours of a record, which is not among the hits itself."""

    id: str


#: A text, a vector (dimensions,) or a record.
Query: TypeAlias = "str | RecordId | npt.NDArray[Any] | Sequence[float]"


@dataclass(frozen=True, eq=False)
class SearchQuery:
    """A query of `search_batch` with options of its own, instead of the call's; what is not set is as the call says."""

    query: Query
    where: str | pb.Filter | None = None
    top_k: int = 0
    ef: int = 0


@dataclass(frozen=True)
class UpsertResult:
    """What a write came to; `sequence` is the number of the last write, 0 if there was nothing to write."""

    inserted: int
    updated: int
    sequence: int


@dataclass(frozen=True)
class FailedRecord:
    """A record of a stream that was not written, and why."""

    #: Its place among the records given, from 0.
    index: int
    id: str
    #: An InputError or InputTypeError if it could not be sent, else what the server said of it.
    error: EmberpcError | InputError | InputTypeError


@dataclass(frozen=True)
class UpsertCheckpoint:
    """How far a stream of records is: what it says of `done` is lasting, and the rest tells of what is new since."""

    #: So many of the records given, from the first on, are on disk, but for those that failed.
    done: int
    failures: tuple[FailedRecord, ...] = ()
    inserted: int = 0
    updated: int = 0
    #: Number of the last write; 0 if nothing was written.
    sequence: int = 0
    #: `synced` if that write was on disk before the response, else `unknown`.
    durability: str = field(default="unknown", compare=False)


@dataclass(frozen=True)
class Hit:
    """A record found; a greater score is nearer."""

    record: Record
    score: float


@dataclass(frozen=True)
class SearchPlan:
    """How a query was carried out."""

    #: `exact`: every vector was compared; `hnsw`: the graph was searched; `lexical`: words were looked up.
    strategy: str
    #: Candidates that the graph search kept; 0 if the graph was not used.
    ef: int
    #: Vectors compared one by one.
    compared_count: int
    #: Why there are fewer than `top_k` hits; empty if there are not fewer.
    shortfall_reason: str
    #: Hits by words in common that were found, or fused with those by likeness.
    lexical_count: int = 0


@dataclass(frozen=True)
class SearchResult:
    """What was found for one query: hits, nearest first, and how."""

    hits: tuple[Hit, ...]
    plan: SearchPlan
    #: Whether the text of the query was cut to the tokens that the model takes.
    truncated: bool = False
    #: Tokens of the text of the query; 0 if no model read it.
    tokens: int = field(default=0, compare=False)


@dataclass(frozen=True)
class DuplicatePair:
    """Ids of two records that are much alike, the lesser first, and the cosine of their vectors."""

    first_id: str
    second_id: str
    score: float


@dataclass(frozen=True)
class Cluster:
    """A group of like records: how many there are, and those nearest to its centre, nearest first."""

    record_count: int
    examples: tuple[Record, ...]


@dataclass(frozen=True)
class RecordProblem:
    """What `verify_collection` found wrong with a record; with the collection as a whole if `id` is empty."""

    id: str
    #: For programs, such as `UNREACHABLE`.
    reason: str
    message: str


@dataclass(frozen=True)
class Verification:
    """What `verify_collection` came to."""

    checked: int
    problems: tuple[RecordProblem, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


@dataclass(frozen=True)
class LabelScore:
    """A label with its probability, in [0, 1]."""

    label: str
    score: float


@dataclass(frozen=True)
class Classification:
    """What one text is."""

    #: The label predicted, or those of a multi-label classifier; empty if `rejected`.
    labels: tuple[str, ...]
    #: Best first, at most `top_k`.
    scores: tuple[LabelScore, ...]
    #: Whether the text seems to be outside all labels.
    rejected: bool
    #: Tokens that went through the model.
    tokens: int
    #: Whether the text was cut to fit.
    truncated: bool

    @property
    def label(self) -> str | None:
        """The label predicted, the best one of several; None if there is none."""
        return self.labels[0] if self.labels else None


@dataclass(frozen=True)
class Model:
    """A model as it is served."""

    name: str
    #: `embedding` or `classification`.
    task: str
    #: `loading`, `ready`, `unloading` or `failed`.
    state: str
    base_model: str
    revision: str
    fingerprint: str
    dimensions: int
    matryoshka_dimensions: tuple[int, ...]
    pooling: str
    normalized: bool
    #: The most tokens of a text, special tokens and prompt included.
    max_tokens: int
    query_prompt: str
    passage_prompt: str
    #: Of a classifier, in the order of its scores.
    labels: tuple[str, ...]
    multi_label: bool
    #: Which of the bundle's ONNX files is served, such as `fp32`.
    variant: str
    size_bytes: int
    load_time: datetime | None
    #: Figures measured at export, such as `accuracy`.
    quality: Mapping[str, float]


@dataclass(frozen=True)
class ServerInfo:
    """A server's version, limits and features."""

    #: Of emberpc.
    version: str
    #: Largest sizes that the server accepts, by the names of `ServerLimits` in server.proto, such as `max_texts`.
    limits: Mapping[str, int]
    #: Optional capabilities, such as `model_admin`.
    features: tuple[str, ...]


class Health(Enum):
    """Whether a server takes calls; the values are those of grpc.health.v1."""

    UNKNOWN = 0
    SERVING = 1
    NOT_SERVING = 2
