"""The embedded index backend: collections on one machine, in SQLite and hnswlib."""

from emberpc.server.index.catalogue import Index
from emberpc.server.index.collection import Collection

__all__ = ["Collection", "Index"]
