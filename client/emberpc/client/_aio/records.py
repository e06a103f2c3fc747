# Generated from ../_sync/records.py by tools/generate_async_client.py. Edit that file and run the script.
"""Methods about records: upsert, get, list, count, delete."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Iterable, Mapping
from typing import Any

import numpy.typing as npt

from emberpc.client._aio.runner import AsyncRunner
from emberpc.client._core import records as record_calls
from emberpc.client._core.rpc_call import Call, Page
from emberpc.client._core.upsert_stream import UpsertStreamState
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

        Records are read as needed, and sent in one request after the other. Each request is atomic. If a request fails,
        `done` of the error is the number of records that earlier requests wrote. If no response arrived, as after a
        timeout, the failed request may have written its records too. The whole call may be repeated, unless
        `expected_revisions` is given. Without records, no request is sent.

        Args:
            collection: name of the collection.
            records: records, or dicts with `id` and any of `text`, `metadata`, `label`, `vector`, `time_to_live`. All
                records of one request must have a `vector`, or none of them. Without vectors, no text may be empty or
                only white space. An id may not occur twice in a request.
            vectors: vectors of all records, shape (records, dimensions). No record may then have a `vector`, and all
                records are read before the first request. None: the server embeds the texts, unless the records have
                vectors.
            truncation: how texts with too many tokens are truncated before they are embedded; None: the setting of the
                collection.
            expected_revisions: item i is the `revision` that the stored record with the id of record i must have; 0: no
                record may have this id. All records are then checked before anything is sent. None: revisions are not
                compared.
            batch_size: maximum number of records of one request.
            progress: called after each response with the number of records written so far; None: no calls.
            details: called with the `ResponseDetails` of each response: sequence number and durability of the write,
                times, tokens of the texts.
            timeout: seconds that one request may take, with all its tries; None: the `timeout` of the constructor.

        Returns:
            Numbers of inserted and of replaced records, and the sequence number of the last write; 0 without records.

        Raises:
            NotFound: there is no collection of this name; or records have no vectors, and the server does not serve the
                collection's model.
            FailedPrecondition: records have no vectors, and the collection has no model, or the server serves another
                model under its name; or records have vectors, and the collection's model was replaced during a request.
            Unimplemented: `expected_revisions` or `time_to_live` is given, and the index backend is Milvus.
            Aborted: a stored record has another revision than expected, perhaps from a try of this call whose response
                was lost. The last try of the request wrote nothing; earlier requests wrote the first `done` records.
            InputError: a record is wrong, and earlier requests, without this record, may have been sent; or another
                argument is wrong, and nothing was sent.
            InputTypeError: as InputError, for a record or another argument of a wrong type.
            EmberpcError: a request failed otherwise, for example with InvalidArgument for a text that is too long or a
                vector of other dimensions.
        """
        calls = record_calls.upsert(
            collection,
            records,
            matrix=vectors,
            truncation=truncation,
            expected_revisions=expected_revisions,
            batch_size=batch_size,
            progress=progress,
            details=details,
        )
        return await self._runner.run(calls, timeout)

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
        """Insert any number of records, or replace those with the same ids. An invalid record fails alone.

        The server embeds the next records while it writes earlier records. If the connection breaks or the server is
        restarted, the records that no checkpoint covers are sent again over a new connection.

        Args:
            collection: name of the collection.
            records: records, or dicts with their fields, as for `upsert`. Some may have vectors and others not. If
                records of one request have the same id, all but the first fail. A record without a vector ends the
                stream if the collection's model is missing or another one: see FailedPrecondition and NotFound of
                `upsert`.
                The iterable is read as needed, in the task that takes the checkpoints. It may be asynchronous.
            truncation: how texts with too many tokens are truncated; None: the setting of the collection.
            batch_size: maximum number of records of one request; `window` if that is less. The records of a request
                that do not fail are written together, all or none.
            window: maximum number of records that are read and not yet written or failed. Reading also stops while
                these records have 32 MiB or more.
            timeout: maximum seconds without a checkpoint, attempts to connect again included, but not the time of
                reading `records`; None: the `timeout` of the constructor.

        Returns:
            An iterator over checkpoints, which state how many records are written and which have failed.
            To stop early, await `aclose()` of the iterator.
            To continue later, leave out the first `done` records, as the last checkpoint states them.

        Raises:
            InputError: an argument is wrong; nothing was sent.
            InputTypeError: an argument has the wrong type; nothing was sent.
            EmberpcError: the stream as a whole failed; raised when the next checkpoint is taken. Besides the errors of
                `upsert`, FailedPrecondition: records have vectors, and the collection's model was replaced since the
                stream began.
        """
        state = UpsertStreamState(
            records, collection=collection, truncation=truncation, batch_size=batch_size, window=window
        )
        return self._runner.stream(state, records, timeout)

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
            ids: ids of the records, at least one. At most 1000 are sent in one request, and fewer if the response would
                be too large.
            with_vectors: whether to return the vectors too.
            details: called with the `ResponseDetails` of each response: `missing_ids` are ids without a record.
            timeout: seconds that one request may take, with all its tries; None: the `timeout` of the constructor.

        Returns:
            The records that were found, in the order of `ids`; a repeated id repeats its record. Ids without a record
            are left out.

        Raises:
            NotFound: there is no collection of this name.
            DataLoss: a record is damaged on the server's disk.
            InputError: `ids` is empty, or an id cannot be sent.
            InputTypeError: an argument has the wrong type.
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
        """Delete records and return the number of deleted records. An id without a record is not an error.

        Ids are sent in one request after the other. If a request fails, `done` of the error is the number of ids, from
        the start of the list, that earlier requests handled.

        Args:
            collection: name of the collection.
            ids: ids of the records, at least one. At most 1000 are sent in one request; each request is atomic.
            where: a filter, instead of `ids`, such as `lang = "en"`; see `emberpc.client.filters`. All records that
                match are deleted in one request.
            details: called with the `ResponseDetails` of each response: sequence number and durability of the write.
            timeout: seconds that one request may take, with all its tries; None: the `timeout` of the constructor.

        Raises:
            NotFound: there is no collection of this name.
            InputError: both or neither of `ids` and `where` are given, or an argument is wrong; nothing was deleted.
            InputTypeError: an argument has the wrong type; nothing was deleted.
            EmberpcError: a request failed otherwise.
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
        """Iterate over the records of a collection, sorted by id in byte order.

        Records that are damaged on the server's disk are left out. Each other record that exists and matches `where`
        during the whole iteration is returned once. A record that is inserted or deleted meanwhile, or that begins or
        ceases to match `where`, may be returned or not.

        Args:
            collection: name of the collection.
            where: only records that match this filter, such as `lang = "en" and year >= 2020`; see
                `emberpc.client.filters`. None: all records.
            with_vectors: whether to return the vectors too.
            page_size: maximum number of records of one response, at most 1000; 0: the server's default.
            timeout: seconds that one request may take, with all its tries; None: the `timeout` of the constructor.

        Raises:
            EmberpcError: a request failed, for example with NotFound, or with InvalidArgument for a `page_size` above
                1000; raised when the next record is taken.
            InputError: an argument is wrong; raised by the call itself, but for `timeout` when the first record is
                taken.
            InputTypeError: an argument has the wrong type; raised like InputError.
        """

        def page(token: str) -> Call[Any, Page[Record]]:
            return record_calls.list_records(
                collection, token, where=where, with_vectors=with_vectors, page_size=page_size
            )

        return self._runner.pages(page, timeout)

    async def count(self, collection: str, *, where: Where | None = None, timeout: float | None = None) -> int:
        """Count the records of a collection, or those that match a filter.

        A record that is damaged on the server's disk counts too; with a filter, only if its metadata can be read.

        Args:
            collection: name of the collection.
            where: only records that match this filter, such as `lang = "en"`; see `emberpc.client.filters`. None: all
                records.
            timeout: seconds that one request may take, with all its tries; None: the `timeout` of the constructor.

        Raises:
            NotFound: there is no collection of this name.
        """
        return await self._runner.run_one(record_calls.count(collection, where), timeout)
