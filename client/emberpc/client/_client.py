"""The client for ordinary code."""

from __future__ import annotations

# What the methods have in common is said once, in the docstring of the class.
# ruff: noqa: D417
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any

import grpc
import numpy.typing as npt

from emberpc.client import _checks, _collections, _index
from emberpc.client._calls import Call, Page
from emberpc.client._client_backup import BackupCalls
from emberpc.client._client_groups import GroupCalls
from emberpc.client._client_models import ModelCalls
from emberpc.client._connection import TLS, Connection
from emberpc.client._running import Runner
from emberpc.client._text_methods import TextMethods
from emberpc.client._upsert_stream import UpsertJob
from emberpc.client.exceptions import AlreadyExists
from emberpc.client.filters import Where
from emberpc.client.types import (
    Collection,
    Distance,
    Fusion,
    Hit,
    Progress,
    Query,
    Record,
    SearchMode,
    SearchQuery,
    SearchResult,
    Truncation,
    UpsertCheckpoint,
    UpsertResult,
)


class Client(TextMethods, GroupCalls, BackupCalls, ModelCalls):
    """A connection to an emberpc server. Any number of threads may use it.

    Every call has a deadline; `embed_stream` and `upsert_stream`, which may take
    days, have one for the next answer. A call that no server took, or that a stopping one refused
    (UNAVAILABLE), is repeated up to four times within it, with growing pauses. One that had run for more than 5
    seconds is not, since its work would begin from zero: it raises Unavailable. Nor is `restore_collection`.
    A repeated write is written once, but what it answers may
    tell of the first try whose answer was lost: `create_collection` may raise
    AlreadyExists and `delete_collection` NotFound for what the call itself
    did, `upsert` may count as updated what it inserted, and `delete` may count
    fewer. After `close()` every call raises Cancelled.

    What the methods have in common: `timeout` is in seconds, for each request;
    None: that of the constructor. A list longer than `batch_size` is sent in
    several requests; results keep the order, and an error names the item by its
    index in the whole list. `progress` is told how many items are done. Arguments
    are checked before anything is sent.

    Args:
        target: HOST:PORT, HOST for port 50051, or any target that gRPC knows; calls are spread over all its addresses.
        timeout: seconds that one request may take, its repetitions included; at most a hundred years.
        tls: how to encrypt; None: plain text.
        token: sent as `authorization: Bearer`; refused in plain text unless the target is on this host.
        in_flight: requests that one method call keeps in flight; more is of use where several servers stand behind
            the target.
        channel: an open channel to use instead of making one, such as one to a server in a test. It stays open, and
            its settings are the caller's.

    Raises:
        InputError: an argument is wrong.
        InputTypeError: an argument has the wrong type.
    """

    def __init__(
        self,
        target: str = "localhost:50051",
        *,
        timeout: float = 30.0,
        tls: TLS | None = None,
        token: str | None = None,
        in_flight: int = 2,
        channel: grpc.Channel | None = None,
    ) -> None:
        connection = Connection(target, timeout, tls, token, in_flight, own_channel=channel is not None)
        self._runner = Runner(connection, channel)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; calls in flight fail with Cancelled. A channel given to the constructor stays open."""
        self._runner.close()

    def create_collection(
        self,
        name: str,
        *,
        model: str = "",
        dimensions: int = 0,
        distance: Distance = "cosine",
        truncation: Truncation = "refuse",
        m: int = 0,
        ef_construction: int = 0,
        indexed_fields: Iterable[str] = (),
        exist_ok: bool = False,
        timeout: float | None = None,
    ) -> Collection:
        """Create a collection.

        Args:
            name: 1 to 128 letters, digits, `.`, `_` and `-`.
            model: the embedding model of its texts; empty: it takes vectors only.
            dimensions: of its vectors; 0: the model's.
            distance: how vectors compare.
            truncation: how the over-long texts of records are truncated, unless an upsert says otherwise.
            m: links of a node of its graph, per layer, 4 to 64; 0: the server's default.
            ef_construction: candidates kept while inserting, 16 to 2000; 0: the server's default.
            indexed_fields: metadata fields that filters use often, at most 16; each slows down every write a little.
            exist_ok: if there is a collection of that name, return it unchanged instead of raising AlreadyExists.
                Its model and distance must be the same, and so must `dimensions`, `m` and `ef_construction` if given.

        Raises:
            AlreadyExists: there is one of that name, perhaps made by a try of this very call whose answer was lost;
                or, with `exist_ok`, one that differs.
            EmberpcError: the call failed otherwise.
        """
        call = _collections.create_collection(
            name,
            model=model,
            dimensions=dimensions,
            distance=distance,
            truncation=truncation,
            m=m,
            ef_construction=ef_construction,
            indexed_fields=indexed_fields,
        )
        try:
            return self._runner.run_one(call, timeout)
        except AlreadyExists as error:
            if not _checks.flag(exist_ok, "exist_ok"):
                raise
            found = self._runner.run_one(_collections.get_collection(name), timeout)
            return _collections.check_alike(found, call.request, error)

    def get_collection(self, name: str, *, timeout: float | None = None) -> Collection:
        """Describe a collection; raises NotFound if there is none of that name."""
        return self._runner.run_one(_collections.get_collection(name), timeout)

    def collections(self, *, timeout: float | None = None) -> Iterator[Collection]:
        """Walk over the collections, by name."""
        return self._runner.pages(_collections.list_collections, timeout)

    def update_collection(self, name: str, truncation: Truncation, *, timeout: float | None = None) -> Collection:
        """Change how a collection truncates the over-long texts of records; the records that it has stay as they are.

        Raises:
            NotFound: there is none of that name.
        """
        return self._runner.run_one(_collections.update_collection(name, truncation), timeout)

    def delete_collection(self, name: str, *, timeout: float | None = None) -> None:
        """Delete a collection with all its records; raises NotFound if there is none of that name."""
        return self._runner.run_one(_collections.delete_collection(name), timeout)

    def upsert(
        self,
        collection: str,
        records: Iterable[Record | Mapping[str, Any]],
        *,
        vectors: npt.ArrayLike | None = None,
        truncation: Truncation | None = None,
        expected_revisions: Iterable[int] | None = None,
        batch_size: int = 256,
        progress: Progress | None = None,
        timeout: float | None = None,
    ) -> UpsertResult:
        """Insert records, or replace those of the same id.

        Records are taken as they are needed and sent one request after the
        other. Each request is atomic. If one fails, the records of those before
        it are written: the error says how many they are. Doing it all again does
        no harm, unless `expected_revisions` is given.

        Args:
            collection: name of the collection.
            records: records, or dicts with `id` and any of `text`, `metadata`, `label`, `vector`.
            vectors: shape (records, dimensions), if the server is not to embed the texts; then all records are taken
                at once.
            truncation: how over-long texts are truncated; None: as the collection says.
            expected_revisions: item i is the `revision` that record i must have in the collection, 0 if no record of
                its id may exist. All records are then checked before anything is sent.

        Raises:
            Aborted: a record has another revision, perhaps from a try of this very call whose answer was lost. Nothing
                of its request was written; `done` records of the requests before it are.
            InputError: a record is wrong; the requests before its own were sent.
            InputTypeError: a record has a wrong type; the requests before its own were sent.
            EmberpcError: a call failed.
        """
        job = _index.upsert(
            collection,
            records,
            matrix=vectors,
            truncation=truncation,
            expected_revisions=expected_revisions,
            batch_size=batch_size,
            progress=progress,
        )
        return self._runner.run(job, timeout)

    def upsert_stream(
        self,
        collection: str,
        records: Iterable[Record | Mapping[str, Any]],
        *,
        truncation: Truncation | None = None,
        batch_size: int = 64,
        window: int = 1024,
        timeout: float | None = None,
    ) -> Iterator[UpsertCheckpoint]:
        """Insert records of any number, or replace those of the same id; a bad record fails alone.

        The server embeds the next ones while some go to disk. If the connection
        breaks or the server is restarted, what was not acknowledged is sent again.

        Args:
            collection: name of the collection.
            records: records, or dicts with their fields, some of them with vectors if need be; read as they are needed,
                in the thread that takes the checkpoints.
            truncation: how over-long texts are truncated; None: as the collection says.
            batch_size: records of one request, which is atomic but for those that fail.
            window: most records that are read and not yet acknowledged; fewer if they have more than 32 MiB.
            timeout: seconds in which no record at all is acknowledged, attempts to connect again included.

        Returns:
            Checkpoints, to be taken one by one: how many are on disk, and which have failed. To stop early, `close()`
            the iterator or let it go; to go on from there another time, leave out the first `done` records.

        Raises:
            InputError: an argument is wrong; nothing was sent.
            InputTypeError: an argument has the wrong type.
            EmberpcError: the stream as a whole failed. Raised when the next checkpoint is asked for.
        """
        job = UpsertJob(records, collection=collection, truncation=truncation, batch_size=batch_size, window=window)
        return self._runner.stream(job, iter(records), timeout)

    def get(
        self, collection: str, ids: Iterable[str], *, with_vectors: bool = False, timeout: float | None = None
    ) -> list[Record]:
        """Get records by id.

        Returns:
            The records found, in the order asked for; an id that there is none of has none. They are asked for in
            smaller requests if the response to one would be too large.
        """
        return self._runner.run(_index.get(collection, ids, with_vectors=with_vectors), timeout)

    def delete(
        self,
        collection: str,
        ids: Iterable[str] | None = None,
        *,
        where: Where | None = None,
        timeout: float | None = None,
    ) -> int:
        """Delete records and return how many there were; ids not found are no error.

        Args:
            collection: name of the collection.
            ids: which; up to 1000 go in one request, which is atomic.
            where: or all that match this, at once; see `emberpc.client.filters`.
        """
        return self._runner.run(_index.delete(collection, ids, where), timeout)

    def records(
        self,
        collection: str,
        *,
        where: Where | None = None,
        with_vectors: bool = False,
        page_size: int = 0,
        timeout: float | None = None,
    ) -> Iterator[Record]:
        """Walk over a collection's records, by id.

        Every record that is there throughout is met exactly once, whatever is
        written meanwhile.

        Args:
            collection: name of the collection.
            where: only records that match, such as `lang = "en" and year >= 2020`; see `emberpc.client.filters`.
            with_vectors: whether to get the vectors too.
            page_size: records of one request, at most 1000; 0: the server's default.
        """

        def page(token: str) -> Call[Any, Page[Record]]:
            return _index.list_records(collection, token, where=where, with_vectors=with_vectors, page_size=page_size)

        return self._runner.pages(page, timeout)

    def count(self, collection: str, *, where: Where | None = None, timeout: float | None = None) -> int:
        """Count a collection's records, or those that match; see `emberpc.client.filters`."""
        return self._runner.run_one(_index.count(collection, where), timeout)

    def search(
        self,
        collection: str,
        query: Query,
        *,
        top_k: int = 10,
        ef: int = 0,
        min_recall: float = 0,
        where: Where | None = None,
        mode: SearchMode = "dense",
        dense_weight: float | None = None,
        fusion: Fusion | None = None,
        truncation: Truncation = "end",
        with_vectors: bool = False,
        timeout: float | None = None,
    ) -> list[Hit]:
        """Find the records nearest to a query.

        Args:
            collection: name of the collection.
            query: a text, which its model embeds; a vector (dimensions,); or `RecordId(id)`, for that record's
                neighbours.
            top_k: most hits, 1 to 10,000.
            ef: candidates that the graph search keeps; more is slower and finds more; 0: the server chooses.
            min_recall: share of the true nearest to be found, in (0, 1], instead of `ef`; 1 compares every vector.
            where: only records that match, such as `lang = "en" and year >= 2020`; see `emberpc.client.filters`.
            mode: `dense`, by likeness; `lexical`, by words in common; `hybrid`, by both; the last two need a text.
            dense_weight: of `hybrid`, the weight of likeness against words, 0 to 1; None: 0.5.
            fusion: of `hybrid`, how the two rankings become one: by `scores` (None) or by `ranks`.
            truncation: how an over-long query text is truncated; `SearchResult.truncated` says whether it was.
            with_vectors: whether to get the vectors of the hits too.

        Returns:
            Hits, nearest first.
        """
        job = _index.search(
            collection,
            [query],
            top_k=top_k,
            ef=ef,
            min_recall=min_recall,
            where=where,
            mode=mode,
            dense_weight=dense_weight,
            fusion=fusion,
            truncation=truncation,
            with_vectors=with_vectors,
            name="query",
        )
        return list(self._runner.run(job, timeout)[0].hits)

    def search_batch(
        self,
        collection: str,
        queries: Iterable[Query | SearchQuery],
        *,
        top_k: int = 10,
        ef: int = 0,
        min_recall: float = 0,
        where: Where | None = None,
        mode: SearchMode = "dense",
        dense_weight: float | None = None,
        fusion: Fusion | None = None,
        truncation: Truncation = "end",
        with_vectors: bool = False,
        timeout: float | None = None,
    ) -> list[SearchResult]:
        """Find the records nearest to each query, and say how; the arguments are those of `search`.

        A query may be a `SearchQuery`, with options of its own.

        Returns:
            Item i: what was found for query i. Queries are asked in smaller requests if the response to one would be
            too large.
        """
        return self._runner.run(
            _index.search(
                collection,
                queries,
                top_k=top_k,
                ef=ef,
                min_recall=min_recall,
                where=where,
                mode=mode,
                dense_weight=dense_weight,
                fusion=fusion,
                truncation=truncation,
                with_vectors=with_vectors,
            ),
            timeout,
        )
