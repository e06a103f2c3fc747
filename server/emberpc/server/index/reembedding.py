"""Reembedding: replacing the vectors of a collection by those of another model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from datetime import datetime

from emberpc.server.collections import CollectionBackend
from emberpc.server.collections.types import CollectionSpec, Matrix, StoredRecord
from emberpc.server.errors import Code, ServiceError
from emberpc.server.index.collection import Collection

#: Label below those of all records; a damaged label may be negative.
_BEFORE_ALL = -(2**63)
_PAGE = 1000


class Reembedding:
    """Copies the records of a collection, the source, with vectors of another model to a second collection, the target.

    The target then replaces the source. Meanwhile the source serves searches and writes; later writes are copied too.
    The caller embeds the records: it calls `next` and `take` until there are no more records, and then `Index.switch`.
    Use from one thread at a time.

    Args:
        source: the collection whose records are copied.
        target: the collection that will replace the source.
        started: when the reembedding began.
    """

    def __init__(self, source: Collection, target: Collection, started: datetime) -> None:
        self.source = source
        self.target = target
        self.started = started
        #: Records of the source with labels of at most this number were returned by `next`, or are in the target.
        self._label = _BEFORE_ALL

    @property
    def spec(self) -> CollectionSpec:
        """Spec that the collection will have after the reembedding."""
        return self.target.spec

    def counts(self) -> tuple[int, int]:
        """Return the number of records in the target, which were copied, and the number of records in the source."""
        return self.target.count(), self.source.count()

    def next(self, count: int) -> list[StoredRecord]:
        """Return at most `count` further records to embed, in the order of writing.

        Records that the target has with the same revision are left out. The list is empty if there are no more records.

        Raises:
            ServiceError: DATA_LOSS if a record of the source is damaged.
        """
        while found := self.source.written_after(self._label, count):
            self._label = found[-1][0]
            # After a restart of the server, the first records are in the target already.
            present = self.target.revisions([record.id for _, record in found])
            if new := [record for _, record in found if present.get(record.id) != record.revision]:
                return new
        return []

    def source_revisions(self, ids: Sequence[str]) -> dict[str, int]:
        """Return the present revisions of those records that are in the source, by id."""
        return self.source.revisions(ids)

    def rewind(self) -> None:
        """Start again at the first record: `next` then returns all records that the target lacks or has outdated."""
        self._label = _BEFORE_ALL

    def take(self, records: Sequence[StoredRecord], vectors: Matrix) -> None:
        """Write records with their new vectors, float32 (records, dimensions), to the target."""
        self.target.copy(records, vectors)

    def prune(self) -> None:
        """Delete the target's records that were deleted from the source."""
        token, more = "", True
        while more:
            page, token = self.target.page(_PAGE, token)
            ids = [record.id for record in page]
            present = self.source.revisions(ids)
            self.target.delete([each for each in ids if each not in present])
            more = bool(token)

    def is_complete(self) -> bool:
        """Return whether the target has all records of the source, and no others.

        Compares only the numbers of records, and looks for writes that `next` has not returned. So call `prune` before;
        the source must be frozen.
        """
        taken, total = self.counts()
        return taken == total and not self.source.written_after(self._label, 1)


def records_without_text(name: str, count: int) -> ServiceError:
    """Return the error FAILED_PRECONDITION for reembedding the collection `name`: `count` records have no text."""
    return ServiceError(
        Code.FAILED_PRECONDITION,
        f"{count} record{' of' if count == 1 else 's of'} collection {name!r} "
        f"{'has' if count == 1 else 'have'} no text to embed; give {'it' if count == 1 else 'them'} one, "
        "or delete what has none",
        reason="RECORDS_WITHOUT_TEXT",
        metadata={"collection": name, "records": str(count)},
    )


def already_reembedding(name: str) -> ServiceError:
    """Return the error FAILED_PRECONDITION for reembedding the collection `name` during another reembedding."""
    return ServiceError(
        Code.FAILED_PRECONDITION,
        f"collection {name!r} is on its way to another model already; wait, or cancel that",
        reason="REEMBEDDING",
        metadata={"collection": name},
    )


def unreplaced(open_collections: Mapping[str, Future[Collection]], source: CollectionBackend) -> Collection:
    """Return `source` if it is still the open collection of its name.

    Args:
        open_collections: the collections that were opened, even if idle and closed, or are being opened, by name.
        source: the collection that the caller got before.

    Raises:
        ServiceError: UNAVAILABLE if the collection was deleted, or another collection has its name now.
    """
    opened = open_collections.get(source.spec.name)
    present = opened.result() if opened is not None and opened.done() and not opened.exception() else None
    if present is None or present is not source:
        message = f"collection {source.spec.name!r} was deleted or replaced while the call waited; try again"
        raise ServiceError(Code.UNAVAILABLE, message, reason="CLOSED")
    return present
