"""Pool of connections for reading a database: a thread holds one during a call, and at most 4 idle ones are kept."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

from emberpc.server import descriptors
from emberpc.server.errors import ServiceError
from emberpc.server.index.storage.database import connect, translated

#: Maximum number of idle connections that are kept for later calls. A call that finds no idle connection opens a new
#: connection.
_IDLE = 4
#: Maximum number of file descriptors of an open database while no call uses it: two (database and write-ahead log) for
#: each connection, of which one is for writing and at most `_IDLE` are for reading, and one for the log's index. If
#: more than `_IDLE` threads have read at the same time, there may be more: SQLite keeps the database's descriptor of a
#: closed connection for the next connection.
MAX_DESCRIPTORS = 2 * (1 + _IDLE) + 1


class Readers:
    """Connections for reading one database. Safe to use from several threads.

    Args:
        path: the database file.
        subject: name of the database in messages.
        on_shortage: called when a connection cannot be opened because no file descriptor is free. It may close files;
            then the second and last attempt follows.
    """

    def __init__(self, path: Path, subject: str, on_shortage: Callable[[], None]) -> None:
        self._path = path
        self._subject = subject
        self._local = threading.local()
        self._lock = threading.Lock()
        #: All open connections.
        self._all: set[sqlite3.Connection] = set()
        #: Open connections that no thread holds.
        self._idle: list[sqlite3.Connection] = []
        self._on_shortage = on_shortage

    def take(self) -> sqlite3.Connection:
        """Return the connection that the calling thread holds; if it holds none, take an idle or a new connection.

        The thread holds the connection until `release`.

        Raises:
            ServiceError: RESOURCE_EXHAUSTED if the disk is full, or no file descriptor is free even after
                `on_shortage`; INTERNAL if the database cannot be opened for another reason.
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
        """Give the calling thread's connection back to the pool, which closes it if 4 others are idle.

        Does nothing if the thread holds no connection. A connection in a transaction stays with the thread.
        """
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
        """Close all connections, held or idle. The caller ensures that no other method runs now or later."""
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
