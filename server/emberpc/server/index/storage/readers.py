"""Pool of connections for reading: a thread holds one during a call, and few are kept between calls."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

from emberpc.server import descriptors
from emberpc.server.errors import ServiceError
from emberpc.server.index.storage.database import connect, translated

#: Connections kept for later calls. A call that finds none opens one.
_IDLE = 4
#: File descriptors of an idle database: the database and its log for each connection (one of them for writing), and
#: the log's index. There are more if more threads have read at once: SQLite keeps a closed connection's descriptor of
#: the database for the next connection.
MOST_DESCRIPTORS = 2 * (1 + _IDLE) + 1


class Readers:
    """Connections for reading one database. Safe to use from several threads.

    Args:
        path: the database file.
        subject: name of the database in messages.
        on_shortage: called when no file descriptor is free, before the second attempt to connect.
    """

    def __init__(self, path: Path, subject: str, on_shortage: Callable[[], None]) -> None:
        self._path = path
        self._subject = subject
        self._local = threading.local()
        self._lock = threading.Lock()
        #: All open connections, and those that no thread holds.
        self._all: set[sqlite3.Connection] = set()
        self._idle: list[sqlite3.Connection] = []
        self._on_shortage = on_shortage

    def take(self) -> sqlite3.Connection:
        """Return this thread's connection, which it holds until `release`.

        Raises:
            ServiceError: INTERNAL if the database cannot be opened, RESOURCE_EXHAUSTED if no file descriptor is free.
        """
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            with self._lock:
                connection = self._idle.pop() if self._idle else None
            if connection is None:
                connection = self._connected()
                with self._lock:
                    self._all.add(connection)
            self._local.connection = connection
        return connection

    def release(self) -> None:
        """Return this thread's connection to the pool, unless it is in a transaction."""
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is None or connection.in_transaction:
            return
        self._local.connection = None
        with self._lock:
            if len(self._idle) < _IDLE:
                self._idle.append(connection)
                return
            self._all.discard(connection)
        connection.close()

    def close(self) -> None:
        """Close every connection; no call may be in progress or follow."""
        with self._lock:
            for connection in self._all:
                connection.close()

    def _connected(self) -> sqlite3.Connection:
        try:
            with translated(self._subject):
                return connect(self._path)
        except ServiceError as error:
            if error.reason != descriptors.SHORTAGE:
                raise
        self._on_shortage()
        with translated(self._subject):
            return connect(self._path)
