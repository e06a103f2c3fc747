"""Write the parts of a response that several services have: pages, model, token usages, timings, receipt of a write."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from emberpc.server.collections import WriteResult
from emberpc.server.engine import Inference, Model
from emberpc.server.paging import encode_token
from emberpc.v1 import classification_pb2, index_pb2, model_pb2, types_pb2

#: A page of models has at most this many bytes, or a single model: models with many labels would exceed the limit of
#: a message.
MAX_PAGE_BYTES = 2**20

Description = TypeVar("Description", model_pb2.Model, classification_pb2.Classifier)


def model_page(
    models: Sequence[Model], after: str, size: int, max_bytes: int, describe: Callable[[Model], Description]
) -> tuple[list[Description], str]:
    """Return the descriptions of one page of models, and the token of the next page; empty if there is none.

    Args:
        models: all models of the list, by name.
        after: the page starts after this name.
        size: most models of the page.
        max_bytes: most bytes of their descriptions; the first one may have more.
        describe: returns the description of a model, which has its name.
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
    """Return name, revision and fingerprints of a model."""
    return types_pb2.ModelVersion(
        name=model.name,
        revision=model.manifest.revision,
        fingerprint=model.fingerprint,
        classifier_fingerprint=model.classifier_fingerprint,
    )


def usages(inference: Inference) -> Iterable[types_pb2.TokenUsage]:
    """Yield the token usage of each text."""
    for tokens, truncated in zip(inference.tokens, inference.truncated, strict=True):
        yield types_pb2.TokenUsage(tokens=tokens, truncated=truncated)


def timings(inferences: Sequence[Inference], lookup_seconds: float = 0.0) -> types_pb2.Timings:
    """Return the timings of a call; of concurrent inferences, the longest of each step."""
    return types_pb2.Timings(
        tokenize_seconds=max((each.tokenize_seconds for each in inferences), default=0.0),
        queue_seconds=max((each.queue_seconds for each in inferences), default=0.0),
        infer_seconds=max((each.infer_seconds for each in inferences), default=0.0),
        lookup_seconds=lookup_seconds,
    )


def receipt(result: WriteResult) -> index_pb2.WriteReceipt:
    """Return the receipt of a write: its sequence, and whether it is synced to disk."""
    durability = index_pb2.DURABILITY_SYNCED if result.synced else index_pb2.DURABILITY_UNSPECIFIED
    return index_pb2.WriteReceipt(sequence=result.sequence, durability=durability)
