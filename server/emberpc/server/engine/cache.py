"""What encoders gave for texts: kept for those who ask again, and shared by those who ask at the same time.

Both are used from the event loop's thread alone, so they need no locks.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from emberpc.server.engine.calls import Lane
from emberpc.server.engine.sessions.onnx_runtime import Output
from emberpc.server.engine.tokenizing import Truncation
from emberpc.server.lru import LruCache

#: Bytes of an entry beside its text and its numbers: the tuples, the array's header, the dictionary's slot.
_OVERHEAD = 600


class Key(NamedTuple):
    """All that an outcome depends on. `encoder` is the number of one loading of an encoder: a reload makes another."""

    encoder: int
    prompt: str
    truncation: Truncation
    text: str


class Entry(NamedTuple):
    """What an encoder gave for a text: `row` is float32 (width,), not writable."""

    row: Output
    tokens: int
    truncated: bool


class Cache(LruCache[Key, Entry]):
    """Outcomes, in a bounded number of bytes; 0 keeps none."""

    def __init__(self, max_bytes: int) -> None:
        super().__init__(max_bytes, _size)

    def add(self, entries: Mapping[Key, Entry]) -> None:
        """Keep copies of entries, and forget others if there is no room."""
        # The rows come from the heaps of the workers. Those that stay would keep these from shrinking when a batch of
        # long texts is over; a copy is in the heap of the thread that calls this.
        super().add({key: entry._replace(row=entry.row.copy()) for key, entry in entries.items()})


def _size(key: Key, entry: Entry) -> int:
    return sys.getsizeof(key.text) + entry.row.nbytes + _OVERHEAD


@dataclass(eq=False)
class Flight:
    """Texts of one call that are being run."""

    lane: Lane
    #: Set when it has ended, with what became of the texts; without any if it failed.
    landed: asyncio.Event = field(default_factory=asyncio.Event)
    entries: dict[Key, Entry] = field(default_factory=dict)


class Flights:
    """The texts that are being run now."""

    def __init__(self) -> None:
        self._flying: dict[Key, Flight] = {}

    def find(self, keys: Iterable[Key], lane: Lane) -> dict[Key, Flight]:
        """Return the flights that give what is wanted no later than running it oneself: none of a slower lane."""
        return {key: flight for key in keys if (flight := self._flying.get(key)) is not None and flight.lane <= lane}

    @contextmanager
    def lead(self, keys: Iterable[Key], lane: Lane) -> Iterator[Flight]:
        """Run texts for all who come to want them meanwhile; they are told, however it ends."""
        flight = Flight(lane)
        own = [key for key in keys if self._flying.setdefault(key, flight) is flight]
        try:
            yield flight
        finally:
            for key in own:
                del self._flying[key]
            flight.landed.set()
