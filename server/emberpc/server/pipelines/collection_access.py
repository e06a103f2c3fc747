"""Open collections by name, and run work on them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from emberpc.server.collections import CollectionBackend, IndexBackend
from emberpc.server.engine import Caller, Engine
from emberpc.server.errors import ServiceError
from emberpc.server.pipelines.index_pool import IndexPool
from emberpc.server.pipelines.model_binding import check_same_model, fingerprint_to_rebind
from emberpc.server.pipelines.slots import Slots

log = logging.getLogger(__name__)

#: Collections that are opened at a time, and calls that may wait for a collection to be opened.
_OPENED_AT_ONCE, _MAX_WAITING = 2, 1024

Result = TypeVar("Result")


class CollectionAccess:
    """Opens collections in the pool and binds them to their models. Use from one event loop only.

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
        #: The opening of a collection by its name. All its callers wait for one thread.
        self._opening: dict[str, asyncio.Task[CollectionBackend]] = {}

    def opened(self, name: str) -> CollectionBackend | None:
        """Return a collection without waiting; None if it is not open or is bound by a legacy fingerprint."""
        opened = self._index.opened(name)
        return None if opened is None or fingerprint_to_rebind(self._engine, opened.spec) else opened

    async def open(self, name: str) -> CollectionBackend:
        """Return a collection. If it is bound by a legacy fingerprint, bind it by the present one.

        Raises:
            ServiceError: as `IndexBackend.get` does; RESOURCE_EXHAUSTED if too many calls wait.
        """
        opened = self.opened(name)
        if opened is not None:
            return opened
        opening = self._opening.get(name)
        if opening is None:
            opening = self._opening[name] = asyncio.create_task(self._open(name))
            # Reads the exception, since all callers may have left: asyncio logs an exception that is never read.
            opening.add_done_callback(lambda task: task.cancelled() or task.exception())
        return await asyncio.shield(opening)

    async def use(
        self, name: str, work: Callable[[CollectionBackend], Awaitable[Result]], *, has_vectors: bool = False
    ) -> Result:
        """Run work on a collection and return its result.

        Runs the work a second time if the collection was closed meanwhile and another one has its name, as after a
        reembedding.

        Args:
            name: name of the collection.
            work: the work.
            has_vectors: whether the work uses vectors of the caller. These belong to the model that the collection has
                at the start of the call, so the work is not run on a collection with another model.

        Raises:
            ServiceError: as `open` and the work do; as `check_same_model` does if the work has vectors.
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
        """Run a blocking call on a collection in the pool; arguments and errors are those of `IndexPool.run`."""
        return await self.use(
            name,
            lambda collection: self._pool.run(lambda: work(collection), caller, heavy=heavy, within=within),
        )

    async def _open(self, name: str) -> CollectionBackend:
        try:
            collection = await self._pool.run(lambda: self._index.get(name), within=self._openings)
            fingerprint = fingerprint_to_rebind(self._engine, collection.spec)
            return await self._rebind(collection, fingerprint) if fingerprint else collection
        finally:
            del self._opening[name]

    async def _rebind(self, collection: CollectionBackend, fingerprint: str) -> CollectionBackend:
        """Bind a collection to its model by another fingerprint. If that fails, return it as it was."""
        name, legacy = collection.spec.name, collection.spec.model_fingerprint
        try:
            return await self._pool.run(lambda: self._index.rebind(name, legacy, fingerprint))
        except ServiceError as error:  # such as a full disk
            log.warning("collection %s stays bound by its legacy fingerprint: %s", name, error.message)
            return collection
