"""Reembedding: replacing the vectors of a collection by those of another model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from datetime import datetime

from emberpc.server.collections import CollectionBackend
from emberpc.server.collections.types import CollectionSpec, Matrix, StoredRecord
from emberpc.server.errors import Code, ServiceError
from emberpc.server.index.collection import Collection

#: Label to start after: SQLite's smallest integer, since a damaged label may be negative.
_BEFORE_ALL = -(2**63)
_PAGE = 1000


class Reembedding:
    """Copies the records of a collection, the source, with vectors of another model to a second collection, the target.

    Meanwhile the source serves searches and writes; records written meanwhile are copied too. The caller embeds: it
    calls `next` and `take` until `next` returns no records, and then `Index.switch`, which replaces the source by the
    target, or returns False if records remain. Use from one thread at a time, except `spec` and `counts`.

    Reading and writing raise UNAVAILABLE after one of the two collections was closed for good or deleted.

    Args:
        source: the collection whose records are copied.
        target: the collection that will replace the source.
        started: when the reembedding began.
    """

    def __init__(self, source: Collection, target: Collection, started: datetime) -> None:
        self.source = source
        self.target = target
        self.started = started
        #: Greatest label that `next` has read from the source since the last `rewind`.
        self._label = _BEFORE_ALL

    @property
    def spec(self) -> CollectionSpec:
        """Spec that the collection will have after the reembedding."""
        return self.target.spec

    def counts(self) -> tuple[int, int]:
        """Return the number of records in the target, and in the source.

        Before `prune`, the target may still have records that were deleted from the source.
        """
        return self.target.count(), self.source.count()

    def next(self, count: int) -> list[StoredRecord]:
        """Return at most `count` further records to embed, without vectors, in the order of writing.

        Records that the target has with the same revision are left out. Empty only if no records remain now; later
        writes may add some.

        Raises:
            ServiceError: DATA_LOSS if one of the records read here is damaged.
        """
        while found := self.source.written_after(self._label, count):
            self._label = found[-1][0]
            # After a restart of the server or `rewind`, the target has the first records already.
            present = self.target.revisions([record.id for _, record in found])
            if new := [record for _, record in found if present.get(record.id) != record.revision]:
                return new
        return []

    def source_revisions(self, ids: Sequence[str]) -> dict[str, int]:
        """Return the present revisions of those records among `ids` that are in the source, by id."""
        return self.source.revisions(ids)

    def rewind(self) -> None:
        """Start again at the first record: `next` then returns the records that the target lacks or has outdated."""
        self._label = _BEFORE_ALL

    def take(self, records: Sequence[StoredRecord], vectors: Matrix) -> None:
        """Write records with their revisions, times and new vectors, float32 (records, dimensions), to the target.

        Records of the target with the same ids are replaced.

        Raises:
            ServiceError: INVALID_ARGUMENT if a vector is invalid, RESOURCE_EXHAUSTED if the disk is full.
        """
        self.target.copy(records, vectors)

    def prune(self) -> None:
        """Delete the target's records whose ids the source has no more."""
        token, more = "", True
        while more:
            page, token = self.target.page(_PAGE, token)
            ids = [record.id for record in page]
            present = self.source.revisions(ids)
            self.target.delete([each for each in ids if each not in present])
            more = bool(token)

    def is_complete(self) -> bool:
        """Return whether the target has all records of the source, and no others.

        Only compares the numbers of records, and looks for records that `next` has not read. So before this, `take` all
        records that `next` returned, and call `prune`. The source must be frozen.
        """
        taken, total = self.counts()
        return taken == total and not self.source.written_after(self._label, 1)


def records_without_text(name: str, count: int) -> ServiceError:
    """Return the error FAILED_PRECONDITION of a request to reembed collection `name`: `count` records have no text."""
    return ServiceError(
        Code.FAILED_PRECONDITION,
        f"{count} record{' of' if count == 1 else 's of'} collection {name!r} "
        f"{'has' if count == 1 else 'have'} no text to embed; give {'it' if count == 1 else 'them'} one, "
        "or delete what has none",
        reason="RECORDS_WITHOUT_TEXT",
        metadata={"collection": name, "records": str(count)},
    )


def already_reembedding(name: str) -> ServiceError:
    """Return the error FAILED_PRECONDITION of a request to reembed collection `name`, which is being reembedded."""
    return ServiceError(
        Code.FAILED_PRECONDITION,
        f"collection {name!r} is on its way to another model already; wait, or cancel that",
        reason="REEMBEDDING",
        metadata={"collection": name},
    )


def unreplaced(open_collections: Mapping[str, Future[Collection]], source: CollectionBackend) -> Collection:
    """Return `source` if it is still the collection of its name.

    Args:
        open_collections: the collections that were opened, even if idle and closed, or are being opened, by name.
        source: the collection that the caller got before.

    Raises:
        ServiceError: UNAVAILABLE if the collection was deleted, or replaced by its reembedded copy.
    """
    opened = open_collections.get(source.spec.name)
    present = opened.result() if opened is not None and opened.done() and not opened.exception() else None
    if present is None or present is not source:
        message = f"collection {source.spec.name!r} was deleted or replaced while the call waited; try again"
        raise ServiceError(Code.UNAVAILABLE, message, reason="CLOSED")
    return present
