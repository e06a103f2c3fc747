"""BackupCollection and RestoreCollection: a collection as one file, in pieces."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from functools import partial

from emberpc.server.cancellation import Cancellation
from emberpc.server.collections import CollectionBackend, CollectionSpec, IndexBackend, RestorationBackend
from emberpc.server.engine import Truncation
from emberpc.server.errors import Code, ServiceError, invalid
from emberpc.server.services import requests
from emberpc.server.services.filters import check_indexed_fields
from emberpc.server.services.index_pool import IndexPool, seconds_left
from emberpc.server.services.slots import Slots
from emberpc.server.services.stalling import ended_after
from emberpc.server.services.tasks import end, next_of
from emberpc.v1 import index_pb2 as pb

#: Each holds a thread at times, and as much of the disk as the collection.
_AT_ONCE = 2
#: Those that may wait for their turn; a caller beyond is refused, and may try again after these seconds.
_MOST_WAITING, _RETRY_SECONDS = 8, 5.0
#: How long a caller may take no piece, or send none; and how long while others wait for its turn.
_STALL_SECONDS, _CONTENDED_SECONDS = 60.0, 15.0


class Backups:
    """Answers the calls that make a file of a collection and a collection of a file, two at a time of each.

    Args:
        index: the collections.
        pool: where the work runs.
        stall_seconds: a caller who takes or sends nothing for so long is given up.
        contended_seconds: the same, while others wait for their turn.
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
        self._stall_seconds = stall_seconds
        self._contended_seconds = min(contended_seconds, stall_seconds)
        self._backups = Slots(_AT_ONCE, _MOST_WAITING, "backups", _RETRY_SECONDS)
        self._restores = Slots(_AT_ONCE, _MOST_WAITING, "restores", _RETRY_SECONDS)

    async def backup(
        self,
        find: Callable[[str], Awaitable[CollectionBackend]],
        request: pb.BackupCollectionRequest,
        context: requests.Context,
    ) -> AsyncIterator[pb.BackupCollectionResponse]:
        """Answer a BackupCollection; a caller who goes away, or takes nothing for long, ends it.

        Args:
            find: gives a collection by its name.
            request: the request.
            context: gRPC's view of the call.

        Raises:
            ServiceError: as the collection says, NOT_FOUND if there is none of the name, and RESOURCE_EXHAUSTED if
                too many callers wait for their turn.
        """
        collection = await find(request.name)
        async with self._backups.one():
            stop = Cancellation(seconds_left(context))
            pieces = collection.backup(stop)
            # The whole copy is made for the first piece.
            job = await self._pool.submit(lambda: next(pieces, None), heavy=True)
            first = True
            try:
                while (piece := await asyncio.wrap_future(job)) is not None:
                    total = piece.total if first else 0
                    first = False
                    with ended_after(
                        self._stall_seconds, context, lambda: self._backups.waiting > 0, self._contended_seconds
                    ):
                        yield pb.BackupCollectionResponse(chunk=piece.data, sha256=piece.sha256, total_bytes=total)
                    job = self._pool.start(lambda: next(pieces, None))
            finally:
                stop.cancel()
                # When nothing runs in it: now, or when the copy has noticed that it is to stop.
                job.add_done_callback(lambda _: self._pool.start(pieces.close))

    async def restore(self, messages: AsyncIterator[pb.RestoreCollectionRequest]) -> CollectionBackend:
        """Make a collection of what comes; a caller who goes away, or sends nothing for long, leaves nothing behind.

        The turn of a caller begins with its first message, so that a silent one keeps nobody waiting.

        Raises:
            ServiceError: as the index says; INVALID_ARGUMENT if the messages are not in order, DEADLINE_EXCEEDED if
                none comes for long, RESOURCE_EXHAUSTED if too many callers wait for their turn.
        """
        message = await self._next(messages, lambda: False)
        if message is None or not message.name:
            raise invalid("name", "is missing; the first message must have the name of the collection to make")
        async with self._restores.one():
            return await self._restore(message, messages)

    async def _restore(
        self, first: pb.RestoreCollectionRequest, messages: AsyncIterator[pb.RestoreCollectionRequest]
    ) -> CollectionBackend:
        name, total = first.name, first.total_bytes
        opening = self._pool.start(lambda: self._index.restore(name, total, _check_servable))
        try:
            restoration = await asyncio.wrap_future(opening)
            sha256 = ""
            message: pb.RestoreCollectionRequest | None = first
            while message is not None:
                if message.name not in ("", name):
                    raise invalid("name", f"is {message.name!r}, and the stream is of {name!r}; open another one")
                if sha256:
                    raise invalid("sha256", "was in a message that is not the last; send it with the last one")
                await self._pool.run(partial(restoration.write, message.chunk))
                sha256 = message.sha256
                message = await self._next(messages, lambda: self._restores.waiting > 0)
            # Never refused, since all would have to be sent again; there are no more than two.
            return await self._pool.run(partial(restoration.finish, sha256), heavy=True, refuse=False)
        finally:
            opening.add_done_callback(self._close)

    async def _next(
        self, messages: AsyncIterator[pb.RestoreCollectionRequest], contended: Callable[[], bool]
    ) -> pb.RestoreCollectionRequest | None:
        """Return the next message; None at the end. `contended`: whether others wait for this caller's turn."""
        coming = asyncio.create_task(next_of(messages))
        waited = 0.0
        try:
            while not coming.done():
                if waited >= self._stall_seconds or (waited and contended()):
                    message = f"nothing came for {waited:g} s, so nothing was restored; send it again"
                    raise ServiceError(Code.DEADLINE_EXCEEDED, message, reason="STALLED")
                step = min(self._contended_seconds, self._stall_seconds - waited)
                await asyncio.wait([coming], timeout=step)
                waited += step
            return coming.result()
        finally:
            await end([coming])

    def _close(self, opening: Future[RestorationBackend]) -> None:
        """Close a restoration, if it came to be."""
        if not opening.cancelled() and opening.exception() is None:
            self._pool.start(opening.result().close)


def _check_servable(spec: CollectionSpec) -> None:
    """Raise ValueError or ServiceError if a collection cannot have been made by this service.

    Whether its model is served is no matter, as for one that is opened: its vectors can be searched without.
    """
    Truncation(spec.truncation)
    check_indexed_fields(spec.indexed_fields, "indexed_fields")
