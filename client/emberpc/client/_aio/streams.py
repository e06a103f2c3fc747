# Generated from ../_sync/streams.py by tools/generate_async_client.py. Edit that file and run the script.
"""Run a stream of items, and open the stream again if its connection breaks.

The caller's items are read only while the caller takes a result, never in the background. The window limits
the items that are read and not answered, and so the requests and responses that wait in memory.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from google.protobuf.message import Message

from emberpc.client._aio.transport import AsyncStreamConnection, AsyncTransport, ItemIterator, read_items
from emberpc.client._core.connection import ConnectionSettings
from emberpc.client._core.streams import Item, Patience, Result, StreamState, ended_early
from emberpc.client.exceptions import Cancelled


async def run_stream(
    state: StreamState[Item, Any, Any, Result],
    items: ItemIterator[Item],
    transport: AsyncTransport,
    connection: ConnectionSettings,
    timeout: float | None,
) -> AsyncIterator[Result]:
    """Yield the results of a stream as they arrive; cancel the stream when the generator is closed.

    Args:
        state: state of the stream: the items that are read and not answered. It makes the requests to send.
        items: the caller's items.
        transport: the channel.
        connection: target and settings of the client.
        timeout: maximum seconds without a result; None: the timeout of `connection`.

    Raises:
        EmberpcError: the stream failed, and opening it again did not help or was not possible; or no result came within
            the timeout; or the server ended the stream before it had answered all items.
        InputTypeError: an item of a stream of texts has the wrong type, or `timeout` is not a number.
        InputError: `timeout` is out of range.
    """
    patience = Patience(connection.deadline(timeout))
    stream = AsyncStreamConnection(transport, state.call)
    try:
        stream.enqueue(state.opening())
        while True:
            stream.enqueue(state.requests())
            if state.may_read and stream.silent:
                await read_items(state, items)
                for each in state.refused():
                    yield each
                patience.restart()
                continue
            if state.sent:
                stream.finish()
            if state.done:
                await _await_end(stream, patience)
                return
            try:
                event = await stream.next_event(patience.left)
            except TimeoutError:
                raise patience.reason or connection.silence(state.call, timeout) from None
            if event is None:
                raise ended_early()
            if isinstance(event, Message):
                if results := state.take(event):
                    for each in results:
                        yield each
                    patience.restart()
                continue
            error = connection.error(event, state.call, timeout)
            pause = patience.pause(error)
            if pause is None or not state.may_go_on(error):
                raise error from event
            await stream.close()
            await transport.sleep(pause)
            stream = AsyncStreamConnection(transport, state.call)
            stream.enqueue(state.opening())
    finally:
        await stream.close()


async def _await_end(stream: AsyncStreamConnection, patience: Patience) -> None:
    """Wait for the server to end a stream whose items are all answered, so that the stream need not be cancelled.

    Waits at most until the timeout. A timeout or an error is ignored, since the caller has all results.
    """
    with suppress(TimeoutError, Cancelled):
        while isinstance(await stream.next_event(patience.left), Message):
            pass
