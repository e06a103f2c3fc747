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

#: float32, shape (rows, dimensions).
Matrix: TypeAlias = npt.NDArray[np.float32]
#: float32, shape (dimensions,).
Vector: TypeAlias = npt.NDArray[np.float32]

#: Purpose of a text. It decides which prompt of the model the server puts before the text.
InputKind: TypeAlias = Literal["passage", "query"]
#: How a text with more tokens than the model reads is truncated: `refuse` fails, `end` removes tokens from its end,
#: `start` from its start.
Truncation: TypeAlias = Literal["refuse", "end", "start"]
#: Element type of vectors on the wire. Smaller types are less exact. The client always returns float32.
DType: TypeAlias = Literal["float32", "float16", "int8", "binary"]
#: The measure that compares two vectors.
Distance: TypeAlias = Literal["cosine", "dot_product", "euclidean"]
#: Mode of a search: by vectors, by words, or both.
SearchMode: TypeAlias = Literal["dense", "lexical", "hybrid"]
#: How a hybrid search joins its two rankings: by scaled scores, or by reciprocal ranks.
Fusion: TypeAlias = Literal["scores", "ranks"]
#: `interactive`: a caller waits. `bulk`: throughput matters, latency does not.
Priority: TypeAlias = Literal["interactive", "bulk"]

#: Called with the number of items that are done.
Progress: TypeAlias = Callable[[int], None]
#: Called with the number of bytes that are done, and the number of all bytes.
ByteProgress: TypeAlias = Callable[[int, int], None]
#: Called with each step of a server that changes its models.
Stages: TypeAlias = Callable[[str], None]

#: One text of a stream, alone or with an id, as (id, text).
StreamItem: TypeAlias = "str | tuple[str, str]"


@dataclass(frozen=True)
class StreamedEmbedding:
    """The result for one text of a stream: a vector or an error."""

    #: The caller's id; of a text without an id its number in the stream, from "0".
    id: str
    #: float32 (dimensions,).
    vector: Vector | None = field(default=None, compare=False)
    #: Why there is no vector: an InputError if the text could not be sent, else the server's error.
    error: EmberpcError | InputError | None = None
    #: Tokens that the model read.
    tokens: int = 0
    #: Whether the text was truncated.
    truncated: bool = False
    #: The model that answered; None if the text could not be sent.
    model: ModelVersion | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Reembedding:
    """Progress of replacing the vectors of a collection by those of another model."""

    #: The new model.
    model: str
    #: Records with new vectors, and all records.
    done: int
    total: int
    #: In UTC; None if the server did not state it.
    start_time: datetime | None
    #: Why the reembedding waits. It continues when the cause is removed. Empty: it does not wait.
    problem: str


@dataclass(frozen=True)
class Collection:
    """A named set of records with vectors of the same dimensions."""

    name: str
    #: The embedding model of its texts; empty: records must have vectors.
    model: str
    model_fingerprint: str
    dimensions: int
    #: `cosine`, `dot_product` or `euclidean`.
    distance: str
    #: `refuse`, `end` or `start`.
    truncation: str
    #: Links of a node of its graph, per layer.
    m: int
    #: Candidates that an insertion into the graph keeps.
    ef_construction: int
    record_count: int
    #: Sequence number of its last write.
    sequence: int
    #: Bytes on disk.
    size_bytes: int
    #: In UTC; None if the server did not state it.
    create_time: datetime | None
    #: Why it cannot be used, for example because it is damaged; empty: it can be used.
    problem: str = ""
    #: Its reembedding, if one runs.
    reembedding: Reembedding | None = None
    #: Metadata fields that filters use often.
    indexed_fields: tuple[str, ...] = ()


@dataclass(frozen=True)
class Record:
    """An item of a collection.

    To write a record, give the first four fields, `vector` if the server shall not embed the text, and `time_to_live`
    if the record shall be deleted after a time. The server sets the other fields. Numbers of `metadata` are doubles on
    the wire; a number without a fraction is returned as an int.
    """

    id: str
    text: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""
    #: float32, shape (dimensions,). In a result None, unless the call has `with_vectors`.
    vector: Vector | None = field(default=None, compare=False)
    #: Seconds after which the record is deleted: when writing counted from the write, in a result from then. None: it
    #: is not deleted.
    time_to_live: float | None = field(default=None, compare=False)
    #: Sequence number of the last write of the record. The server sets it and the two times. A write ignores them in a
    #: record of a result, and refuses them in any other record. See `expected_revisions` of `Client.upsert`.
    revision: int = field(default=0, compare=False)
    create_time: datetime | None = field(default=None, compare=False)
    update_time: datetime | None = field(default=None, compare=False)


@dataclass(frozen=True)
class RecordId:
    """A query for the neighbours of a record. The record itself is not among the hits."""

    id: str


#: A text, a vector (dimensions,) or a record.
Query: TypeAlias = "str | RecordId | npt.NDArray[Any] | Sequence[float]"


@dataclass(frozen=True, eq=False)
class SearchQuery:
    """A query of `search_batch` with its own options. Options that are not set are those of the call."""

    query: Query
    where: str | pb.Filter | None = None
    top_k: int = 0
    ef: int = 0


@dataclass(frozen=True)
class UpsertResult:
    """The result of an upsert. `sequence` is the sequence number of the last write; 0: there was nothing to write."""

    inserted: int
    updated: int
    sequence: int


@dataclass(frozen=True)
class FailedRecord:
    """A record of a stream that was not written, and the error."""

    #: Its index among the records, from 0.
    index: int
    id: str
    #: An InputError or InputTypeError if the record could not be sent, else the server's error.
    error: EmberpcError | InputError | InputTypeError


@dataclass(frozen=True)
class UpsertCheckpoint:
    """Progress of a stream of records. `failures`, `inserted` and `updated` are those since the checkpoint before."""

    #: Number of the first records that are all on disk, except for those that failed.
    done: int
    failures: tuple[FailedRecord, ...] = ()
    inserted: int = 0
    updated: int = 0
    #: Sequence number of the last write; 0: nothing was written.
    sequence: int = 0
    #: `synced` if that write was on disk before the response, else `unknown`.
    durability: str = field(default="unknown", compare=False)


@dataclass(frozen=True)
class Hit:
    """A record that a search returns. A greater score is nearer."""

    record: Record
    score: float


@dataclass(frozen=True)
class SearchPlan:
    """How a search of one query was carried out."""

    #: `exact`: every vector was compared; `hnsw`: the graph was searched; `lexical`: the words were looked up.
    strategy: str
    #: Candidates that the search of the graph kept; 0: the graph was not used.
    ef: int
    #: Vectors compared one by one.
    compared_count: int
    #: Why there are fewer than `top_k` hits; empty: there are `top_k` hits.
    shortfall_reason: str
    #: Number of lexical hits. A hybrid search joins them with the dense hits.
    lexical_count: int = 0


@dataclass(frozen=True)
class SearchResult:
    """The result of one query: hits, nearest first, and the plan of the search."""

    hits: tuple[Hit, ...]
    plan: SearchPlan
    #: Whether the text of the query was truncated.
    truncated: bool = False
    #: Tokens of the text of the query; 0 if no model read it.
    tokens: int = field(default=0, compare=False)


@dataclass(frozen=True)
class DuplicatePair:
    """Ids of two records that are near to each other, the lesser first, and the cosine similarity of their vectors."""

    first_id: str
    second_id: str
    score: float


@dataclass(frozen=True)
class Cluster:
    """A cluster: its number of records, and the records nearest to its centre, nearest first."""

    record_count: int
    examples: tuple[Record, ...]


@dataclass(frozen=True)
class RecordProblem:
    """A problem that `verify_collection` found in a record; an empty `id`: in the whole collection."""

    id: str
    #: Cause for programs, such as `UNREACHABLE`.
    reason: str
    message: str


@dataclass(frozen=True)
class Verification:
    """The result of `verify_collection`: number of checked records, and problems."""

    checked: int
    problems: tuple[RecordProblem, ...]

    @property
    def ok(self) -> bool:
        """Whether there are no problems."""
        return not self.problems


@dataclass(frozen=True)
class LabelScore:
    """A label with its probability, in [0, 1]."""

    label: str
    score: float


@dataclass(frozen=True)
class Classification:
    """The result of classifying one text."""

    #: The predicted label; of a multi-label classifier all predicted labels; empty if `rejected`.
    labels: tuple[str, ...]
    #: Best first, at most `top_k`.
    scores: tuple[LabelScore, ...]
    #: Whether the text seems to have none of the labels.
    rejected: bool
    #: Tokens that the model read.
    tokens: int
    #: Whether the text was truncated.
    truncated: bool

    @property
    def label(self) -> str | None:
        """The predicted label; of several the best one; None if there is none."""
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
    #: Hash (hex) of all bytes that decide its vectors.
    fingerprint: str
    #: Classifier: hash (hex) of all that decides its labels; it changes when the classifier is trained again.
    classifier_fingerprint: str
    dimensions: int
    matryoshka_dimensions: tuple[int, ...]
    pooling: str
    normalized: bool
    #: The most tokens of a text, special tokens and prompt included.
    max_tokens: int
    query_prompt: str
    passage_prompt: str
    #: Classifier: its labels, in the order of its scores.
    labels: tuple[str, ...]
    multi_label: bool
    #: The variant that is served, such as `fp32`.
    variant: str
    size_bytes: int
    load_time: datetime | None
    #: Quality measured at export, such as `accuracy`.
    quality: Mapping[str, float]


@dataclass(frozen=True)
class ClassifierLabel:
    """A label of a classifier."""

    name: str
    #: Texts that have the label, described in words; empty if the classifier has no description.
    description: str


@dataclass(frozen=True)
class Classifier:
    """A classifier that a server serves, and how it decides."""

    name: str
    #: `fine_tuned`: a model that was fine-tuned at export; `examples`: made from the records of a collection.
    kind: str
    #: The model that it runs.
    model: ModelVersion
    #: Its labels, in the order of its scores.
    labels: tuple[ClassifierLabel, ...]
    #: Whether a text may have several labels.
    multi_label: bool
    #: Multi-label: least probability of each label, in the order of `labels`; empty for a single-label classifier.
    thresholds: tuple[float, ...]
    #: The logits are divided by this before they become probabilities.
    temperature: float
    #: A text is rejected if its best logit, before the division, is below this; None: no text is rejected.
    rejection_threshold: float | None
    #: Fine-tuned: base model and strategy of the export; empty if the bundle does not state them.
    base_model: str
    fine_tuning_strategy: str
    #: The most tokens of a text, special tokens and prompt included.
    max_tokens: int
    #: Made from examples: the collection, the strategy and the number of examples.
    collection: str
    strategy: str
    example_count: int
    #: Time of the last fit or of the export; None if it is unknown.
    fit_time: datetime | None
    #: Quality measured on held-out data, such as `accuracy` or `ece`.
    quality: Mapping[str, float]


@dataclass(frozen=True)
class ServerInfo:
    """A server's version, limits and features."""

    #: Version of emberpc.
    version: str
    #: The largest values that the server accepts, by field name of `ServerLimits` in server.proto, such as `max_texts`.
    limits: Mapping[str, int]
    #: Optional features, such as `model_admin`.
    features: tuple[str, ...]


class Health(Enum):
    """Whether a server accepts calls. The values are those of grpc.health.v1."""

    UNKNOWN = 0
    SERVING = 1
    NOT_SERVING = 2
