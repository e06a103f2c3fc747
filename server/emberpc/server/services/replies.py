"""How the engine's results become parts of a reply."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from emberpc.server.collections import WriteResult
from emberpc.server.engine import Inference, Model
from emberpc.v1 import index_pb2, types_pb2


def model_version(model: Model) -> types_pb2.ModelVersion:
    """Say which model answered."""
    return types_pb2.ModelVersion(name=model.name, revision=model.manifest.revision, fingerprint=model.fingerprint)


def usages(inference: Inference) -> Iterable[types_pb2.TokenUsage]:
    """Say what became of each text."""
    for tokens, truncated in zip(inference.tokens, inference.truncated, strict=True):
        yield types_pb2.TokenUsage(tokens=tokens, truncated=truncated)


def timings(inferences: Sequence[Inference], lookup_seconds: float = 0.0) -> types_pb2.Timings:
    """Say where the time went; of inferences that ran side by side, the longest counts."""
    return types_pb2.Timings(
        tokenize_seconds=max((each.tokenize_seconds for each in inferences), default=0.0),
        queue_seconds=max((each.queue_seconds for each in inferences), default=0.0),
        infer_seconds=max((each.infer_seconds for each in inferences), default=0.0),
        lookup_seconds=lookup_seconds,
    )


def receipt(result: WriteResult) -> index_pb2.WriteReceipt:
    """Tell the number of a write, and how sure it is that it stays."""
    durability = index_pb2.DURABILITY_SYNCED if result.synced else index_pb2.DURABILITY_UNSPECIFIED
    return index_pb2.WriteReceipt(sequence=result.sequence, durability=durability)
