"""Callers who take nothing of what they asked for: what is kept for them is in the way of others."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import grpc

from emberpc.server.errors import Code, ServiceError
from emberpc.server.services import requests
from emberpc.server.statuses import status_of
from emberpc.wire import status

#: The loop keeps none of the tasks that it runs.
_tasks: set[asyncio.Task[None]] = set()


@contextmanager
def ended_after(
    seconds: float,
    context: requests.Context,
    contended: Callable[[], bool] = lambda: False,
    contended_seconds: float | None = None,
) -> Iterator[None]:
    """End the call with DEADLINE_EXCEEDED if the block, which gives its caller a message, lasts too long.

    The handler is cancelled at once; the caller is told when it reads on.

    Args:
        seconds: how long it may last.
        context: gRPC's view of the call.
        contended: whether others wait for what the call holds.
        contended_seconds: how long it may last if so; looked at that often. None: as long.
    """
    handler = asyncio.current_task()
    loop = asyncio.get_running_loop()
    step = seconds if contended_seconds is None else contended_seconds
    steps = 0
    timer: asyncio.TimerHandle | None = None

    def look() -> None:
        nonlocal timer, steps
        steps += 1
        if steps * step >= seconds or contended():
            end()
        else:
            timer = loop.call_later(step, look)

    def end() -> None:
        task = loop.create_task(_tell(steps * step, context))
        _tasks.add(task)
        task.add_done_callback(_tasks.discard)
        if handler is not None:
            # After the first step of the task: gRPC sends no status of a handler that was cancelled before.
            loop.call_soon(handler.cancel)

    timer = loop.call_later(step, look)
    try:
        yield
    finally:
        if timer is not None:
            timer.cancel()


async def _tell(seconds: float, context: requests.Context) -> None:
    request_id = requests.request_id(context)
    message = f"nothing was read for {seconds:g} s, so the call was ended; begin again, and read without a pause"
    told = status_of(ServiceError(Code.DEADLINE_EXCEEDED, message, reason="STALLED"), request_id)
    details = (status.DETAILS_KEY, told.SerializeToString()), (status.REQUEST_ID_KEY, request_id)
    # It always raises, and differently if the caller is gone.
    with suppress(grpc.aio.BaseError):
        await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, message, details)
