"""Which records meet a condition: asked of the store once, and kept up to date through the writes that follow."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np

from emberpc.server.collections.metric import prepare
from emberpc.server.collections.types import CollectionSpec, Labels, Matrix
from emberpc.server.index.storage.filter_sql import Clause
from emberpc.server.index.storage.store import Store

#: Bytes of labels and vectors that are kept. A look through 100,000 records takes 0.1 s, one at what is kept 20 µs.
_MAX_BYTES = 64 * 2**20
#: Writes that what is kept can be brought past.
_MAX_WRITES = 1000
#: Bytes of an object that holds a parameter, beside its characters.
_VALUE_BYTES = 64
#: Seconds from a write's commit to its note, at most: memory takes it over in between.
_MOMENT = 1.0


@dataclass(frozen=True)
class Selection:
    """The labels that meet a condition as of a write, int64 (n,), ascending; their prepared vectors if asked for.

    With vectors, there are no labels but those that have one. These are not compared with their checksums, which would
    take longer than comparing them with a query: `checked` are the labels of those that were, and grows.

    `newest` is the greatest label that any record had by then.
    """

    sequence: int
    newest: int
    labels: Labels
    vectors: Matrix | None = None
    checked: set[int] = field(default_factory=set, compare=False)

    @property
    def size(self) -> int:
        """Bytes it takes."""
        return self.labels.nbytes + (0 if self.vectors is None else self.vectors.nbytes)


class Selector:
    """Finds what meets a condition. Safe to use from several threads.

    Labels are never used again and only grow, so what a write added has greater
    labels than all before, and what it removed is all else that changed.

    Args:
        store: the truth.
        spec: the collection's.
    """

    def __init__(self, store: Store, spec: CollectionSpec) -> None:
        self._store = store
        self._spec = spec
        self._lock = threading.Condition()
        self._kept: OrderedDict[Clause, Selection] = OrderedDict()
        self._bytes = 0
        #: What each of the last writes removed, by its number.
        self._removed: OrderedDict[int, Labels] = OrderedDict()
        self._applied = store.sequence()

    def note(self, sequence: int, removed: Iterable[int]) -> None:
        """Take over what a write removed, once memory has it too; writes must come in the store's order."""
        labels = np.fromiter(removed, dtype=np.int64)
        with self._lock:
            if sequence == self._applied:  # of a delete that found nothing: it is no write
                return
            self._removed[sequence] = labels
            if len(self._removed) > _MAX_WRITES:
                self._removed.popitem(last=False)
            self._applied = sequence
            self._lock.notify_all()

    def wait_for(self, sequence: int) -> None:
        """Wait until a write that the store has was noted, which takes a moment; no longer than that should."""
        with self._lock:
            self._lock.wait_for(lambda: self._applied >= sequence, _MOMENT)

    def select(self, condition: Clause, vectors_up_to: int) -> Selection:
        """Return what meets a condition, and its vectors if those are no more than that, nor too many to be kept."""
        vectors_up_to = min(vectors_up_to, _MAX_BYTES // 4 // (4 * self._spec.dimensions))
        with self._lock:
            kept = self._kept.get(condition)
            if kept:
                self._kept.move_to_end(condition)
        with self._store.snapshot():
            sequence = self._store.sequence()
            selection = self._brought_up(kept, condition, sequence) if kept else None
            if selection is None:
                selection = Selection(sequence, self._store.newest_label(), self._store.matching(condition))
            if selection.vectors is None and len(selection.labels) <= vectors_up_to:
                labels, vectors = self._read(selection.labels)
                selection = replace(selection, labels=labels, vectors=vectors)
        if selection is not kept:
            self._keep(condition, selection)
        return selection

    def _brought_up(self, kept: Selection, condition: Clause, sequence: int) -> Selection | None:
        """Return what was kept as of a later write; None if that cannot be known without asking for all anew."""
        if kept.sequence == sequence:
            return kept
        with self._lock:
            missed = [self._removed.get(number) for number in range(kept.sequence + 1, sequence + 1)[: _MAX_WRITES + 1]]
        gone = [labels for labels in missed if labels is not None]
        if len(gone) < len(missed):
            return None
        stay = ~np.isin(kept.labels, np.concatenate(gone)) if gone else np.ones(len(kept.labels), dtype=bool)
        new = self._store.matching(condition, after=kept.newest)
        vectors = None
        if kept.vectors is not None:
            new, new_vectors = self._read(new)
            vectors = np.concatenate([kept.vectors[stay], new_vectors])
        labels = np.concatenate([kept.labels[stay], new])
        return Selection(sequence, self._store.newest_label(), labels, vectors, kept.checked)

    def _read(self, labels: Labels) -> tuple[Labels, Matrix]:
        """Return those of the labels that have vectors, and these, prepared; checksums are not looked at."""
        found, vectors = self._store.vectors(labels.tolist(), checked=False)
        return found, prepare(vectors, self._spec.distance)

    def forget(self) -> None:
        """Forget what is kept: some of it turned out to be damaged."""
        with self._lock:
            self._kept.clear()
            self._bytes = 0

    def _keep(self, condition: Clause, selection: Selection) -> None:
        with self._lock:
            before = self._kept.pop(condition, None)
            self._bytes += _kept_bytes(condition, selection) - (_kept_bytes(condition, before) if before else 0)
            self._kept[condition] = selection
            while self._bytes > _MAX_BYTES:
                self._bytes -= _kept_bytes(*self._kept.popitem(last=False))


def _kept_bytes(condition: Clause, selection: Selection) -> int:
    """Return the bytes that a condition and its selection take, about."""
    parameters = sum(_VALUE_BYTES + (len(each) if isinstance(each, str) else 0) for each in condition.parameters)
    return selection.size + len(condition.sql) + parameters
