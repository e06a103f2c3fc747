"""Collections by name: opened in the pool, and bound to their models under the present scheme of fingerprints."""

from __future__ import annotations

import asyncio
import logging

from emberpc.server.collections import CollectionBackend, IndexBackend
from emberpc.server.engine import Engine
from emberpc.server.errors import ServiceError
from emberpc.server.services.binding import unbound_fingerprint
from emberpc.server.services.index_pool import IndexPool
from emberpc.server.services.slots import Slots

log = logging.getLogger(__name__)

#: Collections that are opened at a time, and calls that may wait for one to be opened.
_OPENED_AT_ONCE, _MOST_OPENINGS = 2, 1024


class Opener:
    """Opens collections. To be used from one event loop.

    Args:
        engine: the models.
        index: the collections.
        pool: where they are opened.
    """

    def __init__(self, engine: Engine, index: IndexBackend, pool: IndexPool) -> None:
        self._engine = engine
        self._index = index
        self._pool = pool
        self._openings = Slots(_OPENED_AT_ONCE, _MOST_OPENINGS, "collections that are being opened")
        #: By name. All callers wait for one thread.
        self._opening: dict[str, asyncio.Task[CollectionBackend]] = {}

    def at_hand(self, name: str) -> CollectionBackend | None:
        """Return a collection if it was opened before and is bound under the present scheme; never waits."""
        opened = self._index.opened(name)
        return None if opened is None or unbound_fingerprint(self._engine, opened.spec) else opened

    async def collection(self, name: str) -> CollectionBackend:
        """Return a collection; one that is bound to its model under the old scheme is bound under the present one."""
        opened = self.at_hand(name)
        if opened is not None:
            return opened
        opening = self._opening.get(name)
        if opening is None:
            opening = self._opening[name] = asyncio.create_task(self._open(name))
            # Nobody may wait for the outcome any more; it is asked for, so that the loop does not report it.
            opening.add_done_callback(lambda task: task.cancelled() or task.exception())
        return await asyncio.shield(opening)

    async def _open(self, name: str) -> CollectionBackend:
        try:
            collection = await self._pool.run(lambda: self._index.get(name), within=self._openings)
            fingerprint = unbound_fingerprint(self._engine, collection.spec)
            return await self._rebind(collection, fingerprint) if fingerprint else collection
        finally:
            del self._opening[name]

    async def _rebind(self, collection: CollectionBackend, fingerprint: str) -> CollectionBackend:
        """Bind a collection to its model by another fingerprint; if that fails, it stays usable as it is."""
        name, legacy = collection.spec.name, collection.spec.model_fingerprint
        try:
            return await self._pool.run(lambda: self._index.rebind(name, legacy, fingerprint))
        except ServiceError as error:  # such as a full disk
            log.warning("collection %s stays bound under the old scheme: %s", name, error.message)
            return collection
