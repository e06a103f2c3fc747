"""Read the next message of a stream as a coroutine, which can become a task."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TypeVar

Message = TypeVar("Message")


async def next_message(messages: AsyncIterator[Message]) -> Message | None:
    """Return the next message; None at the end of the stream. Errors of the stream pass through.

    This function exists since only a coroutine can become a task, and `anext` may return another awaitable.
    """
    return await anext(messages, None)
