"""Protocols of an index backend, which the services call; the embedded backend and Milvus implement them."""

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
    """A collection; `Collection` documents arguments, results and errors. Safe to use from several threads."""

    @property
    def spec(self) -> CollectionSpec:
        """Spec of the collection."""

    def info(self) -> CollectionInfo:
        """Return record count, sequence, creation time and size."""

    def upsert(
        self, records: Sequence[NewRecord], vectors: Matrix, expected_revisions: Sequence[int] | None = None
    ) -> WriteResult:
        """Insert records or replace those with the same ids; vectors are float32 (records, dimensions)."""

    def delete(self, ids: Sequence[str]) -> WriteResult:
        """Delete records by id; missing ids are ignored."""

    def get(
        self, ids: Sequence[str], *, with_vectors: bool = False, parts: RecordParts = WHOLE_RECORD
    ) -> list[StoredRecord]:
        """Return the existing records among the ids, in their order."""

    def delete_matching(self, condition: Filter) -> WriteResult:
        """Delete the records that meet a filter."""

    def page(
        self,
        page_size: int,
        page_token: str,
        *,
        with_vectors: bool = False,
        condition: Filter | None = None,
        parts: RecordParts = WHOLE_RECORD,
    ) -> tuple[list[StoredRecord], str]:
        """Return a page of records in byte order of ids, and the token of the next page, empty after the last."""

    def count(self, condition: Filter | None = None) -> int:
        """Return the number of records, or of those that meet a filter."""

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
        """Search for the records nearest to each query; queries are float32 (queries, dimensions)."""

    def mismatches(self, condition: Filter) -> list[str]:
        """Return why a filter without matches probably matches nothing; see `filters.mismatches`."""

    def verify(self, *, full: bool = False) -> Iterator[Verified]:
        """Check that every record exists, is undamaged and is found; yields progress every few hundred records.

        Args:
            full: whether to search for every record by its own vector; otherwise for a random sample.
        """

    def backup(self, stop: Callable[[], bool]) -> Generator[Piece, None, None]:
        """Yield a copy of one state of the collection, piece by piece; ends early if stopped or closed."""

    def duplicates(self, min_score: float, stop: Callable[[], bool]) -> list[DuplicatePair]:
        """Find pairs of records with a score of at least `min_score`; ends early if stopped."""

    def clusters(self, count: int, examples: int, stop: Callable[[], bool]) -> list[Cluster]:
        """Cluster the records by similarity; ends early if stopped."""

    def search_words(
        self,
        texts: Sequence[str],
        top_k: Sequence[int],
        *,
        with_vectors: bool = False,
        conditions: Sequence[Filter | None] = (),
        parts: RecordParts = WHOLE_RECORD,
    ) -> list[SearchOutcome]:
        """Search for records with words of each text."""

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
        """Search for records by vectors and by words, with both rankings fused."""


class RestorationBackend(Protocol):
    """Receives a backup, as `Restoration` documents; `close` may be called at any time."""

    def write(self, data: bytes) -> None:
        """Write the next bytes of the backup."""

    def finish(self, sha256: str) -> CollectionBackend:
        """Check the bytes against their SHA-256 (hex), and create the collection."""

    def close(self) -> None:
        """Remove all files, unless they became a collection."""


class ReembeddingBackend(Protocol):
    """Replaces the vectors of a collection by those of another model, as `Reembedding` documents."""

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
        """Delete the records of the new collection that the reembedded collection no longer has."""

    def is_complete(self) -> bool:
        """Return whether the new collection has exactly the records of the source."""


class IndexBackend(Protocol):
    """Collections by name, as `Index` documents them. Safe to use from several threads."""

    def create(self, spec: CollectionSpec) -> CollectionBackend:
        """Create a collection."""

    def get(self, name: str) -> CollectionBackend:
        """Return a collection."""

    def opened(self, name: str) -> CollectionBackend | None:
        """Return a collection if it is open, without waiting; None: call `get`."""

    def page(self, page_size: int, page_token: str) -> tuple[list[CollectionSpec], str]:
        """Return a page of specs, sorted by name, and the token of the next page, empty after the last."""

    def update(self, name: str, truncation: str) -> None:
        """Set how a collection truncates over-long texts."""

    def rebind(self, name: str, legacy: str, fingerprint: str) -> CollectionBackend:
        """Bind a collection to another fingerprint of its model if it has the fingerprint `legacy`; return it."""

    def delete(self, name: str) -> None:
        """Delete a collection."""

    def reembed(
        self, source: CollectionBackend, *, model: str, fingerprint: str, dimensions: int
    ) -> ReembeddingBackend:
        """Begin to re-embed a collection's records with another model; UNAVAILABLE if the collection was deleted."""

    def reembeddings(self) -> Sequence[ReembeddingBackend]:
        """Return the re-embeddings that were unfinished when the index was last closed."""

    def switch(self, reembedding: ReembeddingBackend) -> bool:
        """Replace the collection by its re-embedded copy if that has all records; return whether it was replaced."""

    def cancel_reembedding(self, name: str) -> None:
        """Drop the re-embedding of a collection; does nothing if there is none."""

    def restore(self, name: str, total: int, accept: Callable[[CollectionSpec], None]) -> RestorationBackend:
        """Begin to restore a backup of `total` bytes (0: not known) as a new collection.

        `accept` raises ValueError or ServiceError if the collection cannot be served.
        """

    def probed(self) -> dict[str, ProbeFigures]:
        """Return the figures of search probes by collection; empty if there are none."""

    def close(self, deadline: Deadline | None = None) -> bool:
        """Wait for calls in progress and close all collections; return whether that was done by the deadline."""


def no_collection(name: str) -> ServiceError:
    """Return the NOT_FOUND error for a missing collection."""
    return not_found("collection", name, "see ListCollections, or create it")


def collection_exists(name: str) -> ServiceError:
    """Return the ALREADY_EXISTS error for creating a collection whose name exists."""
    return ServiceError(
        Code.ALREADY_EXISTS,
        f"there is a collection {name!r} already; use it, delete it, or choose another name",
        reason="COLLECTION_EXISTS",
        metadata={"collection": name},
    )


def unsupported(operation: str, backend: str, remedy: str) -> ServiceError:
    """Return the UNIMPLEMENTED error for an operation that a backend does not support.

    Args:
        operation: name of the operation in the request, such as `expected_revisions`.
        backend: name of the backend in `--index-backend`.
        remedy: what the caller can do instead.
    """
    return ServiceError(
        Code.UNIMPLEMENTED,
        f"{operation} is not supported by the index backend {backend!r}; {remedy}",
        reason="BACKEND_UNSUPPORTED",
        metadata={"operation": operation, "backend": backend},
    )
