"""Cache with a limit in bytes that evicts the least recently used entries."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, TypeVar

#: Largest share of `max_bytes` for one entry. A larger entry is not cached, since it would evict too many others.
_LARGEST_SHARE = 1 / 8

K = TypeVar("K")
V = TypeVar("V")


class LruCache(Generic[K, V]):
    """Cache of values, which are not None, by key. It evicts the least recently used entries first.

    Not safe for concurrent threads.

    Args:
        max_bytes: maximum number of bytes of all entries together; 0: nothing is cached.
        size: returns the bytes of an entry, given key and value; always the same number for the same entry.
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

    def find(self, keys: Sequence[K]) -> dict[K, V]:
        """Return the cached values by key, without the keys that are not cached.

        Hits, misses and the order of use change as in `each`.
        """
        return {key: entry for key, entry in zip(keys, self.each(keys), strict=True) if entry is not None}

    def each(self, keys: Sequence[K]) -> list[V | None]:
        """Return the cached value of each key, in the order of `keys`; None for a key that is not cached.

        Each key counts as a hit or a miss, unless `max_bytes` is 0. Entries that are found become the most recently
        used.
        """
        if not self._max_bytes:
            return [None] * len(keys)
        get, use = self._entries.get, self._entries.move_to_end
        found = [get(key) for key in keys]
        for key, entry in zip(keys, found, strict=True):
            if entry is not None:
                use(key)
        missing = found.count(None)
        self.misses += missing
        self.hits += len(keys) - missing
        return found

    def add(self, entries: Mapping[K, V]) -> None:
        """Add values by key, and then evict the least recently used entries until all together fit into `max_bytes`.

        A key that is cached already keeps its value and its place in the order of use. An entry of more than an eighth
        of `max_bytes` is not added.
        """
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
