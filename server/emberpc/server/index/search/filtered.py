"""Select the labels of the records that meet a filter: read them from the store once, and update them after writes."""

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

#: Most bytes of cached labels, vectors and filters of a collection. Evaluating a filter on 100,000 records takes 0.1 s,
#: using a cached selection 20 µs.
_MAX_BYTES = 64 * 2**20
#: Most writes over which a cached selection can be updated. After more, the filter is evaluated again.
_MAX_WRITES = 1000
#: Bytes of the Python object that holds a parameter of a filter, without its characters.
_VALUE_BYTES = 64
#: Most seconds that `wait_for` waits. Memory notes a write within milliseconds of its commit.
_MOMENT = 1.0


@dataclass(frozen=True)
class Selection:
    """The labels of the records that meet a filter after the write `sequence`: int64 (n,), ascending.

    `vectors` are the prepared vectors of the labels, float32 (n, dimensions); None: not read. With vectors, labels that
    have no vector are left out. The checksums of the vectors are not verified when they are read: this would take
    longer than comparing them with a query. `checked` is the growing set of labels whose vectors were verified later.

    `newest` is the greatest label that had been assigned when the write `sequence` was committed.
    """

    sequence: int
    newest: int
    labels: Labels
    vectors: Matrix | None = None
    checked: set[int] = field(default_factory=set, compare=False)

    @property
    def size(self) -> int:
        """Bytes that labels and vectors take in memory."""
        return self.labels.nbytes + (0 if self.vectors is None else self.vectors.nbytes)


class Selector:
    """Selects the records that meet a filter. Safe to use from several threads.

    Labels are never reused and only grow. So a selection is updated after a write by removing the labels that the write
    removed, and adding the labels of matching records that are greater than all labels before the write.

    Args:
        store: the records of the collection.
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
        """Note the labels that a write removed, after graph and buffer have applied the write.

        Writes must come in the order of their sequences.
        """
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
        """Wait until the write of this sequence was noted, for at most a second; then return in any case."""
        with self._lock:
            self._lock.wait_for(lambda: self._applied >= sequence, _MOMENT)

    def select(self, condition: Clause, vectors_up_to: int) -> Selection:
        """Return the selection of a filter, for the store's last write; cache it.

        Args:
            condition: the filter.
            vectors_up_to: read vectors of selections of at most this many labels, if the vectors take at most a quarter
                of the cache. A cached selection may have vectors in any case.
        """
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
        """Return a cached selection updated to the write `sequence`; `kept` itself if there was no write.

        None if the labels that a write in between removed are not known: there were too many writes, or the last write
        is not noted yet.
        """
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
        """Return the labels that have vectors, and these vectors, prepared; checksums are not verified."""
        found, vectors = self._store.vectors(labels.tolist(), checked=False)
        return found, prepare(vectors, self._spec.distance)

    def forget(self) -> None:
        """Clear the cache; called when the vector of a hit turned out to be damaged or deleted."""
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
    """Return the approximate bytes that a cached filter and its selection take in memory."""
    parameters = sum(_VALUE_BYTES + (len(each) if isinstance(each, str) else 0) for each in condition.parameters)
    return selection.size + len(condition.sql) + parameters
