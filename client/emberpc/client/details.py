"""Model, times, tokens and write receipt that a response states beside its result.

Methods of the clients that have a parameter `details` call this function with a `ResponseDetails` for each response.
"""

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
    #: Hash (hex) of all bytes that decide the model's vectors. Equal fingerprints mean equal vectors, up to rounding.
    fingerprint: str
    #: Hash (hex) of all that decides the labels of a classifier: encoder, head, labels, thresholds, temperature,
    #: rejection threshold and `max_tokens`. Training the classifier again on the same encoder changes this hash, but
    #: not `fingerprint`. Empty: the model is not a classifier.
    classifier_fingerprint: str = ""


@dataclass(frozen=True)
class TokenUsage:
    """Number of tokens of one text, and whether the text was truncated."""

    #: Number of tokens that the model read, special tokens and prompt included.
    tokens: int
    #: Whether the text was truncated.
    truncated: bool


@dataclass(frozen=True)
class Timings:
    """Wall time of the steps of one request on the server, in seconds.

    If parts of a step run in parallel, the time is from the first start to the last end.
    """

    tokenize_seconds: float
    #: Time that the texts waited for a free worker, a thread that runs the model.
    queue_seconds: float
    #: Time in which the model ran.
    infer_seconds: float
    #: Time of searching the index and reading records; 0 if the request needs neither.
    lookup_seconds: float


@dataclass(frozen=True)
class ResponseDetails:
    """Values that the response to one request states beside the result.

    A value that the response does not state keeps its default.
    """

    #: Index of the request's first item in the list that the caller gave to the method, from 0.
    first: int
    #: Number of items of the request; 1 for `similarity` and for `delete` with a filter.
    count: int
    #: The model that answered; for `count_tokens`, the model whose tokenizer counted. None if the call needed no model.
    #: Also None for `upsert`: its response does not state the model, which is that of the collection.
    model: ModelVersion | None = None
    #: Times of the steps. None for `count_tokens`, `get` and `delete`, whose responses do not state times, and for an
    #: `upsert` of which the server embedded no text.
    timings: Timings | None = None
    #: Tokens of the texts: item i belongs to item `first + i` of the caller's list. `similarity`: first the tokens of
    #: the sources, then those of the targets. `search` and `search_batch`: a query that is no text has 0 tokens.
    #: Texts whose results the server had cached are included. Empty for `count_tokens`, `get` and `delete`, and if the
    #: request had no text to embed.
    usages: tuple[TokenUsage, ...] = ()
    #: `count_tokens`: the most tokens of a text that the model reads. 0 for other methods.
    max_tokens: int = 0
    #: `get`: ids of the request that have no record. Empty for other methods.
    missing_ids: tuple[str, ...] = ()
    #: `upsert` and `delete`: sequence number of the write in its collection; if nothing was deleted, that of the last
    #: write before. 0 for other methods.
    sequence: int = 0
    #: `upsert` and `delete`: `synced` if the write was on disk before the response. `unknown` if the server did not
    #: state that, and for other methods.
    durability: str = "unknown"


#: Called with the details of each response, in the order of the caller's items.
Details: TypeAlias = Callable[[ResponseDetails], None]
