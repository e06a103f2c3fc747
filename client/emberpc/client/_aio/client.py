# Generated from ../_sync/client.py by tools/generate_async_client.py. Edit that file and run the script.
"""The client for asyncio."""

from __future__ import annotations

from types import TracebackType

import grpc.aio

from emberpc.client._aio.backups import AsyncBackupMethods
from emberpc.client._aio.collections import AsyncCollectionMethods
from emberpc.client._aio.models import AsyncModelMethods
from emberpc.client._aio.records import AsyncRecordMethods
from emberpc.client._aio.runner import AsyncRunner
from emberpc.client._aio.searches import AsyncSearchMethods
from emberpc.client._aio.texts import AsyncTextMethods
from emberpc.client._core.connection import TLS, Connection


class AsyncClient(
    AsyncTextMethods,
    AsyncCollectionMethods,
    AsyncRecordMethods,
    AsyncSearchMethods,
    AsyncBackupMethods,
    AsyncModelMethods,
):
    """A connection to an emberpc server.

    The first call opens the connection, in the event loop that makes this call. If that loop is closed, the
    first call in another loop opens a new connection. While it is open, a call in another loop raises
    FailedPrecondition.

    Retries: a call that fails with UNAVAILABLE, because no server accepted it or because the server is stopping, is
    repeated up to four times within its timeout, with growing pauses. A call that failed after more than 5 seconds is
    not repeated, since its work would start from the beginning: it raises Unavailable. `restore_collection` is never
    repeated. A repeated write is written once, but its result may describe the first try, whose response was lost:
    `create_collection` may raise AlreadyExists and `delete_collection` NotFound for what the call itself did, `upsert`
    may count as updated what it inserted, and `delete` may count fewer records.

    Every method takes `timeout`: the seconds that one request may take, its repetitions included. None: the `timeout`
    of the constructor. In `embed_stream` and `upsert_stream`, which may run for days, it limits the time without any
    result. After `close()` every call raises Cancelled.

    A list longer than `batch_size` is sent in several requests. Results keep the order of the list, and an error names
    an item by its index in the whole list. `progress` is called with the number of items that are done, and
    `details` with what the response to each request states beside the result. Arguments are checked before anything is
    sent.

    Args:
        target: HOST:PORT, HOST for port 50051, or any target that gRPC knows. Calls are spread over all its addresses.
        timeout: seconds that one request may take, its repetitions included; at most a hundred years.
        tls: how to encrypt the connection; None: plain text.
        token: sent as `authorization: Bearer`. Refused in plain text unless the target is on this host.
        in_flight: requests that one method call keeps in flight. More helps if several servers share the target.
        channel: an open channel to use instead of opening one, such as a channel to a server in a test. The client
            does not close it, does not retry calls over it, and leaves its settings to the caller.

    Raises:
        InputError: an argument is wrong.
        InputTypeError: an argument has the wrong type.
    """

    def __init__(
        self,
        target: str = "localhost:50051",
        *,
        timeout: float = 30.0,
        tls: TLS | None = None,
        token: str | None = None,
        in_flight: int = 2,
        channel: grpc.aio.Channel | None = None,
    ) -> None:
        connection = Connection(target, timeout, tls, token, in_flight, own_channel=channel is not None)
        self._runner = AsyncRunner(connection, channel)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; calls in flight fail with Cancelled. A channel given to the constructor stays open."""
        await self._runner.close()
