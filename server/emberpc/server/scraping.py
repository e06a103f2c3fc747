"""HTTP server for one WSGI application, on one thread. Limits of time and connections protect it from slow clients."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import Callable, Iterable
from typing import Any

log = logging.getLogger(__name__)

#: Maximum number of open connections. A further connection closes the oldest connection, which is probably still open
#: because its client is silent or slow.
MAX_CONNECTIONS = 64
#: Seconds in which a client must send the head of its request. The client then has the same time to read the response.
#: The connection of a slower client is closed.
_SECONDS = 10.0
#: Maximum number of bytes of a request's head (request line and headers). A connection with a longer head is closed
#: without a response. The body of a request is not read.
_HEAD_BYTES = 16 * 2**10

#: Length of the queue of connections that wait to be accepted. It is small since asyncio makes this number of attempts
#: to accept at a time. If no file descriptor is free, all of them fail, and asyncio handles each failure.
_BACKLOG = 8
#: Minimum seconds between two logged errors, such as a connection that could not be accepted. Errors in between are not
#: logged.
_LOG_SECONDS = 60.0

#: Type of a WSGI application.
App = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class PageServer:
    """HTTP server that serves a WSGI application, and closes each connection after one request.

    The constructor starts the server on a daemon thread, which runs until the process ends.

    Args:
        host: name or address to listen on; if a name has several addresses, the first.
        port: the port to listen on; 0: a free port. The attribute `port` has the real number.
        app: the application. It runs on the server's only thread, so it must return quickly. It gets only the method,
            path, query and headers of a request. If it raises an OSError, the connection is closed without a response.
            For any other error the response is 500.

    Raises:
        OSError: the host cannot be resolved, or the address cannot be used: for example it is taken, or is not an
            address of this host.
        UnicodeError: the host is not a valid name.
    """

    def __init__(self, host: str, port: int, app: App) -> None:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        self._socket = socket.create_server(address[:2], family=family)
        self.port: int = self._socket.getsockname()[1]
        self._app = app
        #: The open connections, the oldest first: a dict, which keeps the order, without values.
        self._open: dict[asyncio.StreamWriter, None] = {}
        self._last_logged = -_LOG_SECONDS
        threading.Thread(target=asyncio.run, args=(self._serve(),), name="metrics", daemon=True).start()

    async def _serve(self) -> None:
        asyncio.get_running_loop().set_exception_handler(self._log_now_and_then)
        server = await asyncio.start_server(self._answer, sock=self._socket, limit=_HEAD_BYTES, backlog=_BACKLOG)
        async with server:
            await server.serve_forever()

    def _log_now_and_then(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Log an error of the event loop or of a request, unless an error was logged in the last 60 seconds.

        Args:
            loop: the event loop.
            context: `message` and, if there is one, `exception` of the error, as asyncio passes them to an exception
                handler.
        """
        if loop.time() - self._last_logged >= _LOG_SECONDS:
            self._last_logged = loop.time()
            error = context.get("exception")
            log.error("the metrics port: %s: %s", context.get("message"), error, exc_info=error)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open[writer] = None
        if len(self._open) > MAX_CONNECTIONS:
            oldest = next(iter(self._open))
            del self._open[oldest]
            oldest.transport.abort()
        # With a limit of 0, `drain` waits until the whole response has left the buffer. So a client that does not read
        # the response within `_SECONDS` is noticed and disconnected, and the buffer is freed.
        writer.transport.set_write_buffer_limits(0)
        try:
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), _SECONDS)
            writer.write(self._response(head))
            await asyncio.wait_for(writer.drain(), _SECONDS)
            writer.close()
        except (OSError, asyncio.TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            writer.transport.abort()
        except Exception as error:
            failure = {"message": "a request failed", "exception": error}
            self._log_now_and_then(asyncio.get_running_loop(), failure)
            writer.write(_message("500 Internal Server Error", [], b""))
            writer.close()
        finally:
            self._open.pop(writer, None)

    def _response(self, head: bytes) -> bytes:
        """Call the application for a request with the head `head` (request line and headers); return the HTTP response.

        If the request line does not have three parts, return 400 Bad Request without a call. The response to a HEAD
        request has no body. Errors of the application are raised; `_answer` handles them.
        """
        line, *fields = head.decode("latin-1").split("\r\n")
        parts = line.split(" ")
        if len(parts) != 3:
            return _message("400 Bad Request", [], b"")
        method, target, _ = parts
        path, _, query = target.partition("?")
        environ: dict[str, Any] = {"REQUEST_METHOD": method, "PATH_INFO": path, "QUERY_STRING": query}
        for field in fields:
            name, _, value = field.partition(":")
            environ["HTTP_" + name.strip().upper().replace("-", "_")] = value.strip()
        begun: list[tuple[str, list[tuple[str, str]]]] = []
        body = b"".join(self._app(environ, lambda status, headers, *_: begun.append((status, headers))))
        return _message(*begun[0], body if method != "HEAD" else b"")


def _message(status: str, headers: Iterable[tuple[str, str]], body: bytes) -> bytes:
    own = [("Content-Length", str(len(body))), ("Connection", "close")]
    lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in [*headers, *own])]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body
