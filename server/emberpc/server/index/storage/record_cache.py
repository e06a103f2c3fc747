"""Cache of recently returned records, so that a repeated hit is not read from the database again.

Each write of a record gives the record a new label, and a label is never reused. So cached records never become stale:
a record that is replaced or deleted loses its label, and searches return only labels of present records.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping, Sequence
from itertools import count

from emberpc.server.collections.types import StoredRecord
from emberpc.server.lru import LruCache

#: Bytes of a cached record besides its texts: the tuple, dates, dictionaries and slot, and the overhead of the record's
#: serialized form in a response.
_OVERHEAD = 1200

#: Usual number of bytes of metadata in a protobuf message for each byte of the metadata as JSON. For lists of short
#: numbers it reaches 3.7.
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
        """Return a new owner number. Each opened collection needs its own, since collections have equal labels."""
        return next(self._owners)

    def find(self, owner: int, labels: Sequence[int]) -> dict[int, StoredRecord]:
        """Return those records of an owner that are cached, by label; other labels are left out."""
        with self._lock:
            found = self._entries.each([(owner, label) for label in labels])
        return {label: record for label, record in zip(labels, found, strict=True) if record is not None}

    def add(self, owner: int, records: Mapping[int, StoredRecord]) -> None:
        """Insert an owner's records, by label, and evict the least recently used records beyond the limit of bytes."""
        with self._lock:
            self._entries.add({(owner, label): record for label, record in records.items()})


def _size(_: _Key, record: StoredRecord) -> int:
    # Id and text count twice: in the record, and in its serialized form. Metadata counts as JSON and as a message.
    metadata = sys.getsizeof(record.document) + _METADATA_FACTOR * len(record.document)
    return 2 * (sys.getsizeof(record.text) + sys.getsizeof(record.id)) + metadata + _OVERHEAD
