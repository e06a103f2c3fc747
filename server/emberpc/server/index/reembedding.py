"""A collection on its way to another model."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from emberpc.server.collections.types import CollectionSpec, Matrix, StoredRecord
from emberpc.server.index.collection import Collection

_PAGE = 1000


class Reembedding:
    """A second collection takes the records of one over, with vectors of another model, and then its place.

    Meanwhile the first one answers and is written to; what is written goes over
    too. Whoever embeds calls `next` and `take` until there is no more, and then
    asks the index to switch. One thread at a time.

    Args:
        source: the collection.
        target: the one that is to take its place.
        started: since when.
    """

    def __init__(self, source: Collection, target: Collection, started: datetime) -> None:
        self.source = source
        self.target = target
        self.started = started
        #: Of the source: all up to this label was given out, or is there.
        self._label = 0

    @property
    def spec(self) -> CollectionSpec:
        """What the collection will be."""
        return self.target.spec

    def counts(self) -> tuple[int, int]:
        """Return how many records were taken over, and how many there are."""
        return self.target.count(), self.source.count()

    def next(self, count: int) -> list[StoredRecord]:
        """Return records to embed, at most so many; none: all that there are now were given out."""
        while found := self.source.written_after(self._label, count):
            self._label = found[-1][0]
            # After a restart most are there already.
            present = self.target.revisions([record.id for _, record in found])
            if new := [record for _, record in found if present.get(record.id) != record.revision]:
                return new
        return []

    def source_revisions(self, ids: Sequence[str]) -> dict[str, int]:
        """Return the present revisions of records of the source, by id."""
        return self.source.revisions(ids)

    def rewind(self) -> None:
        """Look through all records again for those that are not there."""
        self._label = 0

    def take(self, records: Sequence[StoredRecord], vectors: Matrix) -> None:
        """Take records over with their new vectors, float32 (records, dimensions)."""
        self.target.copy(records, vectors)

    def prune(self) -> None:
        """Delete what was deleted from the source since it was taken over."""
        token, more = "", True
        while more:
            page, token = self.target.page(_PAGE, token)
            ids = [record.id for record in page]
            present = self.source.revisions(ids)
            self.target.delete([each for each in ids if each not in present])
            more = bool(token)

    def is_complete(self) -> bool:
        """Whether the target has just the records that the source has; to be asked while the source is frozen."""
        taken, total = self.counts()
        return taken == total and not self.source.written_after(self._label, 1)
