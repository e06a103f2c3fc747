"""Records that were found lately, so that a hit need not be read from the database again.

A label belongs to one version of one record and is never used again, so what is
kept never goes stale: a record that is changed or deleted has its label no
more, and memory finds only labels that are live.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping, Sequence
from itertools import count

from emberpc.server.collections.types import StoredRecord
from emberpc.server.lru import LruCache

#: Bytes of an entry beside its texts: the tuple, the dates, the dictionaries, the slot, and what an answer's form of it
#: has beside texts.
_OVERHEAD = 1200

_Key = tuple[int, int]


class RecordCache:
    """Records without vectors, of all collections together. Safe to use from several threads.

    Args:
        max_bytes: most bytes of all of them, about; 0 keeps none.
    """

    def __init__(self, max_bytes: int) -> None:
        self._lock = threading.Lock()
        self._entries: LruCache[_Key, StoredRecord] = LruCache(max_bytes, _size)
        self._owners = count()

    def new_owner(self) -> int:
        """Return a number for one who keeps records here, whose labels are then not those of others."""
        return next(self._owners)

    def find(self, owner: int, labels: Sequence[int]) -> dict[int, StoredRecord]:
        """Return the records that are there, by label."""
        with self._lock:
            found = self._entries.each([(owner, label) for label in labels])
        return {label: record for label, record in zip(labels, found, strict=True) if record is not None}

    def add(self, owner: int, records: Mapping[int, StoredRecord]) -> None:
        """Keep records, by label."""
        with self._lock:
            self._entries.add({(owner, label): record for label, record in records.items()})


def _size(_: _Key, record: StoredRecord) -> int:
    # Metadata takes, as objects, some times its size as text; counting it exactly would cost more than it is worth.
    metadata = 200 * len(record.metadata) + (len(str(record.metadata)) if record.metadata else 0)
    # Twice: once in the form that an answer has it in.
    return 2 * (sys.getsizeof(record.text) + sys.getsizeof(record.id)) + metadata + _OVERHEAD
