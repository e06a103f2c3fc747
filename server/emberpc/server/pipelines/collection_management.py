"""Create, describe, list, update, reembed and delete collections."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from emberpc.bundle import Task
from emberpc.server.collections import CollectionBackend, CollectionSpec, IndexBackend
from emberpc.server.collections.types import CollectionInfo
from emberpc.server.engine import Engine, Truncation
from emberpc.server.errors import Code, ServiceError
from emberpc.server.pipelines.collection_access import CollectionAccess
from emberpc.server.pipelines.embedding import check_dimensions
from emberpc.server.pipelines.filter_fields import check_indexed_fields
from emberpc.server.pipelines.index_pool import IndexPool
from emberpc.server.pipelines.reembedding import ReembeddingJobs, ReembeddingStatus


@dataclass(frozen=True)
class CollectionDescription:
    """A collection and its state.

    Attributes:
        spec: the spec.
        info: counts and times; None if the collection cannot be opened.
        reembedding: progress of its reembedding; None if there is none.
        problem: why the collection cannot be opened; empty: it can.
    """

    spec: CollectionSpec
    info: CollectionInfo | None
    reembedding: ReembeddingStatus | None = None
    problem: str = ""


class CollectionManagement:
    """Manages the collections of an index.

    Args:
        engine: the models.
        index: the collections.
        pool: runs the blocking calls of the index.
        access: opens collections.
        reembedding: the reembedding jobs.
    """

    def __init__(
        self,
        engine: Engine,
        index: IndexBackend,
        pool: IndexPool,
        access: CollectionAccess,
        reembedding: ReembeddingJobs,
    ) -> None:
        self._engine = engine
        self._index = index
        self._pool = pool
        self._access = access
        self._reembedding = reembedding

    async def create(self, spec: CollectionSpec) -> CollectionDescription:
        """Create a collection, bound to the model that is served under the name in its spec.

        Args:
            spec: the spec, without the fingerprint; dimensions 0: all that the model has.

        Raises:
            ServiceError: as `Engine.model` and `IndexBackend.create` do; INVALID_ARGUMENT for wrong dimensions or
                indexed fields.
        """
        if spec.model:
            model = self._engine.model(spec.model, Task.EMBEDDING, "collection.model")
            check_dimensions(model, spec.dimensions, "collection.dimensions")
            dimensions = spec.dimensions or model.manifest.dimensions
            spec = dataclasses.replace(spec, dimensions=dimensions, model_fingerprint=model.fingerprint)
        check_indexed_fields(spec.indexed_fields, "collection.indexed_fields")
        await self._pool.run(lambda: self._index.create(spec))
        return await self.get(spec.name)

    async def get(self, name: str) -> CollectionDescription:
        """Describe a collection; NOT_FOUND if it does not exist."""
        return await self._access.use(name, self.describe)

    async def page(self, size: int, token: str) -> tuple[Sequence[CollectionDescription], str]:
        """Return a page of the collections in the order of their names, and the token of the next page.

        Args:
            size: collections of the page at most.
            token: token of the page; empty: the first page.
        """
        specs, next_token = await self._pool.run(lambda: self._index.page(size, token))
        found = [await self._describe_or_problem(spec) for spec in specs]
        return [description for description in found if description is not None], next_token

    async def set_truncation(self, name: str, truncation: Truncation) -> CollectionDescription:
        """Change the truncation of a collection."""
        writers = self._pool.writers(name)
        await self._pool.run(lambda: self._index.update(name, truncation.value), within=writers)
        return await self.get(name)

    async def delete(self, name: str) -> None:
        """Delete a collection, and cancel its reembedding."""
        await self._reembedding.cancel(name)
        await self._pool.run(lambda: self._index.delete(name))

    async def reembed(self, name: str, model_name: str, dimensions: int) -> CollectionDescription:
        """Start to reembed a collection; arguments and errors are those of `ReembeddingJobs.start`."""
        collection = await self._access.open(name)
        await self._reembedding.start(collection, model_name, dimensions)
        return await self.describe(collection)

    async def cancel_reembedding(self, name: str) -> CollectionDescription:
        """Cancel the reembedding of a collection, which keeps its model; NOT_FOUND if there is no such collection."""
        await self._access.open(name)
        await self._reembedding.cancel(name)
        return await self.describe(await self._access.open(name))

    async def describe(self, collection: CollectionBackend) -> CollectionDescription:
        """Describe an open collection."""
        info = await self._pool.run(collection.info)
        spec = collection.spec
        return CollectionDescription(spec, info, await self._reembedding.status(spec.name))

    async def _describe_or_problem(self, spec: CollectionSpec) -> CollectionDescription | None:
        """Describe a collection; if it is damaged, only its spec and the problem, so that the others can be listed.

        Returns None if the collection does not exist any more.
        """
        try:
            return await self.get(spec.name)
        except ServiceError as error:
            if error.code is Code.NOT_FOUND:
                return None
            if error.code is not Code.INTERNAL:
                raise
            return CollectionDescription(spec, None, problem=error.message)
