# Generated from ../_sync/records.py by tools/generate_async_client.py. Edit that file and run the script.
"""Methods about records: upsert, get, list, count, delete."""

from __future__ import annotations

# The docstring of the client documents the parameters that all methods have in common.
# ruff: noqa: D417
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
        the records of earlier requests are written, and the error states their number. The whole call may be repeated,
        unless `expected_revisions` is given.

        Args:
            collection: name of the collection.
            records: records, or dicts with `id` and any of `text`, `metadata`, `label`, `vector`.
            vectors: shape (records, dimensions), if the server shall not embed the texts. All records are then read
                before the first request.
            truncation: how texts with too many tokens are truncated; None: the setting of the collection.
            expected_revisions: item i is the `revision` that record i must have in the collection, or 0 if no record
                with its id may exist. All records are then checked before anything is sent.
            details: called with `ResponseDetails` of each response: sequence number and durability of the write, times,
                tokens of the texts.

        Raises:
            Aborted: a record has another revision, perhaps from a try of this call whose response was lost. Nothing of
                its request was written; the `done` records of earlier requests are.
            InputError: a record is wrong; the requests before its own were sent.
            InputTypeError: a record has a wrong type; the requests before its own were sent.
            EmberpcError: a call failed.
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

        The server embeds the next records while it writes earlier ones to disk. If the connection breaks or the server
        is restarted, the records that were not acknowledged are sent again.

        Args:
            collection: name of the collection.
            records: records, or dicts with their fields. Some may have vectors and others not.
                The iterable is read as needed, in the task that takes the checkpoints. It may be asynchronous.
            truncation: how texts with too many tokens are truncated; None: the setting of the collection.
            batch_size: records per request. A request is atomic, except for the records that fail.
            window: the most records that are read and not yet acknowledged; fewer if they have more than 32 MiB.
            timeout: seconds without the acknowledgement of any record, attempts to connect again included.

        Returns:
            An iterator over checkpoints, which state how many records are on disk and which have failed.
            To stop early, await `aclose()` of the iterator.
            To continue later, leave out the first `done` records.

        Raises:
            InputError: an argument is wrong; nothing was sent.
            InputTypeError: an argument has the wrong type.
            EmberpcError: the whole stream failed. Raised when the next checkpoint is taken.
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
            ids: ids of the records.
            with_vectors: whether to return the vectors too.
            details: called with `ResponseDetails` of each response: its `missing_ids` are ids without a record.

        Returns:
            The records that were found, in the order of `ids`. Ids without a record are left out. If the response to a
            request would be too large, the ids are sent in smaller requests.
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
            ids: ids of the records. Up to 1000 go into one request, which is atomic.
            where: instead of `ids`: a filter. All records that match are deleted in one request; see
                `emberpc.client.filters`.
            details: called with `ResponseDetails` of each response: sequence number and durability of the write.
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
        """Iterate over the records of a collection, by id.

        Each record that exists during the whole iteration is returned exactly once, also if other calls write records.

        Args:
            collection: name of the collection.
            where: only records that match, such as `lang = "en" and year >= 2020`; see `emberpc.client.filters`.
            with_vectors: whether to return the vectors too.
            page_size: records per request, at most 1000; 0: the server's default.
        """

        def page(token: str) -> Call[Any, Page[Record]]:
            return record_calls.list_records(
                collection, token, where=where, with_vectors=with_vectors, page_size=page_size
            )

        return self._runner.pages(page, timeout)

    async def count(self, collection: str, *, where: Where | None = None, timeout: float | None = None) -> int:
        """Count the records of a collection, or those that match; see `emberpc.client.filters`."""
        return await self._runner.run_one(record_calls.count(collection, where), timeout)
