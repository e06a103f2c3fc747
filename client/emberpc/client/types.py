"""Arguments and results of the clients: frozen dataclasses of plain Python values."""

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

#: Vectors: float32, shape (rows, dimensions), one vector in each row.
Matrix: TypeAlias = npt.NDArray[np.float32]
#: One vector: float32, shape (dimensions,).
Vector: TypeAlias = npt.NDArray[np.float32]

#: Purpose of a text. It decides which prompt of the model the server puts before the text.
InputKind: TypeAlias = Literal["passage", "query"]
#: Treatment of a text with more tokens than the model reads. `refuse`: the text fails. `end`: tokens at the end of the
#: text are removed. `start`: tokens at the start are removed.
Truncation: TypeAlias = Literal["refuse", "end", "start"]
#: Element type of vectors in responses: 4, 2 or 1 bytes for each dimension, or 1 bit (`binary`). Smaller types are less
#: exact. The client converts all of them to float32.
DType: TypeAlias = Literal["float32", "float16", "int8", "binary"]
#: The measure that compares two vectors.
Distance: TypeAlias = Literal["cosine", "dot_product", "euclidean"]
#: Mode of a search: by vectors, by words, or both.
SearchMode: TypeAlias = Literal["dense", "lexical", "hybrid"]
#: How a hybrid search joins its dense and its lexical ranking: by scaled scores, or by reciprocal ranks.
Fusion: TypeAlias = Literal["scores", "ranks"]
#: Urgency of a call. `interactive`: a caller waits for the response. `bulk`: throughput matters, latency does not.
Priority: TypeAlias = Literal["interactive", "bulk"]

#: A caller's function that the client calls with the number of items done so far.
Progress: TypeAlias = Callable[[int], None]
#: A caller's function that the client calls with the number of bytes transferred so far, and the number of all bytes.
ByteProgress: TypeAlias = Callable[[int, int], None]
#: A caller's function that the client calls with the name of each step of loading a model, such as "warming up".
Stages: TypeAlias = Callable[[str], None]

#: One text of a stream, alone or with an id, as (id, text).
StreamItem: TypeAlias = "str | tuple[str, str]"


@dataclass(frozen=True)
class StreamedEmbedding:
    """The result for one text of a stream: a vector or an error."""

    #: The id that the caller gave. For a text without an id: the number of the text in the stream, from "0".
    id: str
    #: The vector, float32 (dimensions,); None if the text failed.
    vector: Vector | None = field(default=None, compare=False)
    #: Why there is no vector: an InputError if the text could not be sent, else the server's error. None: no error.
    error: EmberpcError | InputError | None = None
    #: Number of tokens of the text that the model read; 0 if the text failed.
    tokens: int = 0
    #: Whether the text was truncated.
    truncated: bool = False
    #: The model that answered; None if the text could not be sent.
    model: ModelVersion | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Reembedding:
    """Progress of replacing the vectors of a collection by those of another model."""

    #: Name of the new model.
    model: str
    #: `done`: number of records with new vectors. `total`: number of all records.
    done: int
    total: int
    #: Start of the reembedding, in UTC; None if the server did not state the time.
    start_time: datetime | None
    #: Why the reembedding waits; it continues when the cause is removed. Empty: the reembedding does not wait.
    problem: str


@dataclass(frozen=True)
class Collection:
    """A named set of records with vectors of the same dimensions."""

    name: str
    #: Name of the model that embeds the texts of records; empty: there is no model, and records must have vectors.
    model: str
    model_fingerprint: str
    dimensions: int
    #: The measure that compares vectors: `cosine`, `dot_product` or `euclidean`.
    distance: str
    #: How records whose text has too many tokens are truncated: `refuse`, `end` or `start`.
    truncation: str
    #: The HNSW parameter M: links of a node of the collection's graph, per layer.
    m: int
    #: Number of candidates that an insertion into the collection's HNSW graph keeps.
    ef_construction: int
    record_count: int
    #: Sequence number of the last write of the collection. With Milvus: of the last since the server's start, or 0.
    sequence: int
    #: Size of the collection on disk, in bytes. 0 with Milvus.
    size_bytes: int
    #: Time at which the collection was created, in UTC; None if the server did not state the time.
    create_time: datetime | None
    #: Why the collection cannot be used, for example because it is damaged; its counts are then 0, and `create_time` is
    #: None. Empty: the collection can be used.
    problem: str = ""
    #: Progress of the reembedding of the collection; None: no reembedding runs.
    reembedding: Reembedding | None = None
    #: Metadata fields with an index in the database, which makes filters on them faster. With Milvus without effect.
    indexed_fields: tuple[str, ...] = ()


@dataclass(frozen=True)
class Record:
    """An item of a collection.

    To write a record, give `id`, and `text`, which the server embeds, or `vector`, with or without `text`. You may also
    give `metadata`, `label`, and `time_to_live` if the record shall be deleted after a time. The server sets the other
    fields. Numbers of `metadata` are doubles on the wire: an int beyond 2**53 is refused, and a number without a
    fraction is returned as an int, if within 2**53.
    """

    id: str
    text: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""
    #: The vector, float32, shape (dimensions,). None in a result, unless the call has `with_vectors`. None in a record
    #: to write: the server embeds the text.
    vector: Vector | None = field(default=None, compare=False)
    #: Seconds after which the record is deleted. In a record to write: counted from the write. In a result: counted
    #: from the response. None: the record is not deleted.
    time_to_live: float | None = field(default=None, compare=False)
    #: Set by the server. `revision`: sequence number of the record's last write. `create_time`, `update_time`: times
    #: (UTC) of its first and last write. If both times are set, as in a record of a result, a write ignores the three
    #: fields. Otherwise a write refuses them. See `expected_revisions` of `upsert`.
    revision: int = field(default=0, compare=False)
    create_time: datetime | None = field(default=None, compare=False)
    update_time: datetime | None = field(default=None, compare=False)


@dataclass(frozen=True)
class RecordId:
    """A query for the records nearest to the record with this id, which is itself not among the hits."""

    id: str


#: A query: a text, the id of a record, or a vector of shape (dimensions,).
Query: TypeAlias = "str | RecordId | npt.NDArray[Any] | Sequence[float]"


@dataclass(frozen=True, eq=False)
class SearchQuery:
    """A query of `search_batch` with its own `where`, `top_k` and `ef`; None or 0: those of the `search_batch` call."""

    query: Query
    where: str | pb.Filter | None = None
    top_k: int = 0
    ef: int = 0


@dataclass(frozen=True)
class UpsertResult:
    """The result of an upsert: number of inserted records, number of replaced records, and sequence number.

    `sequence` is the sequence number of the last write of this upsert; 0: there was nothing to write.
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
    """Progress of an `upsert_stream`. `failures`, `inserted`, `updated` are those since the previous checkpoint."""

    #: Number of records, from the start of the stream, that are all on disk or have failed.
    done: int
    failures: tuple[FailedRecord, ...] = ()
    inserted: int = 0
    updated: int = 0
    #: Sequence number of the last write since the previous checkpoint; 0: nothing was written.
    sequence: int = 0
    #: `synced` if the last write was on disk before the response; `unknown` if not stated, or without a write.
    durability: str = field(default="unknown", compare=False)


@dataclass(frozen=True)
class Hit:
    """A record that a search returns, and its score. The hit with the greatest score is nearest to the query."""

    record: Record
    score: float


@dataclass(frozen=True)
class SearchPlan:
    """How a search of one query was carried out."""

    #: `exact`: the query was compared with every vector that matches the filter. `hnsw`: the graph was searched.
    #: `lexical`: the words of the query were looked up. `unknown`: the server stated none of these. A hybrid search
    #: states the strategy of its dense search.
    strategy: str
    #: Number of candidates that the search of the graph kept; 0: the graph was not used.
    ef: int
    #: Number of vectors that were compared with the query one by one, without the graph.
    compared_count: int
    #: Why the query has fewer than `top_k` hits; empty: there are `top_k` hits.
    shortfall_reason: str
    #: Number of hits of the lexical search; a hybrid search joins these with the hits of the dense search. 0 for a
    #: dense search.
    lexical_count: int = 0


@dataclass(frozen=True)
class SearchResult:
    """The result of one query: hits, nearest first, and the plan of the search."""

    hits: tuple[Hit, ...]
    plan: SearchPlan
    #: Whether the text of the query was truncated.
    truncated: bool = False
    #: Number of tokens of the query's text that the model read; 0 if no model read the query.
    tokens: int = field(default=0, compare=False)


@dataclass(frozen=True)
class DuplicatePair:
    """Two records that are near to each other: their ids, and the cosine similarity of their vectors as `score`.

    `first_id` sorts before `second_id`.
    """

    first_id: str
    second_id: str
    score: float


@dataclass(frozen=True)
class Cluster:
    """A group of similar records: the number of its records, and as examples the records nearest to its centre.

    The example nearest to the centre comes first.
    """

    record_count: int
    examples: tuple[Record, ...]


@dataclass(frozen=True)
class RecordProblem:
    """A problem that `verify_collection` found in the record `id`; an empty `id`: in the collection as a whole."""

    id: str
    #: Kind of the problem, for programs, such as `UNREACHABLE`: a search by its own vector does not find the record.
    reason: str
    message: str


@dataclass(frozen=True)
class Verification:
    """The result of `verify_collection`: number of checked records, and the problems that were found."""

    checked: int
    problems: tuple[RecordProblem, ...]

    @property
    def ok(self) -> bool:
        """Whether the verification found no problems."""
        return not self.problems


@dataclass(frozen=True)
class LabelScore:
    """A label, and as `score` the probability, in [0, 1], that the text has the label."""

    label: str
    score: float


@dataclass(frozen=True)
class Classification:
    """The result of classifying one text."""

    #: The predicted label. Multi-label classifier: all labels whose probability is at least their threshold, the most
    #: probable first, without the limit `top_k`. Empty if the text is rejected, or no probability is that great.
    labels: tuple[str, ...]
    #: Labels with their probabilities, the most probable first; at most `top_k` of them.
    scores: tuple[LabelScore, ...]
    #: Whether the text seems to have none of the labels.
    rejected: bool
    #: Number of tokens of the text that the model read.
    tokens: int
    #: Whether the text was truncated.
    truncated: bool

    @property
    def label(self) -> str | None:
        """The predicted label, or the most probable of several predicted labels; None if no label was predicted."""
        return self.labels[0] if self.labels else None


@dataclass(frozen=True)
class Model:
    """A model that a server serves."""

    name: str
    #: `embedding` or `classification`.
    task: str
    #: `loading`, `ready`, `unloading` or `failed`.
    state: str
    base_model: str
    revision: str
    #: Hash (hex) of all bytes that decide the model's vectors.
    fingerprint: str
    #: Hash (hex) of all that decides the labels of a classifier. The hash changes when the classifier is trained again.
    #: Empty: the model is not a classifier.
    classifier_fingerprint: str
    dimensions: int
    matryoshka_dimensions: tuple[int, ...]
    pooling: str
    normalized: bool
    #: The most tokens of a text that the model reads, special tokens and prompt included.
    max_tokens: int
    query_prompt: str
    passage_prompt: str
    #: Labels of a classifier, in the order of the model's outputs; empty for an embedding model.
    labels: tuple[str, ...]
    multi_label: bool
    #: The ONNX file of the bundle that the server serves, such as `fp32`.
    variant: str
    size_bytes: int
    load_time: datetime | None
    #: Quality measured at export, by name of the figure, such as `accuracy` or `parity.cosine_min`.
    quality: Mapping[str, float]


@dataclass(frozen=True)
class ClassifierLabel:
    """A label of a classifier, and its description."""

    name: str
    #: Description in words of the texts that have the label; empty if the classifier has none for this label.
    description: str


@dataclass(frozen=True)
class Classifier:
    """A classifier that a server serves, with the values that decide which labels a text gets."""

    name: str
    #: `fine_tuned`: a model that was made offline, by an export or another tool. `examples`: made from the records of a
    #: collection.
    kind: str
    #: The model that the classifier runs.
    model: ModelVersion
    #: Labels of the classifier, in the order of the model's outputs.
    labels: tuple[ClassifierLabel, ...]
    #: Whether a text may have several labels, or none.
    multi_label: bool
    #: Thresholds of a multi-label classifier, in the order of `labels`: a text gets a label if the probability is at
    #: least the threshold. Empty for a single-label classifier, which gives the most probable label.
    thresholds: tuple[float, ...]
    #: Number that the logits are divided by before they become probabilities.
    temperature: float
    #: Least value of a text's best logit, before the division by the temperature. A text below this threshold is
    #: rejected. None: no text is rejected.
    rejection_threshold: float | None
    #: Fine-tuned classifier: name of the base model, and strategy of the export; empty if the bundle states neither.
    base_model: str
    fine_tuning_strategy: str
    #: The most tokens of a text that the model reads, special tokens and prompt included.
    max_tokens: int
    #: Classifier made from examples: name of its collection, strategy, and number of examples. Empty and 0 for a
    #: fine-tuned classifier.
    collection: str
    strategy: str
    example_count: int
    #: Time (UTC) at which a classifier made from examples was fitted, or a fine-tuned one was exported; None: unknown.
    fit_time: datetime | None
    #: Quality measured on held-out data, by name of the figure, such as `accuracy` or `ece`.
    quality: Mapping[str, float]


@dataclass(frozen=True)
class ServerInfo:
    """Version, limits and features of a server."""

    #: Version of emberpc.
    version: str
    #: The largest values that the server accepts, by field name of `ServerLimits` in server.proto, such as `max_texts`.
    limits: Mapping[str, int]
    #: Optional features that the server has, such as `model_admin` or `index_backend:embedded`.
    features: tuple[str, ...]


class Health(Enum):
    """Whether a server accepts calls. The values are those of grpc.health.v1; any other status becomes UNKNOWN."""

    UNKNOWN = 0
    SERVING = 1
    NOT_SERVING = 2
