"""Protocols, types and validation rules that every index backend shares. Imports no backend, no gRPC and no engine."""

from __future__ import annotations

from emberpc.server.collections.backend import CollectionBackend, IndexBackend, ReembeddingBackend, RestorationBackend
from emberpc.server.collections.types import (
    WHOLE_RECORD,
    Cluster,
    CollectionSpec,
    Distance,
    DuplicatePair,
    Fusion,
    NewRecord,
    Piece,
    Plan,
    ProbeFigures,
    Problem,
    RecordParts,
    SearchOutcome,
    SearchStrategy,
    StoredRecord,
    Verified,
    WriteResult,
)
from emberpc.server.collections.validation import MAX_EF, MAX_ID_BYTES, MAX_LABEL_BYTES, MAX_METADATA_BYTES, MAX_TOP_K

__all__ = [
    "MAX_EF",
    "MAX_ID_BYTES",
    "MAX_LABEL_BYTES",
    "MAX_METADATA_BYTES",
    "MAX_TOP_K",
    "WHOLE_RECORD",
    "Cluster",
    "CollectionBackend",
    "CollectionSpec",
    "Distance",
    "DuplicatePair",
    "Fusion",
    "IndexBackend",
    "NewRecord",
    "Piece",
    "Plan",
    "ProbeFigures",
    "Problem",
    "RecordParts",
    "ReembeddingBackend",
    "RestorationBackend",
    "SearchOutcome",
    "SearchStrategy",
    "StoredRecord",
    "Verified",
    "WriteResult",
]
