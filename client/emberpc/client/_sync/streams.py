"""Run a stream of items, and open the stream again if its connection breaks.

The caller's items are read only while the caller takes a result, never in the background. The window limits
the items that are read and not answered, and so the requests and responses that wait in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from google.protobuf.message import Message

from emberpc.client._core.connection import ConnectionSettings
from emberpc.client._core.streams import Item, Patience, Result, StreamState, ended_early
from emberpc.client._sync.transport import ItemIterator, StreamConnection, Transport, read_items
from emberpc.client.exceptions import Cancelled


def run_stream(
    state: StreamState[Item, Any, Any, Result],
    items: ItemIterator[Item],
    transport: Transport,
    connection: ConnectionSettings,
    timeout: float | None,
) -> Iterator[Result]:
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
    stream = StreamConnection(transport, state.call)
    try:
        stream.enqueue(state.opening())
        while True:
            stream.enqueue(state.requests())
            if state.may_read and stream.silent:
                read_items(state, items)
                yield from state.refused()
                patience.restart()
                continue
            if state.sent:
                stream.finish()
            if state.done:
                _await_end(stream, patience)
                return
            try:
                event = stream.next_event(patience.left)
            except TimeoutError:
                raise patience.reason or connection.silence(state.call, timeout) from None
            if event is None:
                raise ended_early()
            if isinstance(event, Message):
                if results := state.take(event):
                    yield from results
                    patience.restart()
                continue
            error = connection.error(event, state.call, timeout)
            pause = patience.pause(error)
            if pause is None or not state.may_go_on(error):
                raise error from event
            stream.close()
            transport.sleep(pause)
            stream = StreamConnection(transport, state.call)
            stream.enqueue(state.opening())
    finally:
        stream.close()


def _await_end(stream: StreamConnection, patience: Patience) -> None:
    """Wait for the server to end a stream whose items are all answered, so that the stream need not be cancelled.

    Waits at most until the timeout. A timeout or an error is ignored, since the caller has all results.
    """
    with suppress(TimeoutError, Cancelled):
        while isinstance(stream.next_event(patience.left), Message):
            pass
