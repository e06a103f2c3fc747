"""Types of the arguments and results of the clients: type aliases, frozen dataclasses, and the enum `Health`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from emberpc.client.classification import (  # noqa: F401  # users may import them from here, as before
    Classification,
    Classifier,
    ClassifierLabel,
    LabelScore,
)
from emberpc.client.details import ModelVersion
from emberpc.client.exceptions import EmberpcError, InputError, InputTypeError
from emberpc.v1 import filter_pb2 as pb

#: Vectors: float32, shape (rows, dimensions), one vector in each row.
Matrix: TypeAlias = npt.NDArray[np.float32]
#: One vector: float32, shape (dimensions,).
Vector: TypeAlias = npt.NDArray[np.float32]

#: Purpose of a text: a query searches, a passage is stored or compared. The purpose decides which prompt is added.
InputKind: TypeAlias = Literal["passage", "query"]
#: Treatment of a text with more tokens than the model reads. `refuse`: the call fails; in a stream, the text alone.
#: `end`: tokens at the end of the text are removed. `start`: tokens at its start are removed, but the prompt is kept.
Truncation: TypeAlias = Literal["refuse", "end", "start"]
#: Element type of vectors in responses: 4, 2 or 1 bytes for each dimension, or 1 bit (`binary`). Smaller types are less
#: exact. The client converts all of them to float32; each bit of `binary` becomes -1 or 1.
DType: TypeAlias = Literal["float32", "float16", "int8", "binary"]
#: The measure that compares two vectors.
Distance: TypeAlias = Literal["cosine", "dot_product", "euclidean"]
#: Mode of a search. `dense`: by vectors. `lexical`: by words. `hybrid`: both, with the two rankings joined.
SearchMode: TypeAlias = Literal["dense", "lexical", "hybrid"]
#: How a hybrid search joins its dense and its lexical ranking. `bounds`: by the weighted sum of both scores, each
#: scaled so that the greatest possible one is 1. `scores`: the same, scaled so that the best of the ranking is 1.
#: `ranks`: by the weighted sum of 1 / (60 + rank) in both; the best rank is 1.
Fusion: TypeAlias = Literal["bounds", "scores", "ranks"]
#: Urgency of a call. `interactive`: a caller waits for the response. `bulk`: interactive calls may go first.
Priority: TypeAlias = Literal["interactive", "bulk"]

#: A function that is called repeatedly with the number of texts or records done so far.
Progress: TypeAlias = Callable[[int], None]
#: A caller's function that the client calls with the bytes of a backup transferred so far, and the bytes of the whole.
ByteProgress: TypeAlias = Callable[[int, int], None]
#: A caller's function that the client calls with the name of each step of loading a model; the last is "ready".
Stages: TypeAlias = Callable[[str], None]

#: One text for `embed_stream`, alone or with the caller's id, as (id, text).
StreamItem: TypeAlias = "str | tuple[str, str]"


@dataclass(frozen=True)
class StreamedEmbedding:
    """The result for one text of `embed_stream`: a vector or an error."""

    #: The id that the caller gave. For a text without an id: its number among all texts of the stream, from "0".
    id: str
    #: The vector, float32 (dimensions,); None if the text failed.
    vector: Vector | None = field(default=None, compare=False)
    #: Why there is no vector: an InputError if the text could not be sent, else the server's error. None: no error.
    error: EmberpcError | InputError | None = None
    #: Number of tokens that the model read, special tokens and prompt included; 0 if the text failed.
    tokens: int = 0
    #: Whether the text was truncated.
    truncated: bool = False
    #: The model that answered, with a vector or with an error; None if the text could not be sent.
    model: ModelVersion | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Reembedding:
    """Progress of replacing the vectors of a collection by new ones of another model, or of other dimensions."""

    #: Name of the new model.
    model: str
    #: `done`: number of records with new vectors, approximate if records change meanwhile. `total`: of all records.
    done: int
    total: int
    #: Start of the reembedding, in UTC; None if the server did not state the time.
    start_time: datetime | None
    #: Why the reembedding cannot end now; the server tries again until the cause is removed. Empty: no known problem.
    problem: str


@dataclass(frozen=True)
class Collection:
    """A named set of records with vectors of the same dimensions."""

    name: str
    #: Name of the model that embeds texts of records and queries; empty: no model, and records must have vectors.
    model: str
    model_fingerprint: str
    dimensions: int
    #: The measure that compares vectors: `cosine`, `dot_product` or `euclidean`.
    distance: str
    #: Treatment of record texts with too many tokens, unless an upsert states another: `refuse`, `end` or `start`.
    truncation: str
    #: The HNSW parameter M: maximum number of links of a node in a layer of the graph; twice as many in the lowest
    #: layer.
    m: int
    #: Number of candidate neighbours that an insertion into the graph keeps.
    ef_construction: int
    record_count: int
    #: Sequence number of the last write of records; 0: none so far, or with Milvus none since the server's start.
    sequence: int
    #: Bytes of the collection on disk, without the new vectors of a reembedding. 0 with Milvus.
    size_bytes: int
    #: Time of creation, in UTC; of a restored collection, the time in the backup. None: the server did not state it.
    create_time: datetime | None
    #: Why the collection cannot be used, for example because it is damaged. Only `Client.collections` states this. Then
    #: `record_count`, `sequence` and `size_bytes` are 0, `create_time` and `reembedding` None, and settings may be
    #: defaults. Empty: no problem was found.
    problem: str = ""
    #: Progress of the reembedding of the collection; None: there is no unfinished reembedding.
    reembedding: Reembedding | None = None
    #: Metadata fields with an index in the database, which makes filters on them faster. With Milvus, they have none.
    indexed_fields: tuple[str, ...] = ()


@dataclass(frozen=True)
class Record:
    """An item of a collection.

    To write a record, give `id`, and `text`, which the server embeds, or `vector`, with or without `text`. You may also
    give `metadata`, `label`, and `time_to_live` if the record shall be deleted after a time. The server sets the other
    fields. Numbers of `metadata` are doubles on the wire: an int beyond 2**53, either sign, is refused. A number
    without a fraction is returned as an int if it is within 2**53, else as a float.
    """

    id: str
    text: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""
    #: The vector, float32, shape (dimensions,). None in a result, unless the call has `with_vectors`. None in a record
    #: to write: the server embeds the text, unless `upsert` gets `vectors`.
    vector: Vector | None = field(default=None, compare=False)
    #: Seconds after which the record is deleted, more than 0. In a record to write: counted from the write. In a
    #: result: counted from the response. None: the record is kept; a write with None removes an earlier time to live.
    time_to_live: float | None = field(default=None, compare=False)
    #: Set by the server. `revision`: sequence number of the record's last write, see `expected_revisions` of `upsert`.
    #: `create_time`, `update_time`: times (UTC) of its insertion and of its last write. In a record to write, the three
    #: fields are ignored if both times are set, as in a result. Otherwise a record with one of them is refused.
    revision: int = field(default=0, compare=False)
    create_time: datetime | None = field(default=None, compare=False)
    update_time: datetime | None = field(default=None, compare=False)


@dataclass(frozen=True)
class RecordId:
    """A query by the vector of the record `id`, only in `dense` mode. The record itself is not among the hits."""

    id: str


#: A query: a text, the id of a record, or a vector of shape (dimensions,). `lexical` and `hybrid` need a text.
Query: TypeAlias = "str | RecordId | npt.NDArray[Any] | Sequence[float]"


@dataclass(frozen=True, eq=False)
class SearchQuery:
    """A query of `search_batch` with options of its own. `where` and `top_k` None, `ef` 0: the value of that call."""

    query: Query
    where: str | pb.Filter | None = None
    #: Maximum number of hits of this query, at least 1.
    top_k: int | None = None
    ef: int = 0


@dataclass(frozen=True)
class UpsertResult:
    """The result of an upsert: numbers of `inserted` records and of `updated` (replaced) records.

    `sequence` is the sequence number of the last write of this upsert; 0: there were no records.
    """

    inserted: int
    updated: int
    sequence: int


@dataclass(frozen=True)
class FailedRecord:
    """A record of an `upsert_stream` that was not written, and the error."""

    #: Index of the record among all records of the stream, from 0.
    index: int
    id: str
    #: An InputError or InputTypeError if the record could not be sent, else the server's error.
    error: EmberpcError | InputError | InputTypeError


@dataclass(frozen=True)
class UpsertCheckpoint:
    """Progress of an `upsert_stream`. All fields but `done` are only about the time since the previous checkpoint."""

    #: Number of records, from the start of the stream, that are all written or have failed.
    done: int
    failures: tuple[FailedRecord, ...] = ()
    inserted: int = 0
    updated: int = 0
    #: Sequence number of the write; 0: nothing was written.
    sequence: int = 0
    #: `synced` if the write was on disk before the response; `unknown` without a write, or with Milvus.
    durability: str = field(default="unknown", compare=False)


@dataclass(frozen=True)
class Hit:
    """A record that a search returns. A greater `score` is nearer; its scale depends on search mode and distance."""

    record: Record
    score: float


@dataclass(frozen=True)
class SearchPlan:
    """How a search of one query was carried out."""

    #: `exact`: the query was compared with the vectors of all undamaged records that match the filter. `hnsw`: the
    #: graph was searched, and vectors not in the graph yet were compared; with Milvus: Milvus searched. `lexical`: the
    #: words of the query were looked up. `unknown`: another strategy. A hybrid search states that of its dense search.
    strategy: str
    #: Number of candidates that the (last) search of the graph kept; 0: the graph was not used.
    ef: int
    #: Number of vectors that were compared one by one. `hnsw`: those not in the graph yet; 0 with Milvus. `lexical`: 0.
    compared_count: int
    #: Why the query has fewer than `top_k` hits; empty: there are `top_k` hits.
    shortfall_reason: str
    #: Number of hits of the lexical search, in a hybrid search before the rankings are joined. 0 for a dense search.
    lexical_count: int = 0


@dataclass(frozen=True)
class SearchResult:
    """The result of one query: hits, nearest first, and the plan of the search."""

    hits: tuple[Hit, ...]
    plan: SearchPlan
    #: Whether the text of the query was truncated; False if no model read the query.
    truncated: bool = False
    #: Number of tokens of the query's text that the model read; 0 if no model read the query.
    tokens: int = field(default=0, compare=False)


@dataclass(frozen=True)
class DuplicatePair:
    """The ids of two records, the lesser in byte order first, and the cosine similarity of their vectors as `score`."""

    first_id: str
    second_id: str
    score: float


@dataclass(frozen=True)
class Cluster:
    """A group of records with similar vectors. `examples` are the records nearest to its centre, nearest first."""

    record_count: int
    examples: tuple[Record, ...]


@dataclass(frozen=True)
class RecordProblem:
    """A problem that `verify_collection` found in the record `id`; an empty `id`: in the collection as a whole."""

    id: str
    #: Kind of the problem, for programs, such as `UNREACHABLE`: a search by the record's own vector missed the record.
    reason: str
    message: str


@dataclass(frozen=True)
class Verification:
    """The result of `verify_collection`: number of checked records, and all problems, repaired ones included."""

    checked: int
    problems: tuple[RecordProblem, ...]

    @property
    def ok(self) -> bool:
        """Whether the verification found no problems."""
        return not self.problems


@dataclass(frozen=True)
class Model:
    """A model that a server serves: an embedding model or a classifier."""

    name: str
    #: `embedding` or `classification`.
    task: str
    #: `ready`. The API also has `loading`, `unloading` and `failed`, which no server states in a result so far.
    state: str
    base_model: str
    revision: str
    #: Hash (hex) of all bytes that decide the model's vectors, except `max_tokens`. Of a classifier: of its encoder
    #: alone if the bundle has the head in a file of its own, else of the encoder with the head.
    fingerprint: str
    #: Hash (hex) of all that decides the labels of a classifier, such as encoder, head, labels and thresholds. Empty:
    #: the model is not a classifier.
    classifier_fingerprint: str
    dimensions: int
    matryoshka_dimensions: tuple[int, ...]
    pooling: str
    normalized: bool
    #: Maximum number of tokens of a text that the model reads, special tokens and prompt included.
    max_tokens: int
    query_prompt: str
    passage_prompt: str
    #: Labels of a classifier, in the order of its logits; empty for an embedding model.
    labels: tuple[str, ...]
    multi_label: bool
    #: Name of the served variant: one of the bundle's ONNX files, such as `fp32`; `onnx` for a foreign folder.
    variant: str
    size_bytes: int
    load_time: datetime | None
    #: Figures of the export by name: quality, such as `accuracy`, and others, such as `train_texts`. May be empty.
    quality: Mapping[str, float]
    #: Library that runs the model: `onnxruntime` or `openvino`. Empty: an older server, which has ONNX Runtime only.
    engine: str = ""
    #: Precision of the model's matrix products: `fp32` or `bf16`. Empty: an older server.
    precision: str = ""
    #: Why this engine and this precision run the model, for people to read. Empty: an older server.
    engine_reason: str = ""


@dataclass(frozen=True)
class ServerInfo:
    """Version, limits and features of a server."""

    #: Version of emberpc that the server runs.
    version: str
    #: Limits of calls, by field name of `ServerLimits` in server.proto, such as `max_texts`; a value equal to the limit
    #: is allowed. 0: an older server, which does not state this limit.
    limits: Mapping[str, int]
    #: Optional features that the server has, such as `model_admin` or `index_backend:embedded`.
    features: tuple[str, ...]


class Health(Enum):
    """Whether a server accepts calls. The values are those of grpc.health.v1; the client returns others as UNKNOWN."""

    UNKNOWN = 0
    SERVING = 1
    NOT_SERVING = 2
