"""Cache of recently returned records, so that a repeated hit is not read from the database again.

A label belongs to one version of one record and is never reused, so cached records never become stale: a record that is
changed or deleted loses its label, and searches return only labels that are live.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping, Sequence
from itertools import count

from emberpc.server.collections.types import StoredRecord
from emberpc.server.lru import LruCache

#: Bytes of an entry besides its texts: the tuple, dates, dictionaries and slot, and the overhead of its serialized form
#: in a response.
_OVERHEAD = 1200

#: Usual bytes of metadata in a message for each byte as JSON; up to 3.7 for lists of short numbers.
_METADATA_FACTOR = 2

_Key = tuple[int, int]


class RecordCache:
    """Records without vectors, of all collections together. Safe to use from several threads.

    Args:
        max_bytes: approximate limit of the bytes of all records; 0 disables the cache.
    """

    def __init__(self, max_bytes: int) -> None:
        self._lock = threading.Lock()
        self._entries: LruCache[_Key, StoredRecord] = LruCache(max_bytes, _size)
        self._owners = count()

    def new_owner(self) -> int:
        """Return the number of a new owner, which keeps its labels apart from those of other owners."""
        return next(self._owners)

    def find(self, owner: int, labels: Sequence[int]) -> dict[int, StoredRecord]:
        """Return the cached records of an owner, by label."""
        with self._lock:
            found = self._entries.each([(owner, label) for label in labels])
        return {label: record for label, record in zip(labels, found, strict=True) if record is not None}

    def add(self, owner: int, records: Mapping[int, StoredRecord]) -> None:
        """Insert records, by label."""
        with self._lock:
            self._entries.add({(owner, label): record for label, record in records.items()})


def _size(_: _Key, record: StoredRecord) -> int:
    # Each twice: in the cached record, and in its serialized form in a response.
    metadata = sys.getsizeof(record.document) + _METADATA_FACTOR * len(record.document)
    return 2 * (sys.getsizeof(record.text) + sys.getsizeof(record.id)) + metadata + _OVERHEAD
