"""What `AsyncClient` asks about a collection as a whole."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

from emberpc.client import _collections, _groups
from emberpc.client._aio_running import AsyncRunner
from emberpc.client.types import Cluster, Collection, DuplicatePair, Verification


class AsyncGroupCalls:
    """The part of `AsyncClient` that looks at all records of a collection."""

    _runner: AsyncRunner

    def duplicates(
        self, collection: str, *, min_score: float = 0.95, timeout: float | None = None
    ) -> AsyncIterator[DuplicatePair]:
        """Do what `Client.duplicates` does."""
        return self._runner.pages(
            lambda token: _groups.find_duplicates(collection, token, min_score=min_score), timeout
        )

    async def clusters(
        self, collection: str, count: int, *, examples: int = 5, timeout: float | None = None
    ) -> list[Cluster]:
        """Do what `Client.clusters` does."""
        return await self._runner.run_one(_groups.cluster_records(collection, count, examples=examples), timeout)

    async def reembed_collection(
        self, name: str, model: str, *, dimensions: int = 0, timeout: float | None = None
    ) -> Collection:
        """Do what `Client.reembed_collection` does."""
        return await self._runner.run_one(_collections.reembed(name, model, dimensions), timeout)

    async def cancel_reembedding(self, name: str, *, timeout: float | None = None) -> Collection:
        """Do what `Client.cancel_reembedding` does."""
        return await self._runner.run_one(_collections.cancel_reembedding(name), timeout)

    async def verify_collection(
        self,
        name: str,
        *,
        full: bool = False,
        progress: Callable[[int, int], None] | None = None,
        timeout: float | None = None,
    ) -> Verification:
        """Do what `Client.verify_collection` does."""
        return await self._runner.follow(_collections.verify_collection(name, progress, full), None, timeout)
