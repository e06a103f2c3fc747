"""What the services need of an index: the embedded one and one on another engine are the same to them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from datetime import datetime
from typing import Protocol

from emberpc.server.collections.filters import Filter
from emberpc.server.collections.types import (
    WHOLE_RECORD,
    Cluster,
    CollectionInfo,
    CollectionSpec,
    DuplicatePair,
    Fusion,
    Matrix,
    NewRecord,
    Piece,
    ProbeFigures,
    RecordParts,
    SearchOutcome,
    StoredRecord,
    Verified,
    WriteResult,
)
from emberpc.server.deadlines import Deadline
from emberpc.server.errors import Code, ServiceError, not_found


class CollectionBackend(Protocol):
    """A collection, as `Collection` documents it: what it takes, gives and raises. Safe to use from several threads."""

    @property
    def spec(self) -> CollectionSpec:
        """What it is."""

    def info(self) -> CollectionInfo:
        """Say how it stands."""

    def upsert(
        self, records: Sequence[NewRecord], vectors: Matrix, expected_revisions: Sequence[int] | None = None
    ) -> WriteResult:
        """Insert records or replace those of the same id; vectors are float32 (records, dimensions)."""

    def delete(self, ids: Sequence[str]) -> WriteResult:
        """Delete records by id; ids that are not there are no error."""

    def get(
        self, ids: Sequence[str], *, with_vectors: bool = False, parts: RecordParts = WHOLE_RECORD
    ) -> list[StoredRecord]:
        """Return the records of those ids that are there, in the order asked for."""

    def delete_matching(self, condition: Filter) -> WriteResult:
        """Delete the records that meet a condition."""

    def page(
        self,
        page_size: int,
        page_token: str,
        *,
        with_vectors: bool = False,
        condition: Filter | None = None,
        parts: RecordParts = WHOLE_RECORD,
    ) -> tuple[list[StoredRecord], str]:
        """Return a page of records by id in byte order, and the token of the next page, empty after the last."""

    def count(self, condition: Filter | None = None) -> int:
        """Return the number of records, with a condition, of those that meet it."""

    def search(
        self,
        queries: Matrix,
        top_k: int | Sequence[int],
        *,
        ef: int = 0,
        min_recall: float = 0,
        exclude_ids: Sequence[str | None] = (),
        with_vectors: bool = False,
        conditions: Sequence[Filter | None] = (),
        parts: RecordParts = WHOLE_RECORD,
    ) -> list[SearchOutcome]:
        """Find the records nearest to each query; queries are float32 (queries, dimensions)."""

    def mismatches(self, condition: Filter) -> list[str]:
        """Return a sentence for each comparison with a number whose field holds strings only."""

    def verify(self, *, full: bool = False) -> Iterator[Verified]:
        """Check that every record is there, undamaged and found, some hundred records a step.

        Args:
            full: search for every record by its own vector; otherwise for a random sample.
        """

    def backup(self, stop: Callable[[], bool]) -> Generator[Piece, None, None]:
        """Give a copy of one state of the collection, piece by piece; ends early when told to stop, or closed."""

    def duplicates(self, min_score: float, stop: Callable[[], bool]) -> list[DuplicatePair]:
        """Find pairs of records that are much alike; ends early when told to stop."""

    def clusters(self, count: int, examples: int, stop: Callable[[], bool]) -> list[Cluster]:
        """Group the records by likeness; ends early when told to stop."""

    def search_words(
        self,
        texts: Sequence[str],
        top_k: Sequence[int],
        *,
        with_vectors: bool = False,
        conditions: Sequence[Filter | None] = (),
        parts: RecordParts = WHOLE_RECORD,
    ) -> list[SearchOutcome]:
        """Find the records with words of each text."""

    def search_both(
        self,
        queries: Matrix,
        texts: Sequence[str],
        top_k: Sequence[int],
        *,
        dense_weight: float,
        fusion: Fusion = Fusion.SCORES,
        ef: int = 0,
        min_recall: float = 0,
        with_vectors: bool = False,
        conditions: Sequence[Filter | None] = (),
        parts: RecordParts = WHOLE_RECORD,
    ) -> list[SearchOutcome]:
        """Find records by vectors and by words, fused."""


class RestorationBackend(Protocol):
    """Takes in a backup, as `Restoration` documents it; `close` may come at any time."""

    def write(self, data: bytes) -> None:
        """Take in the next bytes."""

    def finish(self, sha256: str) -> CollectionBackend:
        """Check what came, whose SHA-256 (hex) is given, and make a collection of it."""

    def close(self) -> None:
        """Remove all that came, unless it became a collection."""


class ReembeddingBackend(Protocol):
    """Replaces the vectors of a collection by those of another model, as `Reembedding` documents it."""

    @property
    def started(self) -> datetime:
        """Return when it began."""

    @property
    def spec(self) -> CollectionSpec:
        """Return the spec that the collection will have."""

    def counts(self) -> tuple[int, int]:
        """Return the number of records with new vectors, and of all records."""

    def next(self, count: int) -> list[StoredRecord]:
        """Return at most `count` records to embed; an empty list when all present records were returned."""

    def source_revisions(self, ids: Sequence[str]) -> dict[str, int]:
        """Return the present revisions of records of the source, by id."""

    def rewind(self) -> None:
        """Start again at the first record; `next` then returns those without a new vector."""

    def take(self, records: Sequence[StoredRecord], vectors: Matrix) -> None:
        """Store records with their new vectors, float32 (records, dimensions)."""

    def prune(self) -> None:
        """Delete the records that the source no longer has."""

    def is_complete(self) -> bool:
        """Return whether the new collection has exactly the records of the source."""


class IndexBackend(Protocol):
    """Collections by name, as `Index` documents them. Safe to use from several threads."""

    def create(self, spec: CollectionSpec) -> CollectionBackend:
        """Create a collection."""

    def get(self, name: str) -> CollectionBackend:
        """Return a collection."""

    def opened(self, name: str) -> CollectionBackend | None:
        """Return a collection that is at hand, without waiting for anything; None: only `get` can tell."""

    def page(self, page_size: int, page_token: str) -> tuple[list[CollectionSpec], str]:
        """Return what the collections of a page are, by name, and the token of the next page, empty after the last."""

    def update(self, name: str, truncation: str) -> None:
        """Set how a collection truncates over-long texts."""

    def rebind(self, name: str, legacy: str, fingerprint: str) -> CollectionBackend:
        """Bind a collection to its model by another fingerprint, if it is bound by `legacy`; return the collection."""

    def delete(self, name: str) -> None:
        """Delete a collection."""

    def reembed(self, spec: CollectionSpec) -> ReembeddingBackend:
        """Begin to take a collection's records over to the model of a spec."""

    def reembeddings(self) -> Sequence[ReembeddingBackend]:
        """Return those that were under way when the index was last closed."""

    def switch(self, reembedding: ReembeddingBackend) -> bool:
        """Let the new collection take the old one's place if it has all records; return whether it did."""

    def cancel_reembedding(self, name: str) -> None:
        """Give up what was taken over of a collection; nothing if there is nothing."""

    def restore(self, name: str, total: int, accept: Callable[[CollectionSpec], None]) -> RestorationBackend:
        """Begin to make a collection of a backup of `total` bytes; 0: not known.

        `accept` raises ValueError or ServiceError if the collection cannot be served.
        """

    def probed(self) -> dict[str, ProbeFigures]:
        """Return what probes of searches found, by collection; nothing where there are none."""

    def close(self, deadline: Deadline | None = None) -> bool:
        """Let calls under way finish, and give everything up; return whether that was done by the deadline."""


def no_collection(name: str) -> ServiceError:
    """Return the NOT_FOUND error for a collection that is not there."""
    return not_found("collection", name, "see ListCollections, or create it")


def collection_exists(name: str) -> ServiceError:
    """Return the ALREADY_EXISTS error for a collection that is to be created and is there."""
    return ServiceError(
        Code.ALREADY_EXISTS,
        f"there is a collection {name!r} already; use it, delete it, or choose another name",
        reason="COLLECTION_EXISTS",
        metadata={"collection": name},
    )


def unsupported(operation: str, backend: str, remedy: str) -> ServiceError:
    """Return the UNIMPLEMENTED error for what a backend cannot do.

    Args:
        operation: what was asked for, as the request calls it, such as `expected_revisions`.
        backend: the backend's name, as `--index-backend` has it.
        remedy: what to do instead.
    """
    return ServiceError(
        Code.UNIMPLEMENTED,
        f"{operation} is not supported by the index backend {backend!r}; {remedy}",
        reason="BACKEND_UNSUPPORTED",
        metadata={"operation": operation, "backend": backend},
    )
