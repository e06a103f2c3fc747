"""Back up collections to files, and restore collections from them. The bytes are sent in pieces."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from emberpc.server.cancellation import Cancellation
from emberpc.server.collections import CollectionBackend, CollectionSpec, IndexBackend, Piece, RestorationBackend
from emberpc.server.engine import Caller, Truncation
from emberpc.server.errors import Code, ServiceError, invalid
from emberpc.server.pipelines.filter_fields import check_indexed_fields
from emberpc.server.pipelines.index_pool import IndexPool
from emberpc.server.pipelines.slots import Slots
from emberpc.server.pipelines.stream_tasks import cancel_tasks, next_message

#: Most backups at a time, and most restores at a time. Each of them needs a thread at times, and as many bytes of disk
#: as the collection.
_AT_ONCE = 2
#: Most callers that wait for a slot, and the seconds after which a refused caller may retry.
_MAX_WAITING, _RETRY_SECONDS = 8, 5.0
#: Seconds after which a call is ended if its caller reads or sends nothing: while no other caller waits for a slot, and
#: while another caller waits.
_STALL_SECONDS, _CONTENDED_SECONDS = 60.0, 15.0

Message = TypeVar("Message")


@dataclass(frozen=True)
class RestoreMessage:
    """A piece of a backup to restore.

    Attributes:
        name: name of the new collection; may be empty after the first message.
        total_bytes: bytes of the backup, in the first message; 0: unknown.
        data: the next bytes.
        sha256: SHA-256 (hex) of the backup, in the last message.
    """

    name: str
    total_bytes: int
    data: bytes
    sha256: str


class CollectionBackups:
    """Backs up and restores collections, two at a time of each.

    Args:
        index: the collections.
        pool: runs the blocking calls of the index.
        stall_seconds: seconds without reading or sending after which a caller's call is ended.
        contended_seconds: like `stall_seconds`, but for the time while another caller waits for a slot; a greater
            number than `stall_seconds` is lowered to it.
    """

    def __init__(
        self,
        index: IndexBackend,
        pool: IndexPool,
        stall_seconds: float = _STALL_SECONDS,
        contended_seconds: float = _CONTENDED_SECONDS,
    ) -> None:
        self._index = index
        self._pool = pool
        self.stall_seconds = stall_seconds
        self.contended_seconds = min(contended_seconds, stall_seconds)
        self._backups = Slots(_AT_ONCE, _MAX_WAITING, "backups", _RETRY_SECONDS)
        self._restores = Slots(_AT_ONCE, _MAX_WAITING, "restores", _RETRY_SECONDS)

    @property
    def backups_wait(self) -> bool:
        """Return whether a caller waits for a backup, since two backups are under way."""
        return self._backups.waiting > 0

    async def backup(self, collection: CollectionBackend, caller: Caller) -> AsyncGenerator[Piece, None]:
        """Yield the pieces of a backup of a collection. The backup ends when the caller leaves.

        Two backups run at a time, and further callers wait. A backup runs until its caller has read all pieces. If the
        caller's deadline passes while the index makes the copy, no piece is yielded.

        Raises:
            ServiceError: RESOURCE_EXHAUSTED if too many callers or heavy calls wait, or the disk is full; any other
                error of `CollectionBackend.backup`.
        """
        async with self._backups.hold():
            stop = Cancellation(caller.seconds_left)
            pieces = collection.backup(stop)
            # A heavy call, since the index copies the whole collection before the first piece.
            job = await self._pool.submit(lambda: next(pieces, None), heavy=True)
            try:
                while (piece := await asyncio.wrap_future(job)) is not None:
                    yield piece
                    job = self._pool.start(lambda: next(pieces, None))
            finally:
                stop.cancel()
                # The generator can be closed only while no thread runs it: now, or when the thread has noticed the
                # cancellation.
                job.add_done_callback(lambda _: self._pool.start(pieces.close))

    async def restore(
        self, messages: AsyncIterator[Message], read: Callable[[Message], RestoreMessage]
    ) -> CollectionBackend:
        """Create and return a collection from the pieces of a backup. If the restore fails, nothing remains.

        Only two restores run at a time. A further caller waits after its first message, so a caller that sends nothing
        blocks no other.

        Args:
            messages: the messages of the caller.
            read: returns the content of a message.

        Raises:
            ServiceError: INVALID_ARGUMENT if a message is wrong or out of order, or the bytes are no intact backup;
                ALREADY_EXISTS if a collection has the name; FAILED_PRECONDITION if a newer version wrote the backup;
                DEADLINE_EXCEEDED if no message comes for 60 s (`stall_seconds`), or for 15 s (`contended_seconds`)
                after the first message while others wait; RESOURCE_EXHAUSTED if too many callers wait, the disk is
                full, or there are too many collections; any other error of `IndexBackend.restore`.
        """
        message = await self._next(messages, lambda: False)
        first = None if message is None else read(message)
        if first is None or not first.name:
            raise invalid("name", "is missing; the first message must have the name of the collection to make")
        async with self._restores.hold():
            return await self._restore(first, messages, read)

    async def _restore(
        self, first: RestoreMessage, messages: AsyncIterator[Message], read: Callable[[Message], RestoreMessage]
    ) -> CollectionBackend:
        name = first.name
        opening = self._pool.start(lambda: self._index.restore(name, first.total_bytes, _check_servable))
        try:
            restoration = await asyncio.wrap_future(opening)
            sha256 = ""
            piece: RestoreMessage | None = first
            while piece is not None:
                if piece.name not in ("", name):
                    raise invalid("name", f"is {piece.name!r}, and the stream is of {name!r}; open another one")
                if sha256:
                    raise invalid("sha256", "was in a message that is not the last; send it with the last message")
                await self._pool.run(partial(restoration.write, piece.data))
                sha256 = piece.sha256
                message = await self._next(messages, lambda: self._restores.waiting > 0)
                piece = None if message is None else read(message)
            # Not refused if many heavy calls wait, since the caller would have to send all bytes again. At most two
            # restores run at a time.
            return await self._pool.run(partial(restoration.finish, sha256), heavy=True, refuse=False)
        finally:
            opening.add_done_callback(self._close)

    async def _next(self, messages: AsyncIterator[Message], contended: Callable[[], bool]) -> Message | None:
        """Return the next message; None at the end of the stream.

        Args:
            messages: the messages of the caller.
            contended: returns whether another caller waits, so that the wait for the message must be shorter.

        Raises:
            ServiceError: DEADLINE_EXCEEDED if no message came in time.
        """
        reading = asyncio.create_task(next_message(messages))
        waited = 0.0
        try:
            while not reading.done():
                if waited >= self.stall_seconds or (waited and contended()):
                    message = f"nothing came for {waited:g} s, so nothing was restored; send it again"
                    raise ServiceError(Code.DEADLINE_EXCEEDED, message, reason="STALLED")
                step = min(self.contended_seconds, self.stall_seconds - waited)
                await asyncio.wait([reading], timeout=step)
                waited += step
            return reading.result()
        finally:
            await cancel_tasks([reading])

    def _close(self, opening: Future[RestorationBackend]) -> None:
        """Close the restoration that `opening` gave, in the pool; do nothing if `opening` failed or was cancelled."""
        if not opening.cancelled() and opening.exception() is None:
            self._pool.start(opening.result().close)


def _check_servable(spec: CollectionSpec) -> None:
    """Check the truncation and the indexed fields of the spec in a backup; the index checks the rest of the backup.

    The model of the spec need not be served.

    Raises:
        ValueError: the truncation is unknown.
        ServiceError: INVALID_ARGUMENT for fields that cannot be indexed.
    """
    Truncation(spec.truncation)
    check_indexed_fields(spec.indexed_fields, "indexed_fields")
