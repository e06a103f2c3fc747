"""Upsert a stream of records of any size, message by message.

One loop reads messages, starts their embedding, writes their records and yields their results. Messages are embedded
concurrently and written in the order in which they came, so the model works on the next messages while a message is
written to disk. The records of a message are written together, without those that fail. The result of a message is a
checkpoint: all records of this message and of the messages before it are written, except those that failed. With the
embedded backend, the written records are on disk.

The loop reads no message while enough records, messages or bytes are in flight, and it pauses while the caller receives
a result. So besides the message that was read last, a stream holds request messages of less than 4 MiB together. This
is true for any number of records, and however slowly the caller reads.
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
from emberpc.server.collections.metric import dimensions_remedy
from emberpc.server.engine import Caller, Engine, Truncation
from emberpc.server.errors import Code, ServiceError, Violation, invalid, invalid_fields
from emberpc.server.pipelines.bulk_embedding import GROUP_TEXTS, GROUPS, SERVER_ERRORS, BulkEmbedder, EmbeddedGroup
from emberpc.server.pipelines.cancel_tasks import cancel_tasks
from emberpc.server.pipelines.collection_model import collection_model
from emberpc.server.pipelines.embedding import Matrix, shape
from emberpc.server.pipelines.index_pool import IndexPool
from emberpc.server.pipelines.limits import Limits
from emberpc.server.pipelines.next_message import next_message
from emberpc.server.pipelines.reembedding import ReembeddingJobs

#: No message is read while two or more messages with at least this many records together are in flight: a stream embeds
#: at most this many texts at a time, so further messages would only wait.
_MAX_RECORDS = GROUP_TEXTS * GROUPS
#: No message is read while this many messages are in flight. Without this limit, messages with few or no records could
#: make thousands of tasks.
_MAX_MESSAGES = 64
#: A message is read only while the messages in flight have fewer bytes than this together. Messages with vectors wait
#: in memory until the texts of an earlier message are embedded: without this limit, 4 streams with messages of 16 MB
#: held 1.3 GB.
_MAX_BYTES = 4 * 2**20
#: Matches the path of a record's field or vector in an error of the index, such as `records[3].id` or `vectors[3]`.
#: Groups: `vectors` or None, the index of the record, the field.
_RECORD_PATH = re.compile(r"(?:records|(vectors?))\[(\d+)\]\.?(.*)")

Message = TypeVar("Message")


@dataclass(frozen=True)
class FailedRecord:
    """The id of a record that was not written, and its error.

    Field paths of the error start at the record, such as `text` or `vector`. If the whole block of vectors is wrong,
    they start with `vectors`.
    """

    id: str
    error: ServiceError


@dataclass(frozen=True)
class UpsertMessage:
    """The records of one message.

    Attributes:
        collection: name of the collection; empty: that of the stream.
        batch_number: number that the caller gave the message.
        record_count: number of records; may be 0.
        read_records: yields each record, or its error, in order; runs in the pool, since metadata may take seconds to
            read.
        read_vectors: returns the vectors of all records, float32 (`record_count`, dimensions), or raises
            INVALID_ARGUMENT. None: the texts are embedded.
        truncation: the truncation of long texts; None: that of the collection.
        size: bytes of the request message.
        release: called after the caller has received the message's result: the bytes of the message need not count any
            longer. Not called if the stream ends before.
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
        result: the result of the write; None if the message has no records or all of them failed.
        failures: the records that were not written, with their errors, in any order.
    """

    batch_number: int
    result: WriteResult | None
    failures: Sequence[FailedRecord]


@dataclass
class _Batch:
    """The records of one message on their way to the index.

    Attributes:
        number: number of the message.
        records: the records to write. A record that fails stays here until `keep` removes it.
        matrix: float32 (records, dimensions): row i is the vector of `records[i]`. Shape (0, 0) until the vectors are
            read or embedded.
        failures: the records that failed.
    """

    number: int
    records: list[NewRecord] = field(default_factory=list)
    matrix: Matrix = field(default_factory=lambda: np.empty((0, 0), dtype=np.float32))
    failures: list[FailedRecord] = field(default_factory=list)

    def fail(self, i: int, error: ServiceError) -> None:
        """Add `records[i]` to the failures. The record stays in `records` until `keep` removes it."""
        self.failures.append(FailedRecord(self.records[i].id, error))

    def keep(self, kept: Sequence[int]) -> None:
        """Remove all records and their vectors except those at the indexes `kept`, which are in ascending order."""
        self.records = [self.records[i] for i in kept]
        # The matrix is still empty if the vectors of the message cannot be read. Then no record is kept, so no index is
        # out of range.
        self.matrix = self.matrix[np.array(kept, dtype=np.intp)]


@dataclass(frozen=True)
class _InFlight:
    """A message whose result the caller has not received, and the task that makes its `_Batch`."""

    task: asyncio.Task[_Batch]
    record_count: int
    size: int
    release: Callable[[], None]


class UpsertStream:
    """Upserts the records of one stream into one collection.

    Call `add` with the first message; then iterate over `run`, which reads the further messages.

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
        #: The messages whose results the caller has not received, in the order in which they came.
        self._in_flight: deque[_InFlight] = deque()
        #: Limits the groups of texts that are embedded at a time, of all messages of the stream together.
        self._groups = asyncio.Semaphore(GROUPS)

    def add(self, message: UpsertMessage) -> None:
        """Start to read and embed the records of a message, in a task.

        Raises:
            ServiceError: INVALID_ARGUMENT if the message names another collection, has too many records, or has a
                number that is not greater than that of the message before (of the first message: than 0). If texts must
                be embedded: NOT_FOUND if the collection's model is not served; FAILED_PRECONDITION if the collection
                has no model, or the served model is another one or embeds no texts; for the first texts of the stream,
                RESOURCE_EXHAUSTED if the queue is full or the deadline cannot be met.
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

        The results are in the order of the messages. Invalid records, and texts on which the model fails, are failures
        of the result. Any other error ends the stream. An error of `messages`, `read` or `add` ends the stream at once,
        though earlier messages may have no result yet.

        Args:
            messages: the further messages.
            read: returns the content of a message.

        Raises:
            ServiceError: any error of `messages`, `read` and `add`; RESOURCE_EXHAUSTED if the queue stays full, texts
                cannot be embedded before the deadline, or too many writes wait; DEADLINE_EXCEEDED if the deadline
                passed; UNAVAILABLE if the server stops or the collection was closed, as after a reembedding; any error
                of `CollectionBackend.upsert` except INVALID_ARGUMENT.
        """
        reading: asyncio.Task[Message | None] | None = None
        ended = False
        try:
            while self._in_flight or not ended:
                if reading is None and not ended and self._has_space:
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
    def _has_space(self) -> bool:
        """Return whether to read another message: few enough bytes, records and messages are in flight.

        A second message is read however many records the first has, if the first has fewer than 4 MiB: one message can
        be embedded while the other is written.
        """
        count = len(self._in_flight)
        if count and sum(message.size for message in self._in_flight) >= _MAX_BYTES:
            return False
        records = sum(message.record_count for message in self._in_flight)
        return count < 2 or (count < _MAX_MESSAGES and records < _MAX_RECORDS)

    async def _write(self, batch: _Batch) -> UpsertedBatch:
        """Write the records of a message, and return its result.

        If the index refuses records with INVALID_ARGUMENT, these records fail, and the others are tried again.

        Raises:
            ServiceError: any other error of `CollectionBackend.upsert`; RESOURCE_EXHAUSTED if too many writes wait.
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

        Errors are raised only when an embedder is made, at the first message with a truncation.

        Raises:
            ServiceError: any error of `collection_model`; RESOURCE_EXHAUSTED, for the first embedder of the stream, if
                the queue is full or the deadline cannot be met.
        """
        truncation = message.truncation or Truncation(self._collection.spec.truncation)
        embedder = self._embedders.get(truncation)
        if embedder is None:
            if not self._embedders:
                self._engine.check_space(self._caller)
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

        Args:
            message: the message.
            embedder: embeds the texts; None if the message has vectors or no records.

        Returns:
            The records with their vectors, and the records that failed.

        Raises:
            ServiceError: an error with a code of `SERVER_ERRORS`; other errors make records fail.
        """
        batch = _Batch(message.batch_number)
        indexes = await self._pool.run(partial(_read, batch, message), self._caller)
        if message.read_vectors is not None:
            try:
                batch.matrix = self._checked(message.read_vectors()[indexes])
            except ServiceError as error:
                _fail_named(batch, error)
        del message  # the records are read: it is not kept while their texts are embedded
        if embedder is not None and batch.records:
            await self._embed_texts(batch, embedder)
        return batch

    def _checked(self, matrix: Matrix) -> Matrix:
        """Return the vectors of records unchanged; INVALID_ARGUMENT unless they have the collection's dimensions."""
        width, dimensions = matrix.shape[1], self._collection.spec.dimensions
        if len(matrix) and width != dimensions:
            # The index would name only the first vector in its error. The other records would then be tried, and fail,
            # one after the other.
            problem = f"has {width} dimensions, the collection has {dimensions}; {dimensions_remedy(dimensions)}"
            raise invalid_fields([Violation(f"vectors[{i}]", problem) for i in range(len(matrix))])
        return matrix

    async def _embed_texts(self, batch: _Batch, embedder: BulkEmbedder) -> None:
        """Embed the texts of a batch in groups, set its vectors, and move the records that fail to its failures.

        Raises:
            ServiceError: an error with a code of `SERVER_ERRORS`; other errors make records fail.
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
    """Read the records of a message into its batch: valid ones into `records`, the others into `failures`.

    Runs in the pool.

    Returns:
        The index in the message of each item of `batch.records`.

    Raises:
        ServiceError: DEADLINE_EXCEEDED if the caller left, the deadline passed or the server stops.
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
    """Move the records that an INVALID_ARGUMENT error names to the failures, each with its own violations.

    The index i of a path such as `records[i].id` means `batch.records[i]`. In the failures, the path starts at the
    record. If the error names no record, or an index outside of the batch, all records fail with all violations.
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
