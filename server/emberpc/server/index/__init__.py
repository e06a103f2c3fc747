"""Collections of vectors on one machine: durable, searchable. Knows nothing of gRPC or of models."""

from emberpc.server.index.catalogue import Index
from emberpc.server.index.collection import Collection
from emberpc.server.index.types import (
    CollectionSpec,
    Distance,
    NewRecord,
    Plan,
    SearchOutcome,
    StoredRecord,
    Strategy,
    WriteResult,
)

__all__ = [
    "Collection",
    "CollectionSpec",
    "Distance",
    "Index",
    "NewRecord",
    "Plan",
    "SearchOutcome",
    "StoredRecord",
    "Strategy",
    "WriteResult",
]
