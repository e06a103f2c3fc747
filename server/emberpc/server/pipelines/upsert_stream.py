"""Upsert a stream of records of any size, message by message.

One loop reads messages, embeds texts, writes records and returns results. Messages are embedded concurrently and
written in their order, so the model works on the next messages while one goes to disk. A message is written whole,
without the records that fail, and its result is a checkpoint: all records up to it are on disk. The loop reads no
message while enough records or bytes are in flight, and it does nothing else while the caller receives a result. A
stream thus holds a few hundred records of a few MiB and the message that came last, whatever the size of the corpus and
however slow the reader.
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

#: Stop reading while this many records or messages are in flight, unless it is a single message.
_MAX_RECORDS = GROUP_TEXTS * GROUPS
_MAX_MESSAGES = 64
#: Read another message only while those in flight have fewer bytes, unless none is in flight. Messages with vectors are
#: ready long before the texts of one before them: 4 streams with messages of 16 MB held 1.3 GB.
_MAX_BYTES = 4 * 2**20
#: Paths of a record's fields in the index's errors, such as `records[3].id` or `vectors[3]`.
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
        batch_number: number of the message; the numbers grow.
        record_count: number of records.
        read_records: yields each record or its error; runs in the pool, since metadata may take seconds to read.
        read_vectors: returns the records' vectors, float32 (records, dimensions). None: their texts are embedded.
        truncation: the truncation of long texts; None: as the collection says.
        size: bytes of the message.
        release: called when the message was answered, and the stream holds it no longer.
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
    """The result of one message: its number, the write (None if all records failed), and the records that failed."""

    batch_number: int
    result: WriteResult | None
    failures: Sequence[FailedRecord]


@dataclass
class _Batch:
    """The records of one message that have not failed so far; row i of `matrix` is the vector of `records[i]`."""

    number: int
    records: list[NewRecord] = field(default_factory=list)
    matrix: Matrix = field(default_factory=lambda: np.empty((0, 0), dtype=np.float32))
    failures: list[FailedRecord] = field(default_factory=list)

    def fail(self, i: int, error: ServiceError) -> None:
        """Add a failure of record i; `keep` removes the record."""
        self.failures.append(FailedRecord(self.records[i].id, error))

    def keep(self, kept: Sequence[int]) -> None:
        """Remove all records but those at some indexes."""
        self.records = [self.records[i] for i in kept]
        # There are no vectors yet if those of the message cannot be read; then no record is kept.
        self.matrix = self.matrix[np.array(kept, dtype=np.intp)]


@dataclass(frozen=True)
class _InFlight:
    """A message that was not answered, and the task that embeds it."""

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
        """Start to embed a message.

        Raises:
            ServiceError: INVALID_ARGUMENT if the message names another collection, has a number that does not grow, or
                too many records; as `collection_model` does if its texts are embedded; RESOURCE_EXHAUSTED if the queue
                is full and these are the first texts of the stream.
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
        """Write the messages that were added and all further ones; yield the result of each in its order.

        Args:
            messages: the further messages.
            read: reads a message.

        Raises:
            ServiceError: as `read` and `add` do; RESOURCE_EXHAUSTED if the queue stays full or the disk is full;
                UNAVAILABLE if the server stops. All other errors fail single records.
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
        """Return whether to read another message.

        However many records they have, two small messages are in flight: one is embedded, one is written.
        """
        count = len(self._in_flight)
        if count and sum(message.size for message in self._in_flight) >= _MAX_BYTES:
            return False
        records = sum(message.record_count for message in self._in_flight)
        return count < 2 or (count < _MAX_MESSAGES and records < _MAX_RECORDS)

    async def _write(self, batch: _Batch) -> UpsertedBatch:
        """Write the records of a message; those that the index refuses fail."""
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
        """Return the embedder of a message; each truncation has one."""
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
        """Read the records of a message, and read or embed their vectors."""
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
        """Return the vectors of a message; INVALID_ARGUMENT if they have wrong dimensions."""
        dimensions = self._collection.spec.dimensions
        if matrix.shape[1] != dimensions:
            # The index would name the first vector only, and then the others one by one.
            raise invalid("vectors", f"has {matrix.shape[1]} dimensions, the collection has {dimensions}")
        return matrix

    async def _embed_texts(self, batch: _Batch, embedder: BulkEmbedder) -> None:
        """Embed the texts of a message in groups, and remove the records that have no vector."""
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
    """Add the records of a message to its batch; return the indexes of those that do not fail. Runs in the pool."""
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
    """Fail the records that an error names, each with its own violations; all records if it names none."""
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
