"""Cache the encoder outputs of texts, and share the runs of texts that several calls send at the same time.

Both classes are used from the thread of the event loop only, so they need no locks.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from emberpc.server.engine.caller import Lane
from emberpc.server.engine.sessions.onnx_runtime import Output
from emberpc.server.engine.tokenizing import Truncation
from emberpc.server.lru import LruCache

#: Bytes of an entry without its text and its numbers: tuples, array header, slot of the dictionary.
_OVERHEAD = 600


class Key(NamedTuple):
    """Everything that determines an output. `encoder` is the number of a loaded encoder; a reload has a new number."""

    encoder: int
    prompt: str
    truncation: Truncation
    text: str


class Entry(NamedTuple):
    """Output of an encoder for a text: `row` is float32 (width,), not writable."""

    row: Output
    tokens: int
    truncated: bool


class Cache(LruCache[Key, Entry]):
    """Outputs by key, least recently used first out, in at most `max_bytes` bytes; 0 keeps none."""

    def __init__(self, max_bytes: int) -> None:
        super().__init__(max_bytes, _size)

    def add(self, entries: Mapping[Key, Entry]) -> None:
        """Store copies of entries; remove the least recently used entries if there is no room."""
        # The rows lie in the heaps of the workers. If they stayed there, those heaps could not shrink after a batch of
        # long texts. A copy lies in the heap of the calling thread.
        super().add({key: entry._replace(row=entry.row.copy()) for key, entry in entries.items()})


def _size(key: Key, entry: Entry) -> int:
    return sys.getsizeof(key.text) + entry.row.nbytes + _OVERHEAD


@dataclass(eq=False)
class Flight:
    """A run of the model in progress, on texts whose outputs other calls may use too."""

    lane: Lane
    #: Set at the end of the run. `entries` then holds the outputs; if the run failed, it is empty.
    landed: asyncio.Event = field(default_factory=asyncio.Event)
    entries: dict[Key, Entry] = field(default_factory=dict)


class Flights:
    """The runs in progress, by text."""

    def __init__(self) -> None:
        self._flying: dict[Key, Flight] = {}

    def find(self, keys: Iterable[Key], lane: Lane) -> dict[Key, Flight]:
        """Return the runs in progress for keys, without runs in a slower lane than `lane`."""
        return {key: flight for key in keys if (flight := self._flying.get(key)) is not None and flight.lane <= lane}

    @contextmanager
    def lead(self, keys: Iterable[Key], lane: Lane) -> Iterator[Flight]:
        """Register the texts that a block runs, so that other calls can share them; `landed` is set at its end."""
        flight = Flight(lane)
        own = [key for key in keys if self._flying.setdefault(key, flight) is flight]
        try:
            yield flight
        finally:
            for key in own:
                del self._flying[key]
            flight.landed.set()
