"""Tasks of a stream's handler."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any, TypeVar

Message = TypeVar("Message")


async def next_of(messages: AsyncIterator[Message]) -> Message | None:
    """Return the next message; None at the end. A coroutine, which `anext` need not be, so it can be a task."""
    return await anext(messages, None)


async def end(tasks: Iterable[asyncio.Task[Any] | None]) -> None:
    """Cancel those tasks that are there and have not ended, and wait for them."""
    left = [task for task in tasks if task is not None]
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)
