"""Cache the encoder outputs of texts, and share one run of the model among calls that send the same text meanwhile.

`Cache` and `Flights` are used from the thread of the event loop only, so they need no locks.
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

#: Estimated bytes of an entry beside its text and the values of its row: tuples, array header, slot of the dictionary.
_OVERHEAD = 600


class Key(NamedTuple):
    """Everything that determines an encoder's output for a text.

    `encoder` is `Encoder.number`: an encoder that is loaded again has a new number, so it finds no old outputs.
    """

    encoder: int
    prompt: str
    truncation: Truncation
    text: str


class Entry(NamedTuple):
    """Output of an encoder for a text.

    Attributes:
        row: float32 (width,). The cache and several calls share it, so it must not be changed.
        tokens: number of tokens of the text, with prompt and special tokens, after truncation.
        truncated: whether the text was truncated.
    """

    row: Output
    tokens: int
    truncated: bool


class Cache(LruCache[Key, Entry]):
    """Cache of encoder outputs by key, which evicts the least recently used outputs first.

    Args:
        max_bytes: most bytes of all entries; 0: nothing is cached.
    """

    def __init__(self, max_bytes: int) -> None:
        super().__init__(max_bytes, _size)

    def add(self, entries: Mapping[Key, Entry]) -> None:
        """Add copies of entries. If the cache then has more bytes than allowed, evict the least recently used entries.

        A cached key keeps its entry. An entry of more than an eighth of the allowed bytes is not cached.
        """
        # A worker's thread allocated the memory of each row, in the heap of that thread. If the cache kept the row,
        # that heap could not shrink after a batch of long texts. A copy lies in the heap of the calling thread.
        super().add({key: entry._replace(row=entry.row.copy()) for key, entry in entries.items()})


def _size(key: Key, entry: Entry) -> int:
    return sys.getsizeof(key.text) + entry.row.nbytes + _OVERHEAD


@dataclass(eq=False)
class Flight:
    """A run of the model in progress, on texts whose outputs other calls may use too."""

    lane: Lane
    #: Set at the end of the run. From then on, `entries` holds the outputs; it is empty if the run failed or was
    #: cancelled.
    landed: asyncio.Event = field(default_factory=asyncio.Event)
    entries: dict[Key, Entry] = field(default_factory=dict)


class Flights:
    """The runs of the model that are in progress, by the key of each of their texts."""

    def __init__(self) -> None:
        self._flying: dict[Key, Flight] = {}

    def find(self, keys: Iterable[Key], lane: Lane) -> dict[Key, Flight]:
        """Return the run in progress of each key that has one.

        Args:
            keys: the keys.
            lane: lane of the call that asks. Runs in a slower lane are left out, since the call would wait for them.
        """
        return {key: flight for key in keys if (flight := self._flying.get(key)) is not None and flight.lane <= lane}

    @contextmanager
    def lead(self, keys: Iterable[Key], lane: Lane) -> Iterator[Flight]:
        """Register a run of the model for the time of the block, so that other calls can share it.

        The block runs the texts and sets `entries` of the flight that is yielded. When the block ends, `landed` is set.

        Args:
            keys: keys of the texts that the block runs. A key that already has a run in progress keeps that run.
            lane: the lane of the run.
        """
        flight = Flight(lane)
        own = [key for key in keys if self._flying.setdefault(key, flight) is flight]
        try:
            yield flight
        finally:
            for key in own:
                del self._flying[key]
            flight.landed.set()
