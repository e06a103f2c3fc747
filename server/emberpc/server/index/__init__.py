"""The embedded index backend: collections on one machine, in SQLite and hnswlib.

In this package a `label` is the number of a record in its database, as in hnswlib. The class of a record is its
`class_label`.
"""

from emberpc.server.index.catalogue import Index
from emberpc.server.index.collection import Collection

__all__ = ["Collection", "Index"]
