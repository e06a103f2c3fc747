# Generated from ../_sync/records.py by tools/generate_async_client.py. Edit that file and run the script.
"""Methods about records: upsert, get, list, count, delete."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Iterable, Mapping
from typing import Any

import numpy.typing as npt

from emberpc.client._aio.runner import AsyncRunner
from emberpc.client._core import records as record_calls
from emberpc.client._core.calls import Call, Page
from emberpc.client._core.upsert_stream import UpsertJob
from emberpc.client.details import Details
from emberpc.client.filters import Where
from emberpc.client.types import Progress, Record, Truncation, UpsertCheckpoint, UpsertResult


class AsyncRecordMethods:
    """Methods of `AsyncClient` that write and read records."""

    _runner: AsyncRunner

    async def upsert(
        self,
        collection: str,
        records: Iterable[Record | Mapping[str, Any]],
        *,
        vectors: npt.ArrayLike | None = None,
        truncation: Truncation | None = None,
        expected_revisions: Iterable[int] | None = None,
        batch_size: int = 256,
        progress: Progress | None = None,
        details: Details | None = None,
        timeout: float | None = None,
    ) -> UpsertResult:
        """Insert records, or replace those with the same ids.

        Records are read as needed and sent in one request after the other. Each request is atomic. If a request fails,
        the records of earlier requests are written, and `done` of the error is their number. The whole call may be
        repeated, unless `expected_revisions` is given.

        Args:
            collection: name of the collection.
            records: records, or dicts with `id` and any of `text`, `metadata`, `label`, `vector`, `time_to_live`. All
                records of one request must have a `vector`, or none of them. Without vectors, no text may be empty or
                only white space. An id may not occur twice in a request.
            vectors: vectors of all records, shape (records, dimensions). All records are then read before the first
                request. None: the server embeds the texts, unless the records have vectors.
            truncation: how texts with too many tokens are truncated; None: the setting of the collection.
            expected_revisions: item i is the `revision` that the stored record with the id of record i must have; 0: no
                record may have this id. All records are then checked before anything is sent. None: revisions are not
                compared.
            details: called with the `ResponseDetails` of each response: sequence number and durability of the write,
                times, tokens of the texts.
            batch_size: most records of one request.
            progress: called with the number of items done so far; None: no calls.
            timeout: seconds that one request may take, with all its tries; None: the `timeout` of the constructor.

        Returns:
            Numbers of inserted and updated records, and the sequence number of the last write.

        Raises:
            NotFound: there is no collection of this name, or the server does not serve the collection's model.
            FailedPrecondition: a record has no vector, and the collection has no model, or vectors of another model; or
                records have vectors, and the collection's model was replaced during the call.
            Unimplemented: `expected_revisions` or `time_to_live` is given, and the index backend is Milvus.
            Aborted: a stored record has another revision, perhaps from a try of this call whose response was lost. The
                request with this record wrote nothing; earlier requests wrote the first `done` records.
            InputError: a record is wrong. Earlier requests, without this record, were sent. Or another argument is
                wrong; nothing was sent.
            InputTypeError: a record has a wrong type. Earlier requests, without this record, were sent.
            EmberpcError: a request failed otherwise, for example with InvalidArgument for a text that is too long or a
                vector of other dimensions.
        """
        job = record_calls.upsert(
            collection,
            records,
            matrix=vectors,
            truncation=truncation,
            expected_revisions=expected_revisions,
            batch_size=batch_size,
            progress=progress,
            details=details,
        )
        return await self._runner.run(job, timeout)

    def upsert_stream(
        self,
        collection: str,
        records: Iterable[Record | Mapping[str, Any]] | AsyncIterable[Record | Mapping[str, Any]],
        *,
        truncation: Truncation | None = None,
        batch_size: int = 64,
        window: int = 1024,
        timeout: float | None = None,
    ) -> AsyncIterator[UpsertCheckpoint]:
        """Insert any number of records, or replace those with the same ids; an invalid record fails alone.

        The server embeds the next records while it writes earlier records to disk. If the connection breaks or the
        server is restarted, the records that were not acknowledged are sent again.

        Args:
            collection: name of the collection.
            records: records, or dicts with their fields. Some may have vectors and others not. If two records of one
                request have the same id, the later one fails. A record without a vector ends the stream if the
                collection cannot embed its text: see FailedPrecondition and NotFound of `upsert`.
                The iterable is read as needed, in the task that takes the checkpoints. It may be asynchronous.
            truncation: how texts with too many tokens are truncated; None: the setting of the collection.
            batch_size: records per request. A request is atomic, except for the records that fail.
            window: the most records that are read and not yet acknowledged; fewer if they have more than 32 MiB.
            timeout: most seconds without a checkpoint, attempts to connect again included, but not the time of reading
                `records`; None: the `timeout` of the constructor.

        Returns:
            An iterator over checkpoints, which state how many records are on disk and which have failed.
            To stop early, await `aclose()` of the iterator.
            To continue later, leave out the first `done` records.

        Raises:
            InputError: an argument is wrong; nothing was sent.
            InputTypeError: an argument has the wrong type; nothing was sent.
            EmberpcError: the stream as a whole failed; raised when the next checkpoint is taken. FailedPrecondition:
                records have vectors, and the collection's model was replaced since the stream began.
        """
        job = UpsertJob(records, collection=collection, truncation=truncation, batch_size=batch_size, window=window)
        return self._runner.stream(job, records, timeout)

    async def get(
        self,
        collection: str,
        ids: Iterable[str],
        *,
        with_vectors: bool = False,
        details: Details | None = None,
        timeout: float | None = None,
    ) -> list[Record]:
        """Return records by id.

        Args:
            collection: name of the collection.
            ids: ids of the records, at least one.
            with_vectors: whether to return the vectors too.
            details: called with the `ResponseDetails` of each response: `missing_ids` are ids without a record.
            timeout: seconds that one request may take, with all its tries; None: the `timeout` of the constructor.

        Returns:
            The records that were found, in the order of `ids`. Ids without a record are left out. If the response to a
            request would be too large, the ids are sent in smaller requests.

        Raises:
            NotFound: there is no collection of this name.
            DataLoss: a record is damaged.
            EmberpcError: a request failed otherwise.
        """
        return await self._runner.run(
            record_calls.get(collection, ids, with_vectors=with_vectors, details=details), timeout
        )

    async def delete(
        self,
        collection: str,
        ids: Iterable[str] | None = None,
        *,
        where: Where | None = None,
        details: Details | None = None,
        timeout: float | None = None,
    ) -> int:
        """Delete records and return the number of deleted records. An id that is not found is not an error.

        Args:
            collection: name of the collection.
            ids: ids of the records, at least one. At most 1000 are sent in one request; each request is atomic.
            where: a filter, instead of `ids`, such as `lang = "en"`; see `emberpc.client.filters`. All records that
                match are deleted in one request.
            details: called with the `ResponseDetails` of each response: sequence number and durability of the write.
            timeout: seconds that one request may take, with all its tries; None: the `timeout` of the constructor.

        Raises:
            NotFound: there is no collection of this name.
            InputError: both or neither of `ids` and `where` are given, or one is wrong; nothing was deleted.
            EmberpcError: a request failed otherwise. `done` is the number of ids, from the start of the list, whose
                records earlier requests deleted.
        """
        return await self._runner.run(record_calls.delete(collection, ids, where, details), timeout)

    def records(
        self,
        collection: str,
        *,
        where: Where | None = None,
        with_vectors: bool = False,
        page_size: int = 0,
        timeout: float | None = None,
    ) -> AsyncIterator[Record]:
        """Iterate over the records of a collection, in the byte order of their ids.

        Each record that exists, and matches `where`, during the whole iteration is returned exactly once, also if other
        calls write records. Only records that are damaged on the server's disk are left out.

        Args:
            collection: name of the collection.
            where: only records that match this filter, such as `lang = "en" and year >= 2020`; see
                `emberpc.client.filters`. None: all records.
            with_vectors: whether to return the vectors too.
            page_size: records per request, at most 1000; 0: the server's default.
            timeout: seconds that one request may take, with all its tries; None: the `timeout` of the constructor.

        Raises:
            EmberpcError: a request failed, for example with NotFound; raised when the next record is taken, and so is
                the InputError or InputTypeError for a wrong `timeout`. Another wrong argument raises at once.
        """

        def page(token: str) -> Call[Any, Page[Record]]:
            return record_calls.list_records(
                collection, token, where=where, with_vectors=with_vectors, page_size=page_size
            )

        return self._runner.pages(page, timeout)

    async def count(self, collection: str, *, where: Where | None = None, timeout: float | None = None) -> int:
        """Count the records of a collection, or those that match a filter.

        Args:
            collection: name of the collection.
            where: only records that match this filter, such as `lang = "en"`; see `emberpc.client.filters`. None: all
                records.
            timeout: seconds that one request may take, with all its tries; None: the `timeout` of the constructor.

        Raises:
            NotFound: there is no collection of this name.
        """
        return await self._runner.run_one(record_calls.count(collection, where), timeout)
