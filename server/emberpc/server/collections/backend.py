"""Protocols of an index backend. The pipelines use them; the embedded index and the Milvus backend implement them."""

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
    """A collection of an index backend. Its calls block. Safe to use from several threads.

    Every method may raise `ServiceError`: INVALID_ARGUMENT for a wrong argument, DATA_LOSS for damaged data, INTERNAL
    if the database fails, UNAVAILABLE after the collection was closed for good or deleted or if the database cannot be
    reached, NOT_FOUND if another server deleted the collection, FAILED_PRECONDITION if the database refuses access,
    DEADLINE_EXCEEDED if the call that the thread runs is cancelled, RESOURCE_EXHAUSTED if the disk is full, no file
    descriptor is free or the database is overloaded, and UNIMPLEMENTED if the backend has no such operation or option.
    """

    @property
    def spec(self) -> CollectionSpec:
        """Spec of the collection; `IndexBackend.update` and `IndexBackend.update_fingerprint` change it."""

    def info(self) -> CollectionInfo:
        """Return record count, sequence of the last write, creation time, and bytes on disk; see `CollectionInfo`."""

    def upsert(
        self, records: Sequence[NewRecord], vectors: Matrix, expected_revisions: Sequence[int] | None = None
    ) -> WriteResult:
        """Insert records, or replace those with the same ids, in one write.

        Args:
            records: the records, at least one, with distinct ids.
            vectors: the vector of each record, float32 (records, dimensions).
            expected_revisions: for each record the revision that it must have now, 0: it is missing; None: no check.

        Raises:
            ServiceError: INVALID_ARGUMENT for records or vectors that cannot be stored; ABORTED if a revision differs.
        """

    def delete(self, ids: Sequence[str]) -> WriteResult:
        """Delete the records with the given ids in one write; ids without a record are ignored."""

    def get(
        self, ids: Sequence[str], *, with_vectors: bool = False, parts: RecordParts = WHOLE_RECORD
    ) -> list[StoredRecord]:
        """Return the existing records in the order of `ids`; RESOURCE_EXHAUSTED if they have too many bytes.

        Args:
            ids: the ids. Ids without a record are left out; a repeated id gives its record again.
            with_vectors: whether the records contain their vectors.
            parts: parts that the records must contain; they may contain more.
        """

    def delete_matching(self, condition: Filter) -> WriteResult:
        """Delete the records that meet a filter, in one write."""

    def page(
        self,
        page_size: int,
        page_token: str,
        *,
        with_vectors: bool = False,
        condition: Filter | None = None,
        parts: RecordParts = WHOLE_RECORD,
    ) -> tuple[list[StoredRecord], str]:
        """Return undamaged records in byte order of ids, and the token of the next page, empty if there is none.

        Args:
            page_size: maximum number of records, 1 to 1000. The limit of a response in bytes may allow fewer.
            page_token: token of the page; empty: the first page. INVALID_ARGUMENT if size or token is wrong.
            with_vectors: whether the records contain their vectors.
            condition: the filter that the records must meet; None: all records.
            parts: parts that the records must contain; they may contain more.
        """

    def count(self, condition: Filter | None = None) -> int:
        """Return the number of records that meet a filter; without a filter, the number of all records."""

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
        """Search for the records nearest to each query; return the outcomes in the order of the queries.

        Args:
            queries: float32 (queries, dimensions).
            top_k: maximum number of hits of each query, 1 to 10,000: one number for all queries, or one for each.
            ef: wanted number of candidates of the search of the graph, at most 1,000,000; 0: the backend chooses.
            min_recall: minimum recall, in (0, 1]; 0: no target. Must be 0 if `ef` is given.
            exclude_ids: for each query an id that its hits must not have, or None; empty: no ids.
            with_vectors: whether the hits contain their vectors.
            conditions: for each query the filter that its hits must meet, or None; empty: no filters.
            parts: parts that the hits must contain; they may contain more.

        Raises:
            ServiceError: INVALID_ARGUMENT for a wrong option or vector; RESOURCE_EXHAUSTED for hits of too many bytes.
        """

    def mismatches(self, condition: Filter) -> list[str]:
        """Return sentences on why no record meets a filter, by at most 1000 records; see `filters.mismatches`."""

    def verify(self, *, full: bool = False) -> Iterator[Verified]:
        """Check that records are undamaged and that searches find them; yield the progress after each step.

        A failed check is no error, but a problem of the yielded progress. The backend may repair problems.

        Args:
            full: whether to search for every record by its own vector; otherwise for a random sample.
        """

    def backup(self, stop: Callable[[], bool]) -> Generator[Piece, None, None]:
        """Yield the bytes of a backup, a copy of one state of the collection, piece by piece.

        `stop` is called regularly before the first piece, and not later. If it returns True, nothing is yielded.

        Raises:
            ServiceError: before the first piece, RESOURCE_EXHAUSTED if the disk has no space for the copy, DATA_LOSS if
                a record is damaged.
        """

    def duplicates(self, min_score: float, stop: Callable[[], bool]) -> list[DuplicatePair]:
        """Return the pairs of records whose vectors have a cosine of at least `min_score`, the greatest cosine first.

        At most the best 100,000 are returned; when `stop` returns True, those found so far. A backend may miss pairs.
        """

    def clusters(self, count: int, examples: int, stop: Callable[[], bool]) -> list[Cluster]:
        """Cluster the records by their vectors; return the clusters, largest first.

        Args:
            count: maximum number of clusters, at least 1; there are fewer if some would be empty.
            examples: maximum number of records of each cluster; RESOURCE_EXHAUSTED if they have too many bytes.
            stop: returns whether to end early; the result is then empty.
        """

    def search_lexical(
        self,
        texts: Sequence[str],
        top_k: Sequence[int],
        *,
        with_vectors: bool = False,
        conditions: Sequence[Filter | None] = (),
        parts: RecordParts = WHOLE_RECORD,
    ) -> list[SearchOutcome]:
        """Search for records with words of each text, ranked by BM25; return the outcomes in the order of the texts.

        Args:
            texts: at least one text.
            top_k: maximum number of hits of each text, 1 to 10,000.
            with_vectors: whether the hits contain their vectors.
            conditions: for each text the filter that its hits must meet, or None; empty: no filters.
            parts: parts that the hits must contain; they may contain more.

        Raises:
            ServiceError: INVALID_ARGUMENT for a wrong argument; RESOURCE_EXHAUSTED for hits of too many bytes;
                UNIMPLEMENTED if the backend indexes no words.
        """

    def search_hybrid(
        self,
        queries: Matrix,
        texts: Sequence[str],
        top_k: Sequence[int],
        *,
        dense_weight: float,
        fusion: Fusion = Fusion.BOUNDS,
        ef: int = 0,
        min_recall: float = 0,
        with_vectors: bool = False,
        conditions: Sequence[Filter | None] = (),
        parts: RecordParts = WHOLE_RECORD,
    ) -> list[SearchOutcome]:
        """Join a dense and a lexical ranking for each query; return the outcomes in the order of the queries.

        Args:
            queries: float32 (queries, dimensions).
            texts: the text of each query.
            top_k: maximum number of hits of each query, 1 to 10,000.
            dense_weight: weight of the dense ranking, 0 to 1; the lexical ranking has 1 - `dense_weight`.
            fusion: the rule that joins the two rankings.
            ef: wanted number of candidates of the search of the graph, at most 1,000,000; 0: the backend chooses.
            min_recall: minimum recall of the dense ranking, in (0, 1]; 0: no target. Must be 0 if `ef` is given.
            with_vectors: whether the hits contain their vectors.
            conditions: for each query the filter that its hits must meet, or None; empty: no filters.
            parts: parts that the hits must contain; they may contain more.

        Raises:
            ServiceError: INVALID_ARGUMENT for a wrong option or vector; RESOURCE_EXHAUSTED for hits of too many bytes;
                UNIMPLEMENTED if the backend indexes no words.
        """


class RestorationBackend(Protocol):
    """Receives a backup and creates a collection from it. Calls must be sequential, except `close`.

    `write` and `finish` may raise `ServiceError`: RESOURCE_EXHAUSTED if the disk is full or no file descriptor is free,
    INTERNAL if a file or database fails, UNAVAILABLE after `close` or after `finish` returned.
    """

    def write(self, data: bytes) -> None:
        """Write the next bytes of the backup to the disk."""

    def finish(self, sha256: str) -> CollectionBackend:
        """Check the bytes that were written against their SHA-256 (hex), and create and return the collection.

        Raises:
            ServiceError: INVALID_ARGUMENT if the bytes are no intact backup or have another SHA-256, `sha256` is empty,
                or `accept` of `restore` refused the spec; FAILED_PRECONDITION if a newer version wrote the backup;
                ALREADY_EXISTS if a collection has the name; RESOURCE_EXHAUSTED if there are too many collections.
        """

    def close(self) -> None:
        """End the restoration, and remove its files unless they became a collection. Safe while another method runs."""


class ReembeddingBackend(Protocol):
    """Replaces the vectors of a collection, the source, by those of another model.

    The records are copied to a new collection. The caller embeds: it calls `next` and `take` until no record remains,
    and then `IndexBackend.switch`. Meanwhile the source serves searches and writes. Use from one thread at a time,
    except `counts`. Methods raise the errors of `CollectionBackend`; after one of the two collections was closed for
    good or deleted, methods that use it raise UNAVAILABLE with the reason CLOSED.
    """

    @property
    def started(self) -> datetime:
        """When the reembedding began."""

    @property
    def spec(self) -> CollectionSpec:
        """Spec that the collection will have after the reembedding."""

    def counts(self) -> tuple[int, int]:
        """Return the number of records of the new collection, which may include deleted ones, and of the source."""

    def next(self, count: int) -> list[StoredRecord]:
        """Return at most `count` further records, in write order, that the new collection lacks or has outdated."""

    def source_revisions(self, ids: Sequence[str]) -> dict[str, int]:
        """Return the present revisions of records of the source, by id; ids without a record are left out."""

    def rewind(self) -> None:
        """Let `next` start again at the first record of the source, as after an error of `take`."""

    def take(self, records: Sequence[StoredRecord], vectors: Matrix) -> None:
        """Store records of `next` with new vectors, float32 (records, dimensions), in the new collection."""

    def prune(self) -> None:
        """Delete the records of the new collection that the source no longer has."""

    def is_complete(self) -> bool:
        """Return whether the new collection is complete: as many records as the source, and none left for `next`.

        Call `take` for all records of `next`, and `prune`, before. No write to the source may run meanwhile.
        """


class IndexBackend(Protocol):
    """All collections of an index backend, by name. Its calls block. Safe to use from several threads.

    Most methods may raise `ServiceError`: INTERNAL if a database or the data directory fails, UNAVAILABLE after the
    index was closed or if a database cannot be reached, FAILED_PRECONDITION if a database refuses access,
    RESOURCE_EXHAUSTED if the disk is full, no file descriptor is free or a database is overloaded, and UNIMPLEMENTED if
    the backend has no such operation. `opened` and `probed` neither block nor raise errors.
    """

    def create(self, spec: CollectionSpec) -> CollectionBackend:
        """Create and return an empty collection.

        Raises:
            ServiceError: INVALID_ARGUMENT for a spec that is wrong or that the backend does not support; ALREADY_EXISTS
                if a collection has the name; RESOURCE_EXHAUSTED if the disk is full or there are too many collections.
        """

    def get(self, name: str) -> CollectionBackend:
        """Return the collection with a name. The first call for a name may take long, since it loads the collection.

        Raises:
            ServiceError: NOT_FOUND if there is no such collection; INTERNAL if its files are damaged.
        """

    def opened(self, name: str) -> CollectionBackend | None:
        """Return the collection with a name if the backend has it at hand; None: unknown, call `get`."""

    def page(self, page_size: int, page_token: str) -> tuple[list[CollectionSpec], str]:
        """Return a page of specs, sorted by name, and the token of the next page, empty after the last.

        `page_size` is 1 to 1000; an empty `page_token` means the first page. INVALID_ARGUMENT if one of them is wrong.
        """

    def update(self, name: str, truncation: str) -> None:
        """Change how a collection truncates texts that are too long for its model: `refuse`, `end` or `start`.

        Raises:
            ServiceError: NOT_FOUND if there is no such collection; INVALID_ARGUMENT for any other `truncation`.
        """

    def update_fingerprint(self, name: str, legacy: str, fingerprint: str) -> CollectionBackend:
        """Bind a collection to another fingerprint of its model, and return the collection, changed or not.

        Args:
            name: name of the collection.
            legacy: the fingerprint that is replaced. A collection with another fingerprint stays unchanged.
            fingerprint: the new fingerprint.

        Raises:
            ServiceError: NOT_FOUND if there is no such collection; RESOURCE_EXHAUSTED if the disk is full.
        """

    def delete(self, name: str) -> None:
        """Delete the collection with a name, its records and its reembedding; NOT_FOUND if it does not exist."""

    def reembed(
        self, source: CollectionBackend, *, model: str, fingerprint: str, dimensions: int
    ) -> ReembeddingBackend:
        """Begin to reembed the records of a collection with another model, and return the reembedding.

        Args:
            source: the collection, as `get` returned it.
            model: name of the new model.
            fingerprint: fingerprint of the new model.
            dimensions: dimensions of the new vectors.

        Raises:
            ServiceError: UNAVAILABLE if the collection was deleted or replaced; FAILED_PRECONDITION if a record has no
                text, or the collection is being reembedded; INVALID_ARGUMENT for wrong dimensions.
        """

    def reembeddings(self) -> Sequence[ReembeddingBackend]:
        """Return the reembeddings that an earlier run of the server left unfinished. Call this once, at the start."""

    def switch(self, reembedding: ReembeddingBackend) -> bool:
        """Replace a collection by its reembedded copy if all records have new vectors; return whether that was done.

        False: records remain to embed, or the reembedding was cancelled. RESOURCE_EXHAUSTED if the disk is full.
        """

    def cancel_reembedding(self, name: str) -> None:
        """Cancel a collection's reembedding, and delete the new vectors; do nothing if there is no reembedding."""

    def restore(self, name: str, total: int, accept: Callable[[CollectionSpec], None]) -> RestorationBackend:
        """Begin to restore a backup as a new collection.

        Args:
            name: name of the new collection.
            total: bytes of the backup; 0: not known.
            accept: receives the spec in the backup; raises ValueError or ServiceError if the spec cannot be served.

        Raises:
            ServiceError: INVALID_ARGUMENT for a wrong name; ALREADY_EXISTS if a collection has the name;
                RESOURCE_EXHAUSTED if the disk has no space or there are too many collections.
        """

    def probed(self) -> dict[str, ProbeFigures]:
        """Return the measured recall of searches, by name of the collection; only of collections with measurements."""

    def close(self, deadline: Deadline | None = None) -> bool:
        """Close all collections; return whether all are closed. A backend may first wait for the calls in progress.

        It waits until `deadline` (None: without limit); a collection with calls that still run then is not closed.
        """


def no_collection(name: str) -> ServiceError:
    """Return the NOT_FOUND error for a missing collection."""
    return not_found("collection", name, "create it, or list the collections to find the name of another")


def collection_exists(name: str) -> ServiceError:
    """Return the ALREADY_EXISTS error for a new collection whose name another collection has."""
    return ServiceError(
        Code.ALREADY_EXISTS,
        f"there is a collection {name!r} already; use it, delete it, or choose another name",
        reason="COLLECTION_EXISTS",
        metadata={"collection": name},
    )


def unsupported(operation: str, backend: str, remedy: str) -> ServiceError:
    """Return the UNIMPLEMENTED error for an operation that a backend does not support.

    `operation` is an RPC or option, `backend` the value of `--index-backend`, and `remedy` what the caller can do.
    """
    return ServiceError(
        Code.UNIMPLEMENTED,
        f"{operation} is not supported by the index backend {backend!r}; {remedy}",
        reason="BACKEND_UNSUPPORTED",
        metadata={"operation": operation, "backend": backend},
    )
