"""Cancel asyncio tasks and wait for their ends."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any


async def cancel_tasks(tasks: Iterable[asyncio.Task[Any] | None]) -> None:
    """Cancel the tasks that have not ended, and wait until all have ended. Ignore errors of tasks; skip None.

    If this coroutine is cancelled, the wait ends early.
    """
    present = [task for task in tasks if task is not None]
    for task in present:
        task.cancel()
    await asyncio.gather(*present, return_exceptions=True)
