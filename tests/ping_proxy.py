"""A TCP proxy for a gRPC server without TLS: it counts pings of clients, and can pause and break connections."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from types import TracebackType

#: Number of bytes that a client sends before its first frame.
_PREFACE = len(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
_HEADER = 9
_PING, _ACK = 0x6, 0x1


class PingProxy:
    """Forwards connections to a server; a context manager.

    Args:
        target: the server's HOST:PORT.
        pings: number of pings of clients at which `enough` is set.

    Attributes:
        count: number of pings that clients have sent so far, without their answers to pings of the server.
        enough: set when `count` has reached `pings`.
    """

    def __init__(self, target: str, pings: int) -> None:
        host, _, port = target.rpartition(":")
        self._address = (host, int(port))
        self._wanted = pings
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = []
        self._lock = threading.Lock()
        self._acceptor = threading.Thread(target=self._accept, daemon=True)
        self.count = 0
        self.enough = threading.Event()
        self._reading = threading.Event()
        self._reading.set()

    def pause(self) -> None:
        """Send clients no more bytes of the server, as if the clients had stopped reading."""
        self._reading.clear()

    @property
    def target(self) -> str:
        """The HOST:PORT for clients."""
        return f"127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> PingProxy:
        self._acceptor.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # `accept` returns
        self._acceptor.join()
        self._listener.close()
        self.cut()

    def cut(self) -> None:
        """Break all connections, as a network failure does."""
        self._reading.set()
        with self._lock:
            sockets, self._sockets = self._sockets, []
        for one in sockets:
            with suppress(OSError):  # it is closed already
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return  # the listener was closed
            try:
                server = socket.create_connection(self._address)
            except OSError:
                client.close()
                continue
            with self._lock:
                self._sockets += [client, server]
            threading.Thread(target=self._forward, args=(client, server, True), daemon=True).start()
            threading.Thread(target=self._forward, args=(server, client, False), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket, counted: bool) -> None:
        unread, skipped = bytearray(), 0
        try:
            while data := source.recv(65536):
                if counted:
                    skip = min(_PREFACE - skipped, len(data))
                    skipped += skip
                    unread += data[skip:]
                    self._count(unread)
                else:
                    self._reading.wait()
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # one of the two ends closed the connection

    def _count(self, unread: bytearray) -> None:
        """Remove whole frames from the front of `unread`, and count the pings among them."""
        while len(unread) >= _HEADER:
            size = _HEADER + int.from_bytes(unread[:3], "big")
            if len(unread) < size:
                return
            if unread[3] == _PING and not unread[4] & _ACK:
                with self._lock:
                    self.count += 1
                    if self.count >= self._wanted:
                        self.enough.set()
            del unread[:size]
