"""Upsert a stream of records of any size, message by message.

One loop reads messages, embeds texts, writes records and returns results. Messages are embedded concurrently and
written in their order, so the model works on the next messages while a message is written to disk. The records of a
message are written together, without those that fail. The result of a message is a checkpoint: the written records of
this message and of all messages before it are stored, and on disk if the result is `synced`. The loop reads no message
while enough records or bytes are in flight, and it does nothing else while the caller receives a result. So a stream
holds messages of less than 4 MiB together and the latest message, for any number of records, and however slowly the
caller reads.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import numpy as np

from emberpc.server import cancellation
from emberpc.server.collections import CollectionBackend, NewRecord, WriteResult
from emberpc.server.engine import Caller, Engine, Truncation
from emberpc.server.errors import Code, ServiceError, Violation, invalid, invalid_fields
from emberpc.server.pipelines.bulk_embedding import GROUP_TEXTS, GROUPS, SERVER_ERRORS, BulkEmbedder, EmbeddedGroup
from emberpc.server.pipelines.embedding import Matrix, shape
from emberpc.server.pipelines.index_pool import IndexPool
from emberpc.server.pipelines.limits import Limits
from emberpc.server.pipelines.model_binding import collection_model
from emberpc.server.pipelines.reembedding import ReembeddingJobs
from emberpc.server.pipelines.stream_tasks import cancel_tasks, next_message

#: No message is read while two or more messages with at least this many records together are in flight.
_MAX_RECORDS = GROUP_TEXTS * GROUPS
#: No message is read while this many messages are in flight.
_MAX_MESSAGES = 64
#: Another message is read only while the messages in flight have fewer bytes than this, or no message is in flight.
#: Messages with vectors are ready long before the embedding of an earlier message ends: without this limit, 4 streams
#: with messages of 16 MB held 1.3 GB.
_MAX_BYTES = 4 * 2**20
#: Matches the path of a record's field in an error of the index, such as `records[3].id` or `vectors[3]`.
_RECORD_PATH = re.compile(r"(?:records|(vectors?))\[(\d+)\]\.?(.*)")

Message = TypeVar("Message")


@dataclass(frozen=True)
class FailedRecord:
    """The id of a record that was not written, and its error."""

    id: str
    error: ServiceError


@dataclass(frozen=True)
class UpsertMessage:
    """The records of one message.

    Attributes:
        collection: name of the collection; may be empty after the first message.
        batch_number: number of the message; the first is at least 1, each further one greater than the one before.
        record_count: number of records.
        read_records: yields each record or its error; runs in the pool, since metadata may take seconds to read.
        read_vectors: returns the records' vectors, float32 (records, dimensions). None: their texts are embedded.
        truncation: the truncation of long texts; None: that of the collection.
        size: bytes of the message.
        release: called when the message was answered, so that the stream does not hold it any more. Not called if the
            stream ends before.
    """

    collection: str
    batch_number: int
    record_count: int
    read_records: Callable[[], Iterator[NewRecord | FailedRecord]]
    read_vectors: Callable[[], Matrix] | None
    truncation: Truncation | None
    size: int
    release: Callable[[], None]


@dataclass(frozen=True)
class UpsertedBatch:
    """The result of one message.

    Attributes:
        batch_number: number of the message.
        result: the result of the write; None if no record was written.
        failures: the records that were not written, with their errors.
    """

    batch_number: int
    result: WriteResult | None
    failures: Sequence[FailedRecord]


@dataclass
class _Batch:
    """The records of one message on their way to the index.

    Attributes:
        number: number of the message.
        records: the records that have not failed so far.
        matrix: float32 (records, dimensions): row i is the vector of `records[i]`; empty until there are vectors.
        failures: the records that failed.
    """

    number: int
    records: list[NewRecord] = field(default_factory=list)
    matrix: Matrix = field(default_factory=lambda: np.empty((0, 0), dtype=np.float32))
    failures: list[FailedRecord] = field(default_factory=list)

    def fail(self, i: int, error: ServiceError) -> None:
        """Note that record i failed. The record stays in `records` until `keep` removes it."""
        self.failures.append(FailedRecord(self.records[i].id, error))

    def keep(self, kept: Sequence[int]) -> None:
        """Remove all records, with their vectors, except those at the indexes `kept`."""
        self.records = [self.records[i] for i in kept]
        # The matrix is still empty if the vectors of the message cannot be read. Then no record is kept, so no index is
        # out of range.
        self.matrix = self.matrix[np.array(kept, dtype=np.intp)]


@dataclass(frozen=True)
class _InFlight:
    """A message that was not answered yet, and the task that reads and embeds its records."""

    task: asyncio.Task[_Batch]
    record_count: int
    size: int
    release: Callable[[], None]


class UpsertStream:
    """Upserts the records of one stream into one collection.

    Args:
        engine: embeds the records' texts.
        limits: limits of a message and a record.
        pool: runs the blocking calls of the index.
        reembedding: the reembedding jobs; writes wait while a job switches collections.
        collection: the collection.
        caller: the caller.
        request_id: the request id, for the log.
    """

    def __init__(
        self,
        engine: Engine,
        limits: Limits,
        pool: IndexPool,
        reembedding: ReembeddingJobs,
        collection: CollectionBackend,
        caller: Caller,
        request_id: str,
    ) -> None:
        self._engine = engine
        self._limits = limits
        self._pool = pool
        self._reembedding = reembedding
        self._collection = collection
        self._caller = caller
        self._request_id = request_id
        self._embedders: dict[Truncation, BulkEmbedder] = {}
        self._number = 0
        #: The messages that were not answered, in their order.
        self._in_flight: deque[_InFlight] = deque()
        #: Limits the groups of texts that are embedded at a time.
        self._groups = asyncio.Semaphore(GROUPS)

    def add(self, message: UpsertMessage) -> None:
        """Start to read and embed the records of a message, in a task.

        Raises:
            ServiceError: INVALID_ARGUMENT if the message names another collection, has a number that is not greater
                than the last, or has too many records. If its texts must be embedded: NOT_FOUND if the collection's
                model is not served; FAILED_PRECONDITION if the collection has no model or another model made its
                vectors; for the first texts of the stream, RESOURCE_EXHAUSTED if the queue is full or the deadline
                cannot be met.
        """
        name = self._collection.spec.name
        if message.collection not in ("", name):
            raise invalid("collection", f"is {message.collection!r}, and the stream is of {name!r}; open another one")
        if message.batch_number <= self._number:
            raise invalid("batch_number", f"is {message.batch_number} after {self._number}; the numbers must grow")
        self._number = message.batch_number
        if message.record_count:
            self._limits.check_count(message.record_count, "records", "record")
        embedder = None
        if message.record_count and message.read_vectors is None:
            embedder = self._embedder(message)
        task = asyncio.create_task(self._embed(message, embedder))
        self._in_flight.append(_InFlight(task, message.record_count, message.size, message.release))

    async def run(
        self, messages: AsyncIterator[Message], read: Callable[[Message], UpsertMessage]
    ) -> AsyncGenerator[UpsertedBatch, None]:
        """Write the records of the messages that were added and of all further messages; yield each message's result.

        The results are in the order of the messages. The stream ends with the first error that is raised.

        Args:
            messages: the further messages.
            read: returns the content of a message.

        Raises:
            ServiceError: any error of `read` and `add`; RESOURCE_EXHAUSTED if the queue stays full, too many writes
                wait, or the disk is full; DEADLINE_EXCEEDED if the deadline passed; UNAVAILABLE if the server stops or
                the collection is closed; INTERNAL if the database fails. Wrong records fail alone, without an error.
        """
        reading: asyncio.Task[Message | None] | None = None
        ended = False
        try:
            while self._in_flight or not ended:
                if reading is None and not ended and self._has_room:
                    reading = asyncio.create_task(next_message(messages))
                head = self._in_flight[0].task if self._in_flight else None
                await asyncio.wait(
                    [task for task in (reading, head) if task is not None], return_when=asyncio.FIRST_COMPLETED
                )
                if reading is not None and reading.done():
                    message, reading = reading.result(), None
                    if message is None:
                        ended = True
                    else:
                        self.add(read(message))
                    del message  # not kept until the next one comes
                if head is not None and head.done():
                    await self._reembedding.wait_writable(self._collection.spec.name)
                    yield await self._write(head.result())
                    self._in_flight.popleft().release()
        finally:
            await cancel_tasks([*(message.task for message in self._in_flight), reading])

    @property
    def _has_room(self) -> bool:
        """Return whether to read another message: few enough bytes, records and messages are in flight.

        Two messages may be in flight however many records they have, so that one can be embedded while the other is
        written, unless they have too many bytes.
        """
        count = len(self._in_flight)
        if count and sum(message.size for message in self._in_flight) >= _MAX_BYTES:
            return False
        records = sum(message.record_count for message in self._in_flight)
        return count < 2 or (count < _MAX_MESSAGES and records < _MAX_RECORDS)

    async def _write(self, batch: _Batch) -> UpsertedBatch:
        """Write the records of a message, and return its result. Records that the index refuses fail.

        Raises:
            ServiceError: any error of the index except INVALID_ARGUMENT.
        """
        name = self._collection.spec.name
        result = None
        while batch.records and result is None:
            upsert = partial(self._collection.upsert, batch.records, batch.matrix)
            try:
                result = await self._pool.run(upsert, within=self._pool.writers(name))
            except ServiceError as error:
                if error.code is not Code.INVALID_ARGUMENT:
                    raise
                _fail_named(batch, error)
        return UpsertedBatch(batch.number, result, batch.failures)

    def _embedder(self, message: UpsertMessage) -> BulkEmbedder:
        """Return the embedder for the texts of a message. The stream has one embedder for each truncation.

        Raises:
            ServiceError: NOT_FOUND if the collection's model is not served; FAILED_PRECONDITION if the collection has
                no model or another model made its vectors; RESOURCE_EXHAUSTED, for the first embedder of the stream, if
                the queue is full or the deadline cannot be met.
        """
        truncation = message.truncation or Truncation(self._collection.spec.truncation)
        embedder = self._embedders.get(truncation)
        if embedder is None:
            if not self._embedders:
                self._engine.check_room(self._caller)
            model = collection_model(self._engine, self._collection)
            embedder = self._embedders[truncation] = BulkEmbedder(
                self._engine,
                self._limits,
                model,
                model.manifest.prompts.passage,
                truncation,
                self._caller,
                self._request_id,
                ending=SERVER_ERRORS,
            )
        return embedder

    async def _embed(self, message: UpsertMessage, embedder: BulkEmbedder | None) -> _Batch:
        """Read the records of a message, and read their vectors or embed their texts.

        Returns:
            The records with their vectors, and the records that failed.

        Raises:
            ServiceError: an error with a code of `SERVER_ERRORS`, which is no record's fault.
        """
        batch = _Batch(message.batch_number)
        indexes = await self._pool.run(partial(_read, batch, message), self._caller)
        if message.read_vectors is not None:
            try:
                batch.matrix = self._checked(message.read_vectors())[indexes]
            except ServiceError as error:
                _fail_named(batch, error)
        del message  # the records are read: it is not kept while their texts are embedded
        if embedder is not None and batch.records:
            await self._embed_texts(batch, embedder)
        return batch

    def _checked(self, matrix: Matrix) -> Matrix:
        """Return the vectors of a message unchanged; INVALID_ARGUMENT unless they have the collection's dimensions."""
        dimensions = self._collection.spec.dimensions
        if matrix.shape[1] != dimensions:
            # The index would name only the first vector in its error. The other records would then be tried, and fail,
            # one after the other.
            raise invalid("vectors", f"has {matrix.shape[1]} dimensions, the collection has {dimensions}")
        return matrix

    async def _embed_texts(self, batch: _Batch, embedder: BulkEmbedder) -> None:
        """Embed the texts of a message in groups, set the vectors of the batch, and remove the records that fail.

        Raises:
            ServiceError: an error with a code of `SERVER_ERRORS`, which is no record's fault.
        """
        texts = [record.text for record in batch.records]

        async def embed(first: int) -> EmbeddedGroup:
            async with self._groups:
                return await embedder.embed(texts[first : first + GROUP_TEXTS])

        starts = range(0, len(texts), GROUP_TEXTS)
        tasks = [asyncio.create_task(embed(first)) for first in starts]
        try:
            groups = await asyncio.gather(*tasks)
        finally:
            await cancel_tasks(tasks)
        dimensions, unit = self._collection.spec.dimensions, embedder.model.manifest.normalize
        batch.matrix = np.zeros((len(texts), dimensions), dtype=np.float32)
        kept = []
        for first, group in zip(starts, groups, strict=True):
            for indexes, inference in group.parts:
                rows = [first + i for i in indexes]
                batch.matrix[rows] = shape(inference.output, dimensions, unit=unit)
                kept += rows
            for i, error in group.failures.items():
                batch.fail(first + i, error)
        batch.keep(sorted(kept))


def _read(batch: _Batch, message: UpsertMessage) -> list[int]:
    """Read the records of a message into its batch, and return the indexes in the message of those that do not fail.

    Runs in the pool.

    Raises:
        ServiceError: DEADLINE_EXCEEDED if the caller left or the deadline passed.
    """
    indexes = []
    for i, record in enumerate(message.read_records()):
        cancellation.check()
        if isinstance(record, FailedRecord):
            batch.failures.append(record)
        else:
            batch.records.append(record)
            indexes.append(i)
    return indexes


def _fail_named(batch: _Batch, error: ServiceError) -> None:
    """Fail the records that an error names, each with its own violations, and remove them from the batch.

    If the error names no record, or an index outside of the batch, all records fail with all violations.
    """
    wrong: dict[int, list[Violation]] = {}
    for violation in error.violations:
        if found := _RECORD_PATH.fullmatch(violation.field):
            path = ".".join(part for part in ("vector" if found[1] else "", found[3]) if part)
            wrong.setdefault(int(found[2]), []).append(Violation(path, violation.description))
    if not wrong or max(wrong) >= len(batch.records):
        wrong = {i: list(error.violations) for i in range(len(batch.records))}
    for i, violations in wrong.items():
        batch.fail(i, invalid_fields(violations))
    batch.keep([i for i in range(len(batch.records)) if i not in wrong])
