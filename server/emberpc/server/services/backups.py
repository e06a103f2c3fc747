"""BackupCollection and RestoreCollection: send and receive a collection as one file.

This module ends a backup whose caller does not read; the pipeline ends a restore whose caller sends nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager, suppress

import grpc.aio

from emberpc.server.collections import CollectionBackend
from emberpc.server.errors import Code, ServiceError
from emberpc.server.pipelines.backups import CollectionBackups, RestoreMessage
from emberpc.server.services import requests
from emberpc.server.statuses import status_of
from emberpc.v1 import index_pb2 as pb
from emberpc.wire import status

#: The tasks that end stalled calls. A reference is kept here until a task is done, since the event loop keeps only weak
#: references, and a task without another reference may be collected before it runs.
_tasks: set[asyncio.Task[None]] = set()


async def backup_responses(
    backups: CollectionBackups, open_collection: Callable[[], Awaitable[CollectionBackend]], context: requests.Context
) -> AsyncIterator[pb.BackupCollectionResponse]:
    """Yield the responses of a BackupCollection. The first has the size of the backup, the last its SHA-256.

    If the caller does not read a response, the call is ended with DEADLINE_EXCEEDED, as `_ended_after` describes: after
    `backups.stall_seconds`, or at a multiple of `backups.contended_seconds` if another caller waits for a backup then.

    Args:
        backups: the pipeline.
        open_collection: opens the collection.
        context: the context of the call.

    Raises:
        ServiceError: as `open_collection` and `CollectionBackups.backup` do.
    """
    first = True
    async with aclosing(backups.backup(await open_collection(), requests.caller(context))) as pieces:
        async for piece in pieces:
            total = piece.total if first else 0
            first = False
            with _ended_after(backups.stall_seconds, context, lambda: backups.backups_wait, backups.contended_seconds):
                yield pb.BackupCollectionResponse(chunk=piece.data, sha256=piece.sha256, total_bytes=total)


async def restore(
    backups: CollectionBackups, messages: AsyncIterator[pb.RestoreCollectionRequest]
) -> CollectionBackend:
    """Create a collection from the messages of a RestoreCollection; errors are those of `CollectionBackups.restore`."""
    return await backups.restore(messages, _restore_message)


def _restore_message(message: pb.RestoreCollectionRequest) -> RestoreMessage:
    return RestoreMessage(message.name, message.total_bytes, message.chunk, message.sha256)


@contextmanager
def _ended_after(
    seconds: float, context: requests.Context, contended: Callable[[], bool], contended_seconds: float
) -> Iterator[None]:
    """Context manager: end the call with DEADLINE_EXCEEDED if the block, which yields a response, lasts too long.

    The block lasts until gRPC has taken the response, and gRPC takes none while the caller does not read. To end the
    call, the status is given to gRPC, and then the task that entered the block, the handler of the call, is cancelled.
    The caller gets the status when it reads again.

    Args:
        seconds: how long the block may last, rounded up to a multiple of `contended_seconds`.
        context: the context of the call.
        contended: returns whether another caller waits for the slot that this call holds.
        contended_seconds: interval of the checks. A check ends the call if `contended` returns True or the block has
            lasted for `seconds`.
    """
    handler = asyncio.current_task()
    loop = asyncio.get_running_loop()
    steps = 0
    timer: asyncio.TimerHandle | None = None

    def check() -> None:
        nonlocal timer, steps
        steps += 1
        if steps * contended_seconds >= seconds or contended():
            end()
        else:
            timer = loop.call_later(contended_seconds, check)

    def end() -> None:
        task = loop.create_task(_abort(steps * contended_seconds, context))
        _tasks.add(task)
        task.add_done_callback(_tasks.discard)
        if handler is not None:
            # The handler is cancelled after the first step of `task`: gRPC sends no status for a handler that was
            # cancelled before.
            loop.call_soon(handler.cancel)

    timer = loop.call_later(contended_seconds, check)
    try:
        yield
    finally:
        if timer is not None:
            timer.cancel()


async def _abort(seconds: float, context: requests.Context) -> None:
    """End a call with a DEADLINE_EXCEEDED status, whose message says that nothing was read for `seconds` seconds."""
    request_id = requests.request_id(context)
    message = f"nothing was read for {seconds:g} s, so the call was ended; begin again, and read without a pause"
    error_status = status_of(ServiceError(Code.DEADLINE_EXCEEDED, message, reason="STALLED"), request_id)
    details = (status.DETAILS_KEY, error_status.SerializeToString()), (status.REQUEST_ID_KEY, request_id)
    # `abort` always raises: AbortError, or another error of gRPC if the caller has left. The call has ended either way.
    with suppress(grpc.aio.BaseError):
        await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, message, details)
