"""Limit the number of tasks that use a scarce resource at a time, and the number of tasks that wait for it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from emberpc.server.errors import Code, ServiceError


class Slots:
    """A semaphore with a first-in-first-out queue of limited length. Use from one event loop only.

    Args:
        count: number of slots, which is the maximum number of tasks that hold one at a time.
        max_waiting: number of waiting tasks at which the queue is full, so that a further task is refused, unless it
            calls `take` with `refuse=False`.
        holders: name of the tasks for the error message, in the plural, such as `backups`.
        retry_seconds: seconds after which a refused caller may retry, for the error.
    """

    def __init__(self, count: int, max_waiting: int, holders: str, retry_seconds: float = 1.0) -> None:
        self._free = count
        self._count = count
        self._max_waiting = max_waiting
        self._holders = holders
        self._retry_seconds = retry_seconds
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def waiting(self) -> int:
        """Return the number of tasks that wait for a slot."""
        return sum(not each.done() for each in self._waiting)

    @property
    def idle(self) -> bool:
        """Return whether all slots are free and no task waits."""
        return self._free == self._count and not self._waiting

    async def take(self, *, refuse: bool = True) -> None:
        """Wait for a slot and take it; `release` gives the slot back. A cancelled task leaves the queue.

        Args:
            refuse: whether to raise an error if the queue is full. False: the task waits all the same; for tasks whose
                number is limited elsewhere.

        Raises:
            ServiceError: RESOURCE_EXHAUSTED if `refuse` is True, no slot is free, and the queue is full.
        """
        if self._free:
            self._free -= 1
            return
        if refuse:
            self.check_space(self.waiting)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # `release` gave the slot to this task in the same iteration of the event loop
                self.release()
            elif turn in self._waiting:
                self._waiting.remove(turn)
            raise

    def check_space(self, waiting: int) -> None:
        """Raise RESOURCE_EXHAUSTED if `waiting`, a number of waiting tasks that the caller counts, fills the queue."""
        if waiting >= self._max_waiting:
            raise ServiceError(
                Code.RESOURCE_EXHAUSTED,
                f"{self._count} {self._holders} are under way and {self._max_waiting} wait, which is the limit; "
                f"try again in {self._retry_seconds:g} s, or send fewer at a time",
                reason="TOO_MANY_CALLS",
                retry_after=self._retry_seconds,
            )

    def release(self) -> None:
        """Give a slot back. The task that has waited longest gets the slot; if no task waits, the slot is free."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1

    @asynccontextmanager
    async def hold(self) -> AsyncIterator[None]:
        """Wait for a slot as `take` does, with its error, and hold the slot while the `with` block runs."""
        await self.take()
        try:
            yield
        finally:
            self.release()
