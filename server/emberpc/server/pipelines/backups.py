"""Back up collections, and restore collections from backups. A backup is sent and received in pieces."""

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
from emberpc.server.pipelines.cancel_tasks import cancel_tasks
from emberpc.server.pipelines.filter_fields import check_indexed_fields
from emberpc.server.pipelines.index_pool import IndexPool
from emberpc.server.pipelines.next_message import next_message
from emberpc.server.pipelines.slots import Slots

#: Slots: maximum number of backups, and of restores, at a time. Each of them needs a thread at times, and about as many
#: bytes of disk as the collection.
_AT_ONCE = 2
#: Maximum number of callers that wait for a slot, of backups and of restores each, and the seconds after which a
#: refused caller may retry.
_MAX_WAITING, _RETRY_SECONDS = 8, 5.0
#: Seconds after which a call is ended if its caller reads or sends nothing; and the interval at which the call is ended
#: already if another caller waits for a slot of the same kind. Before its first message, a restore has only the former.
_STALL_SECONDS, _CONTENDED_SECONDS = 60.0, 15.0

Message = TypeVar("Message")


@dataclass(frozen=True)
class RestoreMessage:
    """A message with a piece of a backup to restore.

    Attributes:
        name: name of the new collection; in later messages the same name or empty.
        total_bytes: bytes of the whole backup; 0: unknown. Only that of the first message is read.
        data: the next bytes.
        sha256: in the last message, SHA-256 (hex) of the whole backup; empty in the other messages.
    """

    name: str
    total_bytes: int
    data: bytes
    sha256: str


class CollectionBackups:
    """Backs up and restores collections: at most two backups and two restores at a time.

    `restore` ends the call of a caller that sends nothing. `services.backups` ends the call of a caller that does not
    read the pieces of a backup; for that, `stall_seconds` and `contended_seconds` are attributes.

    Args:
        index: the collections.
        pool: runs the blocking calls of the index.
        stall_seconds: seconds after which the call of a caller that sends or reads nothing is ended.
        contended_seconds: seconds after which, and after each multiple of which, such a call is ended if another caller
            waits for its slot. `stall_seconds` if that is less.
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
        """Return whether a caller waits to begin a backup, since two backups are under way."""
        return self._backups.waiting > 0

    async def backup(self, collection: CollectionBackend, caller: Caller) -> AsyncGenerator[Piece, None]:
        """Yield the pieces of a backup of a collection.

        At most two backups run at a time; further callers wait. A backup runs until all its pieces are read, or this
        generator is closed, as when the caller leaves. If the caller's deadline passes while the index makes the copy,
        nothing is yielded, without an error. After the first piece, the deadline has no effect here.

        Raises:
            ServiceError: RESOURCE_EXHAUSTED if too many callers wait for a backup, too many heavy calls wait, or the
                disk is full; any other error of `CollectionBackend.backup`.
        """
        async with self._backups.hold():
            stop = Cancellation(caller.seconds_left)
            pieces = collection.backup(stop)
            # A heavy call, since the index copies the whole collection before the first piece.
            future = await self._pool.submit(lambda: next(pieces, None), heavy=True)
            try:
                while (piece := await asyncio.wrap_future(future)) is not None:
                    yield piece
                    future = self._pool.start(lambda: next(pieces, None))
            finally:
                stop.cancel()
                # A generator cannot be closed while a thread runs it. So `pieces` is closed when `future` has ended: at
                # once, or when the thread has noticed the cancellation.
                future.add_done_callback(lambda _: self._pool.start(pieces.close))

    async def restore(
        self, messages: AsyncIterator[Message], read: Callable[[Message], RestoreMessage]
    ) -> CollectionBackend:
        """Create and return a collection from the pieces of a backup. If the restore fails, its files are removed.

        At most two restores run at a time. A restore begins after its caller's first message, so a caller that sends
        nothing keeps no other caller waiting.

        Args:
            messages: the messages of the caller.
            read: returns the content of a message.

        Raises:
            ServiceError: INVALID_ARGUMENT if the first message has no name or a wrong one, a later message has another
                name, a message follows the one with the SHA-256, the SHA-256 is missing, or the bytes are no intact
                backup; ALREADY_EXISTS if a collection has the name; FAILED_PRECONDITION if a newer version wrote the
                backup; DEADLINE_EXCEEDED if no message comes for `stall_seconds` or, after the first message and while
                another caller waits for a restore, for `contended_seconds`; RESOURCE_EXHAUSTED if too many callers
                wait, the disk is full, or there are too many collections; any other error of `IndexBackend.restore` and
                of the methods of its result.
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
            # Not refused if many heavy calls wait: after a refusal, the caller would have to send all bytes again. At
            # most two such calls wait, since at most two restores run at a time.
            return await self._pool.run(partial(restoration.finish, sha256), heavy=True, refuse=False)
        finally:
            opening.add_done_callback(self._close)

    async def _next(self, messages: AsyncIterator[Message], contended: Callable[[], bool]) -> Message | None:
        """Return the next message; None at the end of the stream.

        Args:
            messages: the messages of the caller.
            contended: returns whether another caller waits for a restore. Called every `contended_seconds`.

        Raises:
            ServiceError: DEADLINE_EXCEEDED if no message came for `stall_seconds`, or before `contended` returned True;
                any error of `messages`.
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
        """Close the restoration that is the result of `opening`, in the pool; nothing if `opening` failed.

        The files of a restoration that became no collection are removed.
        """
        if not opening.cancelled() and opening.exception() is None:
            self._pool.start(opening.result().close)


def _check_servable(spec: CollectionSpec) -> None:
    """Check the truncation and the indexed fields of the spec in a backup; the index checks the rest of the backup.

    The model of the spec need not be served.

    Raises:
        ValueError: the truncation is unknown.
        ServiceError: INVALID_ARGUMENT for too many indexed fields, or a field that cannot be indexed.
    """
    Truncation(spec.truncation)
    check_indexed_fields(spec.indexed_fields, "indexed_fields")
