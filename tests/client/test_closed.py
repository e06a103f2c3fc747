"""Calls of a client that is closed, whose channel is closed, or whose event loop is another one."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from emberpc.client import AsyncClient, Cancelled, Client, FailedPrecondition, InputTypeError
from fake_server import FakeServer

#: Arguments of every method that makes a call; FILE stands for a path.
CALLS: dict[str, tuple[Any, ...]] = {
    "backup_collection": ("c", "FILE"),
    "cancel_reembedding": ("c",),
    "classifiers": (),
    "classify": (["a"], "kinds"),
    "clusters": ("c", 2),
    "collections": (),
    "count": ("c",),
    "count_tokens": (["a"],),
    "create_collection": ("c",),
    "delete": ("c", ["a"]),
    "delete_collection": ("c",),
    "duplicates": ("c",),
    "embed": (["a"],),
    "embed_stream": (["a"],),
    "get": ("c", ["a"]),
    "get_classifier": ("kinds",),
    "get_collection": ("c",),
    "get_model": ("canned",),
    "health": (),
    "load_model": ("m", "p"),
    "models": (),
    "records": ("c",),
    "reembed_collection": ("c", "canned"),
    "reload_model": ("canned",),
    "restore_collection": ("c", "FILE"),
    "search": ("c", "a"),
    "search_batch": ("c", ["a"]),
    "server_info": (),
    "similarity": (["a"], ["b"]),
    "unload_model": ("canned",),
    "update_collection": ("c", "end"),
    "upsert": ("c", [{"id": "a", "text": "a"}]),
    "upsert_stream": ("c", [{"id": "a", "text": "a"}]),
    "verify_collection": ("c",),
}


def test_the_table_has_every_method_that_makes_a_call() -> None:
    public = {name for name, _ in inspect.getmembers(Client, inspect.isfunction) if not name.startswith("_")}
    assert set(CALLS) == public - {"close"}


def arguments(name: str, folder: Path) -> tuple[Any, ...]:
    file = folder / "file"
    file.write_bytes(b"x")
    return tuple(str(file) if argument == "FILE" else argument for argument in CALLS[name])


@pytest.mark.parametrize("name", CALLS)
def test_every_method_of_a_closed_client_says_that_it_is_closed(shell_type: Any, name: str, tmp_path: Path) -> None:
    shell = shell_type("localhost:1")
    if isinstance(shell.client, Client):
        shell.client.close()
        shell.client.close()  # a second close changes nothing
    else:
        shell.loop.run_until_complete(shell.client.close())
        shell.loop.run_until_complete(shell.client.close())
    with pytest.raises(Cancelled, match=r"^the client is closed; make another one$"):
        shell(name, *arguments(name, tmp_path))
    shell.close()


@pytest.mark.parametrize("name", ["embed", "models", "embed_stream", "backup_collection", "restore_collection"])
def test_the_error_of_a_closed_channel_of_the_caller_names_the_channel(
    fake: FakeServer, name: str, tmp_path: Path
) -> None:
    channel = grpc.insecure_channel(fake.target)
    channel.close()
    with pytest.raises(Cancelled, match="the channel is closed; give the client an open one"):
        result = getattr(Client(fake.target, channel=channel), name)(*arguments(name, tmp_path))
        list(result)


# gRPC's own coroutine for the call is dropped when the channel refuses it.
@pytest.mark.filterwarnings("ignore:coroutine 'UnaryUnaryCall._invoke' was never awaited:RuntimeWarning")
async def test_the_error_of_a_closed_asyncio_channel_of_the_caller_names_the_channel(fake: FakeServer) -> None:
    channel = grpc.aio.insecure_channel(fake.target)
    await channel.close()
    client = AsyncClient(fake.target, channel=channel)
    with pytest.raises(Cancelled, match="the channel is closed; give the client an open one"):
        await client.embed(["a"])
    with pytest.raises(Cancelled, match="the channel is closed; give the client an open one"):
        [item async for item in client.embed_stream(["a"])]


async def test_a_channel_of_the_other_client_kind_is_refused(fake: FakeServer) -> None:
    with grpc.insecure_channel(fake.target) as channel, pytest.raises(InputTypeError, match="or use Client"):
        AsyncClient(fake.target, channel=channel)  # type: ignore[arg-type]  # that is the point
    async with grpc.aio.insecure_channel(fake.target) as other:
        with pytest.raises(InputTypeError, match="or use AsyncClient"):
            Client(fake.target, channel=other)  # type: ignore[arg-type]  # that is the point


@pytest.mark.parametrize(("rpc", "name"), [("Embed", "embed"), ("VerifyCollection", "verify_collection")])
async def test_closing_an_asyncio_client_ends_its_calls_with_cancelled(fake: FakeServer, rpc: str, name: str) -> None:
    loop = asyncio.get_running_loop()
    arrived, done = asyncio.Event(), threading.Event()

    def hook(_: Any) -> None:
        loop.call_soon_threadsafe(arrived.set)
        done.wait(300)

    fake.hooks[rpc] = hook
    client = AsyncClient(fake.target)
    try:
        task = asyncio.create_task(getattr(client, name)(*CALLS[name]))
        await arrived.wait()
        await client.close()
        with pytest.raises(Cancelled):
            await task
    finally:
        done.set()


def test_closing_a_client_ends_an_open_stream_with_cancelled(fake: FakeServer, shell: Any) -> None:
    def texts() -> Iterator[str]:
        yield from ("a", "b")
        if isinstance(shell.client, Client):
            shell.client.close()
        yield from ("c", "d")

    async def async_texts() -> AsyncIterator[str]:
        yield "a"
        yield "b"
        await shell.client.close()
        yield "c"
        yield "d"

    items = texts() if isinstance(shell.client, Client) else async_texts()
    with pytest.raises(Cancelled):
        shell("embed_stream", items, batch_size=2, window=2)


def test_an_asyncio_client_connects_again_when_its_loop_was_closed(fake: FakeServer) -> None:
    client = AsyncClient(fake.target)

    async def use() -> None:
        assert (await client.embed(["a"])).shape == (1, 8)
        assert [item.error async for item in client.embed_stream(["a", "b"])] == [None, None]

    asyncio.run(use())
    asyncio.run(use())
    asyncio.run(client.close())


def test_an_asyncio_client_is_refused_in_a_second_loop_while_the_first_is_open(fake: FakeServer) -> None:
    client = AsyncClient(fake.target)
    first = asyncio.new_event_loop()
    try:
        first.run_until_complete(client.models())
        with pytest.raises(FailedPrecondition, match="another event loop, which is still open; make one client for"):
            asyncio.run(client.models())
        assert first.run_until_complete(client.models())
        first.run_until_complete(client.close())
    finally:
        first.close()
