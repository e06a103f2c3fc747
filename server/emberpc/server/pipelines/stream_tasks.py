"""Helpers for asyncio tasks: a coroutine that reads the next message of a stream, and the cancellation of tasks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any, TypeVar

Message = TypeVar("Message")


async def next_message(messages: AsyncIterator[Message]) -> Message | None:
    """Return the next message; None at the end of the stream. Errors of the stream pass through.

    This function exists since only a coroutine can become a task, and `anext` may return another awaitable.
    """
    return await anext(messages, None)


async def cancel_tasks(tasks: Iterable[asyncio.Task[Any] | None]) -> None:
    """Cancel the tasks that have not ended, and wait until all have ended. Ignore errors of tasks; skip None.

    If this coroutine is cancelled, the wait ends early.
    """
    present = [task for task in tasks if task is not None]
    for task in present:
        task.cancel()
    await asyncio.gather(*present, return_exceptions=True)
