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
from emberpc.client._core.connection import TLS, ConnectionSettings


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

    Retries: a request that fails with UNAVAILABLE, for example because no server accepted it or the server is stopping,
    is repeated up to four times within the timeout. The pauses grow, unless the server states a pause. A request that
    failed after more than 5 seconds is not repeated, since the server would start its work from the beginning: the call
    raises Unavailable. `backup_collection`, `verify_collection`, `load_model` and `reload_model` are repeated only
    before their first response, and `restore_collection` never. The two streams open a broken connection again by
    themselves.

    A repeated write leaves the records as a single one does, apart from their revisions and times, unless another
    caller wrote them in between. If the response to the first try was lost, the second try finds what the first try
    did. For example, `create_collection` may raise AlreadyExists, and `delete_collection` may raise NotFound, although
    the call itself created or deleted the collection. `upsert` may count inserted records as updated, and `delete` may
    count fewer records than it deleted.

    Methods that send requests have an argument `timeout`: the seconds that one request may take, with all its tries.
    None: the `timeout` of the constructor, but an hour for a backup or a restore. `embed_stream` and `upsert_stream`
    may run for days; there the timeout limits the time without any result. After `close()` every call raises Cancelled.

    A list is sent in several requests if necessary. A request has at most `batch_size` items (100 queries, 1000 ids)
    and 8 MiB, or a single larger item; in a list of texts or ids, a character counts as 4 bytes. `similarity` sends one
    request. The server refuses a request of more texts or records than its limit `max_texts`, 4096 by default. Results
    keep the order of the list, except those of `embed_stream`. An error names an item by its index in the whole list.
    For a list, `progress` is called with the number of items that are done. `details` is called with the
    `ResponseDetails` of each response. A wrong argument raises InputError or InputTypeError; most are checked before
    anything is sent. Records of `upsert`, and items of streams, are checked when they are read. For a filter that
    matches no record and is probably a mistake, a `FilterWarning` is issued.

    Args:
        target: HOST:PORT, HOST for port 50051, or any target that gRPC knows. Calls are spread over all addresses of
            the target. With `channel` it is only a name in error messages.
        timeout: seconds that one request may take, with all its tries; above 0, at most a hundred years.
        tls: how to encrypt the connection; None: plain text.
        token: sent with each call as `authorization: Bearer TOKEN`; None: no token. Without `tls` a token is refused,
            unless the target is on this host, or `channel` is given.
        in_flight: maximum number of requests that one method call keeps in flight, 1 to 1000; `upsert` and `delete`
            send one after the other. A request that is divided, because its response would be too large, counts once. A
            greater number helps if the target has several servers.
        channel: an open channel to use, such as a channel to a server in a test; None: the client opens one. The client
            neither closes the caller's channel nor changes its settings, so `tls` has no effect, and a response may
            have at most 4 MiB, gRPC's default, unless the channel has another limit. Over this channel the client
            retries no requests; only the two streams open a broken connection again.

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
        connection = ConnectionSettings(target, timeout, tls, token, in_flight, own_channel=channel is not None)
        self._runner = AsyncRunner(connection, channel)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection: calls in flight and later calls raise Cancelled. May be called several times.

        A caller's own channel stays open, and the calls in flight over it go on.
        """
        await self._runner.close()
