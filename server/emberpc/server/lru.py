"""What is kept in a bounded number of bytes: what was not asked for longest goes first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Generic, TypeVar

#: An entry of more than this share of all would push out too many others.
_LARGEST_SHARE = 1 / 8

K = TypeVar("K")
V = TypeVar("V")


class LruCache(Generic[K, V]):
    """Entries, the least recently used of which are forgotten first. For one thread at a time.

    Args:
        max_bytes: most bytes of all entries; 0 keeps none.
        size: gives the bytes of an entry.
    """

    def __init__(self, max_bytes: int, size: Callable[[K, V], int]) -> None:
        self._max_bytes = max_bytes
        self._size = size
        self._entries: OrderedDict[K, V] = OrderedDict()
        self.bytes = 0
        self.hits = 0
        self.misses = 0

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, keys: Iterable[K]) -> dict[K, V]:
        """Return the entries that are there."""
        found: dict[K, V] = {}
        if not self._max_bytes:
            return found
        for key in keys:
            entry = self._entries.get(key)
            if entry is None:
                self.misses += 1
            else:
                self.hits += 1
                self._entries.move_to_end(key)
                found[key] = entry
        return found

    def add(self, entries: Mapping[K, V]) -> None:
        """Keep entries, and forget others if there is no room."""
        if not self._max_bytes:
            return
        for key, entry in entries.items():
            size = self._size(key, entry)
            if size > self._max_bytes * _LARGEST_SHARE or key in self._entries:
                continue
            self._entries[key] = entry
            self.bytes += size
        while self.bytes > self._max_bytes:
            self.bytes -= self._size(*self._entries.popitem(last=False))
