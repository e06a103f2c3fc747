"""Collections of vectors on one machine: durable, searchable. Knows nothing of gRPC or of models."""

from emberpc.server.index.backend import CollectionBackend, IndexBackend, RestorationBackend
from emberpc.server.index.backup import Piece
from emberpc.server.index.catalogue import Index
from emberpc.server.index.collection import Collection
from emberpc.server.index.duplicates import DuplicatePair
from emberpc.server.index.reembedding import Reembedding
from emberpc.server.index.types import (
    WHOLE_RECORD,
    CollectionSpec,
    Distance,
    Fusion,
    NewRecord,
    Plan,
    RecordParts,
    SearchOutcome,
    StoredRecord,
    Strategy,
    WriteResult,
)
from emberpc.server.index.validation import MAX_ID_BYTES, MAX_LABEL_BYTES, MAX_METADATA_BYTES, MAX_TOP_K
from emberpc.server.index.verifying import Verified

__all__ = [
    "MAX_ID_BYTES",
    "MAX_LABEL_BYTES",
    "MAX_METADATA_BYTES",
    "MAX_TOP_K",
    "WHOLE_RECORD",
    "Collection",
    "CollectionBackend",
    "CollectionSpec",
    "Distance",
    "DuplicatePair",
    "Fusion",
    "Index",
    "IndexBackend",
    "NewRecord",
    "Piece",
    "Plan",
    "RecordParts",
    "Reembedding",
    "RestorationBackend",
    "SearchOutcome",
    "StoredRecord",
    "Strategy",
    "Verified",
    "WriteResult",
]
