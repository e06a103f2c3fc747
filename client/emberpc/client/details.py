"""Model, times, tokens and write receipt that a response states beside its result.

Methods of the clients that have a parameter `details` call the function given there with a `ResponseDetails` for each
response.
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
    #: Revision of the model that was exported, such as a Git commit; for a fine-tuned model, from before fine-tuning.
    revision: str
    #: Hash (hex) of all bytes that decide the model's vectors, except `max_tokens`. Equal fingerprints mean equal
    #: vectors of texts that are not truncated, up to rounding.
    fingerprint: str
    #: Hash (hex) of all that decides the labels of a classifier: encoder, head, labels, thresholds, temperature,
    #: rejection threshold and `max_tokens`. Empty: the model is not a classifier.
    classifier_fingerprint: str = ""


@dataclass(frozen=True)
class TokenUsage:
    """Number of tokens of one text, and whether the text was truncated."""

    #: Number of tokens that the model read, after truncation, special tokens and prompt included.
    tokens: int
    #: Whether the text was truncated.
    truncated: bool


@dataclass(frozen=True)
class Timings:
    """Wall time of the steps of one request on the server, in seconds.

    The first three times are 0 if the server had cached the outputs for all texts, or no text needed a model. Each of
    them for `similarity` is the longer of the times of sources and targets.
    """

    #: Time of tokenizing the texts, with the wait for a turn and a thread.
    tokenize_seconds: float
    #: Time in the queue until the first micro-batch started, and of waiting for other requests that ran the same texts.
    queue_seconds: float
    #: Time from the start of the first micro-batch to the end of the last; 0 if other requests ran all texts.
    infer_seconds: float
    #: Time of the search in the index, with the wait for a thread and the reading of the hits; 0 without a search.
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
    #: The model that answered; for `count_tokens`, the model whose tokenizer counted. None if the request needed no
    #: model. Also None for `upsert`: its response does not state the model, which is that of the collection.
    model: ModelVersion | None = None
    #: Times of the steps. None for `count_tokens`, `get` and `delete`, whose responses do not state times, and for an
    #: `upsert` of which the server embedded no text.
    timings: Timings | None = None
    #: Tokens of the texts: item i belongs to item `first + i` of the caller's list. `similarity`: first the tokens of
    #: the sources, then those of the targets. `search_batch`: a query that is no text has 0 tokens.
    #: Texts whose results the server had cached are included. Empty for `count_tokens`, `get` and `delete`, and if the
    #: request had no text to embed.
    usages: tuple[TokenUsage, ...] = ()
    #: `count_tokens`: maximum number of tokens of a text that the model reads. 0 for other methods.
    max_tokens: int = 0
    #: `get`: ids of the request that have no record, in the order of the request. Empty for other methods.
    missing_ids: tuple[str, ...] = ()
    #: `upsert` and `delete`: sequence number of the write in its collection. If nothing was deleted: that of the last
    #: write; 0 if there was none. 0 for other methods.
    sequence: int = 0
    #: `upsert` and `delete`: `synced` if the write was on disk before the response. `unknown` if the server did not
    #: state that, and for other methods.
    durability: str = "unknown"


#: A caller's function that the client calls with the details of each response, in the order of the caller's items.
Details: TypeAlias = Callable[[ResponseDetails], None]
