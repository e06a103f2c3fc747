"""UpsertRecordsStream: a corpus of any size, written message by message.

One loop reads, embeds, writes and answers. Messages are embedded side by side
and written in their order, so that the model works on the next ones while one
goes to disk. A message is written whole but for the records that fail, and its
answer is a checkpoint: all that came up to it is on disk. Nothing more is read
while enough records are under way, and while an answer is being written
nothing else happens, so a stream holds a few hundred records and the message
that came last, whatever the size of the corpus and however slow its reader.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from emberpc.server import cancellation
from emberpc.server.collections import CollectionBackend, NewRecord
from emberpc.server.engine import Engine, Lane, Truncation
from emberpc.server.errors import Code, ServiceError, Violation, invalid, invalid_fields
from emberpc.server.services import replies, requests
from emberpc.server.services.binding import collection_model
from emberpc.server.services.bulk_embedding import GROUP_TEXTS, GROUPS, BulkEmbedder, Embedded
from emberpc.server.services.forms import Matrix, shape
from emberpc.server.services.index_pool import IndexPool
from emberpc.server.services.records import caller_vectors, new_records
from emberpc.server.services.tasks import end, next_of
from emberpc.server.statuses import status_of
from emberpc.v1 import index_pb2 as pb

#: Nothing more is read from so many records on, or so many messages, unless only one message is under way.
_RECORDS = GROUP_TEXTS * GROUPS
_MESSAGES = 64
#: What goes wrong with the server, not with a record: the stream ends, and the client resumes at the last checkpoint.
_ENDING = frozenset({Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED, Code.DEADLINE_EXCEEDED})
_OF_RECORD = re.compile(r"(?:records|(vectors?))\[(\d+)\]\.?(.*)")


@dataclass
class _Batch:
    """The records of one message that did not fail so far; row i of `matrix` is the vector of `records[i]`."""

    response: pb.UpsertRecordsStreamResponse
    records: list[NewRecord] = field(default_factory=list)
    matrix: Matrix = field(default_factory=lambda: np.empty((0, 0), dtype=np.float32))

    def keep(self, kept: Sequence[int]) -> None:
        """Leave out all records but some."""
        self.records = [self.records[i] for i in kept]
        # There are no vectors yet where those that were given cannot be read; then nothing is kept.
        self.matrix = self.matrix[np.array(kept, dtype=np.intp)]


async def upsert_stream(
    engine: Engine,
    limits: requests.Limits,
    pool: IndexPool,
    find: Callable[[str], Awaitable[CollectionBackend]],
    writable: Callable[[str], Awaitable[None]],
    messages: AsyncIterator[pb.UpsertRecordsStreamRequest],
    context: requests.Context,
) -> AsyncIterator[pb.UpsertRecordsStreamResponse]:
    """Write what comes, and answer each message in its order, when it is on disk.

    Args:
        engine: the models.
        limits: how large a message may be.
        pool: where writes run.
        find: gives a collection by its name.
        writable: waits until a collection may be written to.
        messages: what comes.
        context: gRPC's view of the call.

    Raises:
        ServiceError: INVALID_ARGUMENT if a message is out of order or of another collection; as the collection says,
            and its model, if a message has texts to embed; RESOURCE_EXHAUSTED if there is no room for its first texts,
            the queue stays full, or the disk is; UNAVAILABLE if the server is stopping. A record fails alone.
    """
    message = await anext(messages, None)
    if message is None or not message.collection:
        raise invalid("collection", "is missing; the first message of a stream must name one")
    stream = _Stream(engine, limits, pool, await find(message.collection), context)
    stream.take_in(message)
    reading: asyncio.Task[pb.UpsertRecordsStreamRequest | None] | None = None
    ended = False
    try:
        while stream.embedding or not ended:
            if reading is None and not ended and stream.has_room:
                reading = asyncio.create_task(next_of(messages))
            head = stream.head
            await asyncio.wait(
                [task for task in (reading, head) if task is not None], return_when=asyncio.FIRST_COMPLETED
            )
            if reading is not None and reading.done():
                message, reading = reading.result(), None
                if message is None:
                    ended = True
                else:
                    stream.take_in(message)
            if head is not None and head.done():
                await writable(stream.name)
                yield await stream.write(head.result())
                stream.drop_head()
    finally:
        await end([*stream.embedding, reading])


class _Stream:
    """The messages of one stream that are not answered."""

    def __init__(
        self,
        engine: Engine,
        limits: requests.Limits,
        pool: IndexPool,
        collection: CollectionBackend,
        context: requests.Context,
    ) -> None:
        self._engine = engine
        self._limits = limits
        self._pool = pool
        self._collection = collection
        self._context = context
        self._caller = requests.caller(context, default=Lane.BULK)
        self._request_id = requests.request_id(context)
        self._embedders: dict[Truncation, BulkEmbedder] = {}
        self._number = 0
        self._sizes: deque[int] = deque()
        #: Holds back the groups of texts beyond those that may be under way.
        self._groups = asyncio.Semaphore(GROUPS)
        #: In the order of the messages.
        self.embedding: deque[asyncio.Task[_Batch]] = deque()

    @property
    def name(self) -> str:
        """Name of the collection."""
        return self._collection.spec.name

    @property
    def has_room(self) -> bool:
        """Whether another message may be read: while one is written, there is always another one to embed."""
        return len(self.embedding) < 2 or (len(self.embedding) < _MESSAGES and sum(self._sizes) < _RECORDS)

    @property
    def head(self) -> asyncio.Task[_Batch] | None:
        """The message that is to be written next."""
        return self.embedding[0] if self.embedding else None

    def drop_head(self) -> None:
        """Forget the message that was written."""
        self.embedding.popleft()
        self._sizes.popleft()

    def take_in(self, message: pb.UpsertRecordsStreamRequest) -> None:
        """Begin to embed a message."""
        if message.collection not in ("", self.name):
            raise invalid(
                "collection", f"is {message.collection!r}, and the stream is of {self.name!r}; open another one"
            )
        if message.batch_number <= self._number:
            raise invalid("batch_number", f"is {message.batch_number} after {self._number}; the numbers must grow")
        self._number = message.batch_number
        if message.records:
            self._limits.check_count(len(message.records), "records", "record")
        embedder = None
        if message.records and not message.HasField("vectors"):
            embedder = self._embedder(message)
        self._sizes.append(len(message.records))
        self.embedding.append(asyncio.create_task(self._embed(message, embedder)))

    async def write(self, batch: _Batch) -> pb.UpsertRecordsStreamResponse:
        """Write the records of a message, but those that the index refuses; return the answer."""
        while batch.records:
            upsert = partial(self._collection.upsert, batch.records, batch.matrix)
            try:
                result = await self._pool.run(upsert, within=self._pool.writers(self.name))
            except ServiceError as error:
                if error.code is not Code.INVALID_ARGUMENT:
                    raise
                self._leave_out(batch, error)
            else:
                batch.response.inserted_count, batch.response.updated_count = result.inserted, result.updated
                batch.response.receipt.CopyFrom(replies.receipt(result))
                break
        return batch.response

    def _embedder(self, message: pb.UpsertRecordsStreamRequest) -> BulkEmbedder:
        """Return the embedder of a message: one for each kind of truncation."""
        default = Truncation(self._collection.spec.truncation)
        truncation = requests.truncation(message.truncation, default=default)
        found = self._embedders.get(truncation)
        if found is None:
            if not self._embedders:
                self._engine.check_room(self._caller)
            found = self._embedders[truncation] = self._opened_embedder(truncation)
        return found

    def _opened_embedder(self, truncation: Truncation) -> BulkEmbedder:
        model = collection_model(self._engine, self._collection)
        return BulkEmbedder(
            self._engine,
            self._limits,
            model,
            model.manifest.prompts.passage,
            truncation,
            self._caller,
            self._request_id,
            ending=_ENDING,
        )

    async def _embed(self, message: pb.UpsertRecordsStreamRequest, embedder: BulkEmbedder | None) -> _Batch:
        """Read the records of a message and find their vectors."""
        batch = _Batch(pb.UpsertRecordsStreamResponse(batch_number=message.batch_number))
        # In the pool, since the metadata of a message may take seconds to read.
        places = await self._pool.run(lambda: self._read(batch, message), self._context)
        if message.HasField("vectors"):
            try:
                batch.matrix = self._given(message)[places]
            except ServiceError as error:
                self._leave_out(batch, error)
        elif embedder is not None and batch.records:
            await self._embed_texts(batch, embedder)
        return batch

    def _given(self, message: pb.UpsertRecordsStreamRequest) -> Matrix:
        """Return the vectors of a message."""
        matrix = caller_vectors(message.vectors, len(message.records), "vectors")
        dimensions = self._collection.spec.dimensions
        if matrix.shape[1] != dimensions:
            # The index would name the first only, and the others one by one.
            raise invalid("vectors", f"has {matrix.shape[1]} dimensions, the collection has {dimensions}")
        return matrix

    def _read(self, batch: _Batch, message: pb.UpsertRecordsStreamRequest) -> list[int]:
        """Add the records of a message to its batch; return the places of those that do not fail."""
        places = []
        for i, record in enumerate(message.records):
            cancellation.check()
            try:
                self._limits.check_texts([record.text], lambda _: "text", allow_empty=True)
                batch.records += new_records([record])
            except ServiceError as error:
                self._fail(batch, record.id, _alone(error))
            else:
                places.append(i)
        return places

    async def _embed_texts(self, batch: _Batch, embedder: BulkEmbedder) -> None:
        """Embed the texts of a message in groups, and leave out the records that have no vector."""
        texts = [record.text for record in batch.records]

        async def embed(first: int) -> Embedded:
            async with self._groups:
                return await embedder.embed(texts[first : first + GROUP_TEXTS])

        starts = range(0, len(texts), GROUP_TEXTS)
        tasks = [asyncio.create_task(embed(first)) for first in starts]
        try:
            groups = await asyncio.gather(*tasks)
        finally:
            await end(tasks)
        spec, unit = self._collection.spec, embedder.model.manifest.normalize
        batch.matrix = np.zeros((len(texts), spec.dimensions), dtype=np.float32)
        kept = []
        for first, group in zip(starts, groups, strict=True):
            for places, inference in group.parts:
                rows = [first + i for i in places]
                batch.matrix[rows] = shape(inference.output, spec.dimensions, unit=unit)
                kept += rows
            for i, error in group.failures.items():
                self._fail(batch, batch.records[first + i].id, error)
        batch.keep(sorted(kept))

    def _leave_out(self, batch: _Batch, error: ServiceError) -> None:
        """Fail the records that an error names, each for what is wrong with it; all of them if it names none."""
        wrong: dict[int, list[Violation]] = {}
        for violation in error.violations:
            if found := _OF_RECORD.fullmatch(violation.field):
                path = ".".join(part for part in ("vector" if found[1] else "", found[3]) if part)
                wrong.setdefault(int(found[2]), []).append(Violation(path, violation.description))
        if not wrong or max(wrong) >= len(batch.records):
            wrong = {i: list(error.violations) for i in range(len(batch.records))}
        for i, violations in wrong.items():
            self._fail(batch, batch.records[i].id, invalid_fields(violations))
        batch.keep([i for i in range(len(batch.records)) if i not in wrong])

    def _fail(self, batch: _Batch, record_id: str, error: ServiceError) -> None:
        batch.response.failures.append(pb.RecordFailure(id=record_id, error=status_of(error, self._request_id)))


def _alone(error: ServiceError) -> ServiceError:
    """Return an error about `records[0]` as one about a record."""
    if not error.violations:
        return error
    return invalid_fields(
        [
            Violation(violation.field.removeprefix("records[0]."), violation.description)
            for violation in error.violations
        ]
    )
