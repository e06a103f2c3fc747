"""Selections: the labels that meet a filter, read from the store once and updated after later writes."""

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

#: Bytes of cached labels and vectors. Evaluating a filter on 100,000 records takes 0.1 s, a cached selection 20 µs.
_MAX_BYTES = 64 * 2**20
#: A cached selection can be updated over at most this many writes.
_MAX_WRITES = 1000
#: Bytes of the object that holds a parameter, besides its characters.
_VALUE_BYTES = 64
#: Limit of the seconds between a write's commit and its `note`, while memory applies it.
_MOMENT = 1.0


@dataclass(frozen=True)
class Selection:
    """The labels that meet a filter as of a write, int64 (n,), ascending, and their prepared vectors if requested.

    With vectors, labels without a vector are left out. The vectors' checksums are not verified at first, which would
    take longer than comparing the vectors with a query: `checked` is the growing set of labels that were verified.

    `newest` is the greatest label that had been assigned by that write.
    """

    sequence: int
    newest: int
    labels: Labels
    vectors: Matrix | None = None
    checked: set[int] = field(default_factory=set, compare=False)

    @property
    def size(self) -> int:
        """Bytes of labels and vectors."""
        return self.labels.nbytes + (0 if self.vectors is None else self.vectors.nbytes)


class Selector:
    """Selects the records that meet a filter. Safe to use from several threads.

    Labels are never reused and only grow. So labels that a write added are greater than all before, and only removed
    labels change otherwise.

    Args:
        store: the records, the source of truth.
        spec: the spec of the collection.
    """

    def __init__(self, store: Store, spec: CollectionSpec) -> None:
        self._store = store
        self._spec = spec
        self._lock = threading.Condition()
        self._kept: OrderedDict[Clause, Selection] = OrderedDict()
        self._bytes = 0
        #: Labels that each of the last writes removed, by sequence.
        self._removed: OrderedDict[int, Labels] = OrderedDict()
        self._applied = store.sequence()

    def note(self, sequence: int, removed: Iterable[int]) -> None:
        """Note the labels that a write removed, after memory has applied it; writes must come in the store's order."""
        labels = np.fromiter(removed, dtype=np.int64)
        with self._lock:
            if sequence == self._applied:  # a delete that found nothing writes nothing
                return
            self._removed[sequence] = labels
            if len(self._removed) > _MAX_WRITES:
                self._removed.popitem(last=False)
            self._applied = sequence
            self._lock.notify_all()

    def wait_for(self, sequence: int) -> None:
        """Wait until the write of this sequence was noted, which takes a moment, at most `_MOMENT` seconds."""
        with self._lock:
            self._lock.wait_for(lambda: self._applied >= sequence, _MOMENT)

    def select(self, condition: Clause, vectors_up_to: int) -> Selection:
        """Return the selection of a filter, with vectors if it has at most `vectors_up_to` and they can be cached."""
        vectors_up_to = min(vectors_up_to, _MAX_BYTES // 4 // (4 * self._spec.dimensions))
        with self._lock:
            kept = self._kept.get(condition)
            if kept:
                self._kept.move_to_end(condition)
        with self._store.snapshot():
            sequence = self._store.sequence()
            selection = self._updated(kept, condition, sequence) if kept else None
            if selection is None:
                selection = Selection(sequence, self._store.newest_label(), self._store.matching(condition))
            if selection.vectors is None and len(selection.labels) <= vectors_up_to:
                labels, vectors = self._read(selection.labels)
                selection = replace(selection, labels=labels, vectors=vectors)
        if selection is not kept:
            self._keep(condition, selection)
        return selection

    def _updated(self, kept: Selection, condition: Clause, sequence: int) -> Selection | None:
        """Update a cached selection to a later write; None if the filter must be evaluated again."""
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
        """Return those labels that have vectors, and the prepared vectors; checksums are not verified."""
        found, vectors = self._store.vectors(labels.tolist(), checked=False)
        return found, prepare(vectors, self._spec.distance)

    def forget(self) -> None:
        """Clear the cache, since part of it turned out to be damaged."""
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
    """Return the approximate bytes of a filter and its selection."""
    parameters = sum(_VALUE_BYTES + (len(each) if isinstance(each, str) else 0) for each in condition.parameters)
    return selection.size + len(condition.sql) + parameters
