"""What a response states beside its result; methods of the clients report it with their parameter `details`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class ModelVersion:
    """The model that answered a request."""

    #: Name under which the server serves the model.
    name: str
    #: Revision of the weights, as the bundle states it.
    revision: str
    #: Hash (hex) of all bytes that decide the model's vectors. Equal fingerprints mean equal vectors.
    fingerprint: str
    #: Classifier: hash (hex) of all that decides its labels: encoder, head, labels, thresholds, temperature, rejection.
    #: It changes when the classifier is trained again on the same encoder; `fingerprint` does not. Else empty.
    classifier_fingerprint: str = ""


@dataclass(frozen=True)
class TokenUsage:
    """The tokens of one text."""

    #: Tokens that the model read, special tokens and prompt included.
    tokens: int
    #: Whether the text was truncated.
    truncated: bool


@dataclass(frozen=True)
class Timings:
    """Wall time of the steps of a request on the server, in seconds."""

    tokenize_seconds: float
    #: Waiting for a free worker.
    queue_seconds: float
    #: Running the model.
    infer_seconds: float
    #: Searching the index and reading records.
    lookup_seconds: float


@dataclass(frozen=True)
class ResponseDetails:
    """What the response to one request states beside the result. Values that it does not state have their defaults."""

    #: Index of the request's first item in the list of the method call.
    first: int
    #: Number of items of the request.
    count: int
    #: The model that answered. None if no model ran. Also None for `upsert`: its response does not state the model,
    #: which is that of the collection.
    model: ModelVersion | None = None
    #: None for `count_tokens`, `get` and `delete`.
    timings: Timings | None = None
    #: Item i belongs to item `first + i` of the list. Of `similarity`: those of the sources, then of the targets. Of
    #: `search` and `search_batch`: those of the queries; 0 tokens for a query that is no text. Empty if the server
    #: embedded no texts.
    usages: tuple[TokenUsage, ...] = ()
    #: `count_tokens`: the most tokens that the model reads.
    max_tokens: int = 0
    #: `get`: ids without a record.
    missing_ids: tuple[str, ...] = ()
    #: `upsert` and `delete`: sequence number of the write.
    sequence: int = 0
    #: `upsert` and `delete`: `synced` if the write was on disk before the response, else `unknown`.
    durability: str = "unknown"


#: Called with the details of each response, in the order of the caller's items.
Details: TypeAlias = Callable[[ResponseDetails], None]
