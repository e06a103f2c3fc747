"""A gRPC server that runs in the event loop of a test, on a real port."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc.aio

#: Options of a server and a channel: gRPC does not measure the connection, so the flow-control window of a stream, the
#: bytes that one side sends before the other side reads, does not grow.
FIXED_WINDOWS = (("grpc.http2.bdp_probe", 0),)
#: Seconds within which the handlers of cancelled calls end, on a very slow host.
_HANDLERS_END_SECONDS = 300


@asynccontextmanager
async def channel_to(server: grpc.aio.Server, fixed_windows: bool = False) -> AsyncIterator[grpc.aio.Channel]:
    """Start a server, yield a channel to it, and stop it; the server may have calls in progress then.

    With `fixed_windows`, each side sends at most 64 KiB on a stream that the other side does not read. gRPC otherwise
    sends more if it measures a fast connection: in a test on a host with two cores, 12 MB.

    At the end all handlers have ended. `Server.stop` alone does not wait for the handler of a call that its client
    cancelled, so a handler could use a thread pool that the test has closed.
    """
    before = asyncio.all_tasks()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", FIXED_WINDOWS if fixed_windows else None) as channel:
            yield channel
    finally:
        await server.stop(0)
        left = asyncio.all_tasks() - before - {asyncio.current_task()}
        if left:
            _, pending = await asyncio.wait(left, timeout=_HANDLERS_END_SECONDS)
            assert not pending, f"these tasks did not end: {pending}"
