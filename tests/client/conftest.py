"""Fixtures that run each test with the synchronous and the asynchronous client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import Any

import pytest

from emberpc.client import AsyncClient, Client
from fake_server import FakeServer


class SyncShell:
    """Calls the methods of a Client."""

    def __init__(self, target: str, **settings: Any) -> None:
        self.client = Client(target, **settings)

    def __call__(self, name: str, *arguments: Any, **options: Any) -> Any:
        """Return what a method gives, an iterator's items as a list."""
        result = getattr(self.client, name)(*arguments, **options)
        return list(result) if isinstance(result, Iterator) else result

    def iterate(self, name: str, *arguments: Any, **options: Any) -> Iterator[Any]:
        """Return the iterator that a method gives."""
        result: Iterator[Any] = getattr(self.client, name)(*arguments, **options)
        return result

    def close(self) -> None:
        self.client.close()


class AsyncShell:
    """Calls the methods of an AsyncClient, in an event loop of its own."""

    def __init__(self, target: str, **settings: Any) -> None:
        self.loop = asyncio.new_event_loop()
        self.client = AsyncClient(target, **settings)

    def __call__(self, name: str, *arguments: Any, **options: Any) -> Any:
        """Return what a method gives, an iterator's items as a list."""

        async def run() -> Any:
            result = getattr(self.client, name)(*arguments, **options)
            if isinstance(result, AsyncIterator):
                return [item async for item in result]
            return await result

        return self.loop.run_until_complete(run())

    def iterate(self, name: str, *arguments: Any, **options: Any) -> Iterator[Any]:
        """Return the iterator that a method gives, as an ordinary one."""
        result: AsyncGenerator[Any, None] = getattr(self.client, name)(*arguments, **options)

        def walk() -> Iterator[Any]:
            try:
                while True:
                    try:
                        yield self.loop.run_until_complete(anext(result))
                    except StopAsyncIteration:
                        return
            finally:
                self.loop.run_until_complete(result.aclose())

        return walk()

    def close(self) -> None:
        self.loop.run_until_complete(self.client.close())
        self.loop.close()


Shell = SyncShell | AsyncShell


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server


@pytest.fixture(params=[SyncShell, AsyncShell], ids=["sync", "async"])
def shell_type(request: pytest.FixtureRequest) -> type[Shell]:
    kind: type[Shell] = request.param
    return kind


@pytest.fixture
def shell(fake: FakeServer, shell_type: type[Shell]) -> Iterator[Shell]:
    """A client of the fake server."""
    opened = shell_type(fake.target, timeout=300)
    yield opened
    opened.close()
