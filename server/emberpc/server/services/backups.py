"""BackupCollection and RestoreCollection: a collection as one file, in pieces."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Executor, Future

from emberpc.server.engine import Truncation
from emberpc.server.errors import Code, ServiceError, invalid
from emberpc.server.index import CollectionBackend, CollectionSpec, IndexBackend, RestorationBackend
from emberpc.server.services import requests
from emberpc.server.services.filters import check_indexed_fields
from emberpc.server.services.stalling import ended_after
from emberpc.server.services.tasks import next_of
from emberpc.v1 import index_pb2 as pb

#: Each holds a thread at times, and as much of the disk as the collection.
_AT_ONCE = 2
#: How long a caller may take no piece, or send none: what is kept for it is in the way of others.
_STALL_SECONDS = 60.0


class Backups:
    """Answers the calls that make a file of a collection and a collection of a file, two at a time of each.

    Args:
        index: the collections.
        pool: where the work runs.
        stall_seconds: a caller who takes or sends nothing for so long is given up.
    """

    def __init__(self, index: IndexBackend, pool: Executor, stall_seconds: float = _STALL_SECONDS) -> None:
        self._index = index
        self._pool = pool
        self._stall_seconds = stall_seconds
        self._backups = asyncio.Semaphore(_AT_ONCE)
        self._restores = asyncio.Semaphore(_AT_ONCE)

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
            ServiceError: as the collection says, and NOT_FOUND if there is none of the name.
        """
        collection = await find(request.name)
        async with self._backups:
            stop = threading.Event()
            pieces = collection.backup(stop.is_set)
            job = self._pool.submit(next, pieces, None)
            first = True
            try:
                while (piece := await asyncio.wrap_future(job)) is not None:
                    total = piece.total if first else 0
                    first = False
                    with ended_after(self._stall_seconds, context):
                        yield pb.BackupCollectionResponse(chunk=piece.data, sha256=piece.sha256, total_bytes=total)
                    job = self._pool.submit(next, pieces, None)
            finally:
                stop.set()
                # When nothing runs in it: now, or when the copy has noticed that it is to stop.
                job.add_done_callback(lambda _: self._pool.submit(pieces.close))

    async def restore(self, messages: AsyncIterator[pb.RestoreCollectionRequest]) -> CollectionBackend:
        """Make a collection of what comes; a caller who goes away, or sends nothing for long, leaves nothing behind.

        Raises:
            ServiceError: as the index says; INVALID_ARGUMENT if the messages are not in order, DEADLINE_EXCEEDED if
                none comes for long.
        """
        async with self._restores:
            message = await self._next(messages)
            if message is None or not message.name:
                raise invalid("name", "is missing; the first message must have the name of the collection to make")
            name = message.name
            opening = self._pool.submit(self._index.restore, name, message.total_bytes, _check_servable)
            try:
                restoration = await asyncio.wrap_future(opening)
                sha256 = ""
                while message is not None:
                    if message.name not in ("", name):
                        raise invalid("name", f"is {message.name!r}, and the stream is of {name!r}; open another one")
                    if sha256:
                        raise invalid("sha256", "was in a message that is not the last; send it with the last one")
                    await asyncio.wrap_future(self._pool.submit(restoration.write, message.chunk))
                    sha256 = message.sha256
                    message = await self._next(messages)
                return await asyncio.wrap_future(self._pool.submit(restoration.finish, sha256))
            finally:
                opening.add_done_callback(self._close)

    async def _next(self, messages: AsyncIterator[pb.RestoreCollectionRequest]) -> pb.RestoreCollectionRequest | None:
        """Return the next message; None at the end."""
        try:
            return await asyncio.wait_for(next_of(messages), self._stall_seconds)
        except asyncio.TimeoutError as error:
            message = f"nothing came for {self._stall_seconds:g} s, so nothing was restored; send it again"
            raise ServiceError(Code.DEADLINE_EXCEEDED, message, reason="STALLED") from error

    def _close(self, opening: Future[RestorationBackend]) -> None:
        """Close a restoration, if it came to be."""
        if not opening.cancelled() and opening.exception() is None:
            self._pool.submit(opening.result().close)


def _check_servable(spec: CollectionSpec) -> None:
    """Raise ValueError or ServiceError if a collection cannot have been made by this service.

    Whether its model is served is no matter, as for one that is opened: its vectors can be searched without.
    """
    Truncation(spec.truncation)
    check_indexed_fields(spec.indexed_fields, "indexed_fields")
