"""Write the parts of a response that several services have: model, token usages, timings, receipt of a write."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from emberpc.server.collections import WriteResult
from emberpc.server.engine import Inference, Model
from emberpc.v1 import index_pb2, types_pb2


def model_version(model: Model) -> types_pb2.ModelVersion:
    """Return name, revision and fingerprint of a model."""
    return types_pb2.ModelVersion(name=model.name, revision=model.manifest.revision, fingerprint=model.fingerprint)


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
