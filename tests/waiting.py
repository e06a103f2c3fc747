"""Ways to wait in tests that do not depend on the speed of the host. Each fails after 300 s."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from inspect import iscoroutinefunction
from typing import Any, TypeVar

import pytest

SECONDS = 300.0

Result = TypeVar("Result")


def wait_until(condition: Callable[[], Result | None]) -> Result:
    """Call a function until its result is true, and return the result.

    For the state of another process, of which this process gets no event. For objects of this process, see `Changes`.
    """
    end = time.monotonic() + SECONDS
    while not (found := condition()):
        assert time.monotonic() < end, f"the condition was not true within {SECONDS:g} s"
        time.sleep(0.01)
    return found


async def until_idle() -> None:
    """Let the event loop run until its tasks wait for events from outside: of threads, timers and sockets."""
    loop: Any = asyncio.get_running_loop()
    await asyncio.sleep(0)
    while loop._ready:  # noqa: ASYNC110 - the loop has no event for an empty queue
        await asyncio.sleep(0)


class Changes:
    """Lets threads and tasks wait for conditions, which are checked again after each change of a state.

    The test names the changes: by calls of `notify`, or with `watch` the methods that change the state.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._count = 0
        self._waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

    def notify(self, *_: object) -> None:
        """Have all waiting threads and tasks check their conditions; may be called in any thread."""
        with self._changed:
            self._count += 1
            self._changed.notify_all()
            waiters, self._waiters = self._waiters, []
        for loop, waiter in waiters:
            with suppress(RuntimeError):  # the loop of a test that failed is closed
                loop.call_soon_threadsafe(_wake, waiter)

    def watch(self, monkeypatch: pytest.MonkeyPatch, owner: object, *names: str) -> None:
        """Have methods of a class, or functions of a module, notify; see `watched`."""
        for name in names:
            monkeypatch.setattr(owner, name, self.watched(getattr(owner, name)))

    def watched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that calls another one, and notifies after it; if asynchronous, after its first step too.

        The first step of an asynchronous function ends where the function begins to wait.
        """
        if not iscoroutinefunction(function):

            @wraps(function)
            def call(*arguments: Any, **options: Any) -> Any:
                try:
                    return function(*arguments, **options)
                finally:
                    self.notify()

            return call

        @wraps(function)
        async def call_and_wait(*arguments: Any, **options: Any) -> Any:
            asyncio.get_running_loop().call_soon(self.notify)
            try:
                return await function(*arguments, **options)
            finally:
                self.notify()

        return call_and_wait

    def wait_for(self, condition: Callable[[], object]) -> None:
        """Block this thread until a condition is true."""
        while True:
            with self._changed:
                before = self._count
            if condition():
                return
            with self._changed:
                changed = self._changed.wait_for(lambda before=before: self._count != before, SECONDS)  # type: ignore[misc]
            assert changed, f"nothing changed for {SECONDS:g} s, and the condition is not true"

    async def until(self, condition: Callable[[], object]) -> None:
        """Let the event loop run until a condition is true."""
        await asyncio.wait_for(self._until(condition), SECONDS)

    async def _until(self, condition: Callable[[], object]) -> None:
        loop = asyncio.get_running_loop()
        while True:
            waiter = loop.create_future()
            with self._changed:
                self._waiters.append((loop, waiter))
            if condition():
                waiter.cancel()
                return
            await waiter


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
