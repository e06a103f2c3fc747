"""Open collections by name, and run blocking calls on them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from emberpc.server.collections import CollectionBackend, IndexBackend
from emberpc.server.engine import Caller, Engine
from emberpc.server.errors import ServiceError
from emberpc.server.pipelines.collection_model import check_same_model, newer_fingerprint
from emberpc.server.pipelines.index_pool import IndexPool
from emberpc.server.pipelines.slots import Slots

log = logging.getLogger(__name__)

#: Maximum number of collections that are opened at a time, and maximum number of further collections that wait to be
#: opened.
_OPENED_AT_ONCE, _MAX_WAITING = 2, 1024

Result = TypeVar("Result")


class CollectionAccess:
    """Opens collections in the pool, and replaces legacy fingerprints of their models.

    Use from one event loop only.

    Args:
        engine: the models.
        index: the collections.
        pool: runs the blocking calls of the index.
    """

    def __init__(self, engine: Engine, index: IndexBackend, pool: IndexPool) -> None:
        self._engine = engine
        self._index = index
        self._pool = pool
        self._openings = Slots(_OPENED_AT_ONCE, _MAX_WAITING, "collections that are being opened")
        #: The running task that opens a collection, by its name. All calls for the collection wait for this task.
        self._opening: dict[str, asyncio.Task[CollectionBackend]] = {}

    def opened(self, name: str) -> CollectionBackend | None:
        """Return the collection with a name without waiting; None: call `open`.

        None is returned if this server has not opened the collection before, if the collection is bound by a legacy
        fingerprint of its model, and always with Milvus.
        """
        opened = self._index.opened(name)
        return None if opened is None or newer_fingerprint(self._engine, opened.spec) else opened

    async def open(self, name: str) -> CollectionBackend:
        """Return the collection with a name; open the collection if needed.

        If the collection is bound by a legacy fingerprint of its model, it is bound by the present fingerprint; if that
        fails, it is returned as it is. If the caller leaves, the collection is opened all the same.

        Raises:
            ServiceError: NOT_FOUND if there is no such collection; RESOURCE_EXHAUSTED if too many collections wait to
                be opened; any other error of `IndexBackend.get`.
        """
        opened = self.opened(name)
        if opened is not None:
            return opened
        opening = self._opening.get(name)
        if opening is None:
            opening = self._opening[name] = asyncio.create_task(self._open(name))
            # The callback reads the exception of the task: asyncio logs an exception that no code reads. All
            # callers may have left.
            opening.add_done_callback(lambda task: task.cancelled() or task.exception())
        return await asyncio.shield(opening)

    async def use(
        self, name: str, work: Callable[[CollectionBackend], Awaitable[Result]], *, has_vectors: bool = False
    ) -> Result:
        """Run work on a collection, and return the result of the work.

        If the work fails since the collection was closed, and a new collection has the name by then, as after a
        reembedding, the work runs a second time, on the new collection.

        Args:
            name: name of the collection.
            work: receives the collection, and returns an awaitable of the result.
            has_vectors: whether the work uses vectors of the caller. These belong to the model that the collection has
                at the start, so the work does not run on a new collection with another model.

        Raises:
            ServiceError: NOT_FOUND if there is no such collection; FAILED_PRECONDITION if `has_vectors` is set and the
                new collection has another model (fingerprint); any other error of `open` or of the work.
        """
        collection = await self.open(name)
        try:
            return await work(collection)
        except ServiceError as error:
            if error.reason != "CLOSED":
                raise
            successor = await self.open(name)
            if successor is collection:
                raise
            if has_vectors:
                check_same_model(collection.spec, successor.spec)
            return await work(successor)

    async def call(
        self,
        name: str,
        work: Callable[[CollectionBackend], Result],
        caller: Caller,
        *,
        heavy: bool = False,
        within: Slots | None = None,
    ) -> Result:
        """Run a blocking call on a collection in the pool, and return the result of the call.

        If the call fails since the collection was replaced, as after a reembedding, it runs a second time, on the new
        collection.

        Args:
            name: name of the collection.
            work: the blocking call; receives the collection.
            caller: the caller; the call is cancelled when the caller leaves or the deadline passes.
            heavy: whether the call may take long; then it waits for a slot of heavy calls first.
            within: further slots; the call holds one of them until its thread is free. None: no further slot.

        Raises:
            ServiceError: NOT_FOUND if there is no such collection; RESOURCE_EXHAUSTED if too many calls wait for a
                slot; DEADLINE_EXCEEDED if the deadline passed; any other error of `open` or of the work.
        """
        return await self.use(
            name,
            lambda collection: self._pool.run(lambda: work(collection), caller, heavy=heavy, within=within),
        )

    async def _open(self, name: str) -> CollectionBackend:
        try:
            collection = await self._pool.run(lambda: self._index.get(name), within=self._openings)
            fingerprint = newer_fingerprint(self._engine, collection.spec)
            return await self._update_fingerprint(collection, fingerprint) if fingerprint else collection
        finally:
            del self._opening[name]

    async def _update_fingerprint(self, collection: CollectionBackend, fingerprint: str) -> CollectionBackend:
        """Replace the fingerprint by which a collection is bound to its model, and return the collection.

        If that fails with a `ServiceError`, the failure is logged, and the collection is returned as it was.
        """
        name, legacy = collection.spec.name, collection.spec.model_fingerprint
        try:
            return await self._pool.run(lambda: self._index.update_fingerprint(name, legacy, fingerprint))
        except ServiceError as error:  # such as a full disk
            log.warning("collection %s stays bound by its legacy fingerprint: %s", name, error.message)
            return collection
