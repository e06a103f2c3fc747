"""Cache the encoder outputs of texts, and let calls with the same text at the same time share one run of the model.

`Cache` and `SharedRuns` have no locks, since only the thread of the event loop changes them.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from emberpc.server.engine.caller import Lane
from emberpc.server.engine.sessions.session import Output
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


class CachedOutput(NamedTuple):
    """Output of an encoder for a text.

    Attributes:
        row: the encoder's output for the text, float32 (width,): a vector, or logits if the graph contains the head of
            a classifier. Do not change the array: the cache and several calls may share it.
        tokens: number of tokens of the text, with prompt and special tokens, after truncation.
        truncated: whether the text was truncated.
    """

    row: Output
    tokens: int
    truncated: bool


class Cache(LruCache[Key, CachedOutput]):
    """Cache of encoder outputs by key, which evicts the least recently used outputs first.

    Args:
        max_bytes: maximum number of bytes of all entries, by an estimate; 0: nothing is cached.
    """

    def __init__(self, max_bytes: int) -> None:
        super().__init__(max_bytes, _size)

    def add(self, entries: Mapping[Key, CachedOutput]) -> None:
        """Add copies of entries. If the cache then has more bytes than allowed, evict the least recently used entries.

        A cached key keeps its entry. An entry of more than an eighth of the allowed bytes is not cached.
        """
        # A worker's thread allocated the memory of each row, in the heap of that thread. If the cache kept the row,
        # that heap could not shrink after a batch of long texts. A copy lies in the heap of the calling thread.
        super().add({key: entry._replace(row=entry.row.copy()) for key, entry in entries.items()})


def _size(key: Key, entry: CachedOutput) -> int:
    return sys.getsizeof(key.text) + entry.row.nbytes + _OVERHEAD


@dataclass(eq=False)
class SharedRun:
    """The run of a call's texts through the model, with the wait in the queue. Other calls may use its outputs too."""

    lane: Lane
    #: Set at the end of the run. From then on, `entries` holds the outputs; it is empty if the run failed or was
    #: cancelled.
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    entries: dict[Key, CachedOutput] = field(default_factory=dict)


class SharedRuns:
    """The runs that have not ended, by the key of each of their texts; for each key, one run at most."""

    def __init__(self) -> None:
        self._by_key: dict[Key, SharedRun] = {}

    def find(self, keys: Iterable[Key], lane: Lane) -> dict[Key, SharedRun]:
        """Return the registered run of each key that has one.

        Args:
            keys: the keys.
            lane: lane of the call that asks. Bulk runs are left out for an interactive call, since it might wait
                longer for them than for a run of its own.
        """
        return {key: run for key in keys if (run := self._by_key.get(key)) is not None and run.lane <= lane}

    @contextmanager
    def register(self, keys: Iterable[Key], lane: Lane) -> Iterator[SharedRun]:
        """Register a run of the model for the time of the block, so that other calls can share it.

        The block runs the texts and sets `entries` of the `SharedRun` that is yielded. When the block ends, even by an
        exception, the run is removed and `ended` is set.

        Args:
            keys: keys of the texts that the block runs. A key that has another registered run keeps that run.
            lane: the lane of the run.
        """
        run = SharedRun(lane)
        own = [key for key in keys if self._by_key.setdefault(key, run) is run]
        try:
            yield run
        finally:
            for key in own:
                del self._by_key[key]
            run.ended.set()
