"""Cache of recently returned records, so that a repeated hit is not read from the database again.

A label is here the number of a record in its database. Each write of a record gives the record a new label, and a label
is never reused. So writes need not remove records from the cache: a search that begins after the write of a record does
not find the record's old label.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping, Sequence
from itertools import count

from emberpc.server.collections.types import StoredRecord
from emberpc.server.lru import LruCache

#: Estimated bytes of a cached record besides id, text and metadata: class label, tuple, dates, dictionaries and slot,
#: and the overhead of the record's serialized form, which is cached with the record.
_OVERHEAD = 1200

#: Usual number of bytes of metadata in a protobuf message for each byte of the metadata as JSON, for an estimate. For
#: lists of short numbers the true number reaches 3.7.
_METADATA_FACTOR = 2

_Key = tuple[int, int]


class RecordCache:
    """Cache of records without vectors, shared by all collections. Safe to use from several threads.

    Args:
        max_bytes: limit of the estimated bytes of all cached records; 0: nothing is cached.
    """

    def __init__(self, max_bytes: int) -> None:
        self._lock = threading.Lock()
        self._entries: LruCache[_Key, StoredRecord] = LruCache(max_bytes, _size)
        self._owners = count()

    def new_owner(self) -> int:
        """Return a new owner number. Each opened collection needs one, since two collections may have equal labels."""
        return next(self._owners)

    def find(self, owner: int, labels: Sequence[int]) -> dict[int, StoredRecord]:
        """Return the cached records of an owner among those with the given labels, by label.

        The returned records become the most recently used.
        """
        with self._lock:
            found = self._entries.each([(owner, label) for label in labels])
        return {label: record for label, record in zip(labels, found, strict=True) if record is not None}

    def add(self, owner: int, records: Mapping[int, StoredRecord]) -> None:
        """Insert an owner's records, by label, and evict the least recently used records beyond the limit of bytes.

        A record of more than an eighth of the limit, or whose label is cached already, is not inserted.
        """
        with self._lock:
            self._entries.add({(owner, label): record for label, record in records.items()})


def _size(_: _Key, record: StoredRecord) -> int:
    # The serialized form (`StoredRecord.serialized`) is cached with the record. So id and text count twice, and
    # metadata counts as JSON and as a protobuf message.
    metadata = sys.getsizeof(record.metadata_text) + _METADATA_FACTOR * len(record.metadata_text)
    return 2 * (sys.getsizeof(record.text) + sys.getsizeof(record.id)) + metadata + _OVERHEAD
