"""A bounded number of users of something scarce, and a bounded queue before it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from emberpc.server.errors import Code, ServiceError


class Slots:
    """Lets some users in at a time, the others in the order of their coming. To be used from one event loop.

    Args:
        count: users at a time.
        most_waiting: users that may wait; those beyond are refused.
        what: what the users are, in the plural, for the message.
        retry_after: seconds after which a refused user may try again.
    """

    def __init__(self, count: int, most_waiting: int, what: str, retry_after: float = 1.0) -> None:
        self._free = count
        self._count = count
        self._most_waiting = most_waiting
        self._what = what
        self._retry_after = retry_after
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def waiting(self) -> int:
        """Number of users that wait."""
        return sum(not each.done() for each in self._waiting)

    @property
    def idle(self) -> bool:
        """Whether there is neither a user nor one that waits."""
        return self._free == self._count and not self._waiting

    async def take(self, *, refuse: bool = True) -> None:
        """Take a slot, to be given back by `release`. A user that is cancelled waits no longer.

        Args:
            refuse: whether to refuse if too many wait already; False for users whose number is bounded otherwise.

        Raises:
            ServiceError: RESOURCE_EXHAUSTED if it is refused.
        """
        if self._free:
            self._free -= 1
            return
        if refuse:
            self.check_room(self.waiting)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # the slot was given to this user in the same round of the loop
                self.release()
            elif turn in self._waiting:
                self._waiting.remove(turn)
            raise

    def check_room(self, waiting: int) -> None:
        """Raise RESOURCE_EXHAUSTED if no more may wait than `waiting`, which do."""
        if waiting >= self._most_waiting:
            raise ServiceError(
                Code.RESOURCE_EXHAUSTED,
                f"{self._count} {self._what} are under way and {self._most_waiting} wait, which is the limit; "
                f"try again in {self._retry_after:g} s, or send fewer at a time",
                reason="TOO_MANY_CALLS",
                retry_after=self._retry_after,
            )

    def release(self) -> None:
        """Give a slot back: to the first that waits, if there is one."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1

    @asynccontextmanager
    async def one(self) -> AsyncIterator[None]:
        """Hold a slot for a block; raises as `take` does."""
        await self.take()
        try:
            yield
        finally:
            self.release()
