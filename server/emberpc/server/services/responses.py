"""Build parts that several responses have: pages of models, model versions, token usages, timings, write receipts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from emberpc.server.collections import WriteResult
from emberpc.server.engine import Inference, Model
from emberpc.server.paging import encode_token
from emberpc.v1 import classification_pb2, index_pb2, model_pb2, types_pb2

#: Limit of the bytes of the models on a page of ListModels or ListClassifiers. A page with one model may have more.
#: Without this limit, a page of classifiers with many labels could exceed the limit of a message.
MAX_PAGE_BYTES = 2**20

Description = TypeVar("Description", model_pb2.Model, classification_pb2.Classifier)


def model_page(
    models: Sequence[Model], after: str, size: int, max_bytes: int, describe: Callable[[Model], Description]
) -> tuple[list[Description], str]:
    """Return the descriptions of a page of models, and the token of the next page; empty if this page is the last.

    Args:
        models: all models, sorted by name.
        after: the page has only models with greater names; empty: the first page.
        size: maximum number of models of the page.
        max_bytes: maximum number of bytes of the descriptions together. The first description of a page may have more.
        describe: returns the description of a model, a message with a field `name`.
    """
    remaining = [model for model in models if model.name > after]
    page: list[Description] = []
    total = 0
    for model in remaining[:size]:
        description = describe(model)
        total += description.ByteSize()
        if page and total > max_bytes:
            break
        page.append(description)
    return page, encode_token(page[-1].name) if page and len(page) < len(remaining) else ""


def model_version(model: Model) -> types_pb2.ModelVersion:
    """Return the message with name, revision and fingerprints of a model."""
    return types_pb2.ModelVersion(
        name=model.name,
        revision=model.manifest.revision,
        fingerprint=model.fingerprint,
        classifier_fingerprint=model.classifier_fingerprint,
    )


def usages(inference: Inference) -> Iterable[types_pb2.TokenUsage]:
    """Yield the token usage of each text of an inference, in the order of the texts."""
    for tokens, truncated in zip(inference.tokens, inference.truncated, strict=True):
        yield types_pb2.TokenUsage(tokens=tokens, truncated=truncated)


def timings(inferences: Sequence[Inference], lookup_seconds: float = 0.0) -> types_pb2.Timings:
    """Return the timings of a call, in seconds.

    Args:
        inferences: the inferences of the call, which ran concurrently. Each step has the longest time of them; 0 if
            there are none.
        lookup_seconds: wall time of searching the index and reading records.
    """
    return types_pb2.Timings(
        tokenize_seconds=max((each.tokenize_seconds for each in inferences), default=0.0),
        queue_seconds=max((each.queue_seconds for each in inferences), default=0.0),
        infer_seconds=max((each.infer_seconds for each in inferences), default=0.0),
        lookup_seconds=lookup_seconds,
    )


def receipt(result: WriteResult) -> index_pb2.WriteReceipt:
    """Return the receipt of a write: its sequence, and SYNCED if the write is known to be on disk, else UNSPECIFIED."""
    durability = index_pb2.DURABILITY_SYNCED if result.synced else index_pb2.DURABILITY_UNSPECIFIED
    return index_pb2.WriteReceipt(sequence=result.sequence, durability=durability)
