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
        info: record count, sequence, creation time and size; None if there is a problem.
        reembedding: progress of the collection's reembedding; None if there is none, or if there is a problem.
        problem: why the collection cannot be used, such as damage; empty: there is no problem.
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
        """Create a collection, and describe it.

        If the spec names a model, the collection is bound to the fingerprint of the served model of that name.

        Args:
            spec: the spec, without the fingerprint; dimensions 0: all dimensions of the model. Without a model, the
                dimensions must be stated.

        Raises:
            ServiceError: NOT_FOUND if the model is not served; FAILED_PRECONDITION if it is no embedding model;
                INVALID_ARGUMENT for a wrong value of the spec; ALREADY_EXISTS if a collection has the name;
                RESOURCE_EXHAUSTED if the disk is full or there are too many collections; any other error of
                `IndexBackend.create` and `get`.
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
        """Describe the collection with a name.

        Raises:
            ServiceError: NOT_FOUND if there is no such collection; INTERNAL if its files are damaged or the database
                fails; any other error of `CollectionAccess.use`.
        """
        return await self._access.use(name, self.describe)

    async def page(self, size: int, token: str) -> tuple[Sequence[CollectionDescription], str]:
        """Return a page of collections in the order of their names, and the token of the next page.

        The token is empty after the last page. A collection for which `get` raises INTERNAL is described by its spec
        and the problem. A collection that is deleted meanwhile is left out, so a page may have fewer collections than
        `size`, or none, before the last page.

        Args:
            size: maximum number of collections of the page, 1 to 1000.
            token: token of the page; empty: the first page.

        Raises:
            ServiceError: INVALID_ARGUMENT for a wrong size or token; any error of `get` except NOT_FOUND and INTERNAL.
        """
        specs, next_token = await self._pool.run(lambda: self._index.page(size, token))
        found = [await self._describe_or_problem(spec) for spec in specs]
        return [description for description in found if description is not None], next_token

    async def set_truncation(self, name: str, truncation: Truncation) -> CollectionDescription:
        """Change the truncation of the collection with a name, and describe the collection.

        Raises:
            ServiceError: NOT_FOUND if there is no such collection; RESOURCE_EXHAUSTED if too many writes wait or the
                disk is full; any other error of `IndexBackend.update` and `get`.
        """
        writers = self._pool.writers(name)
        await self._pool.run(lambda: self._index.update(name, truncation.value), within=writers)
        return await self.get(name)

    async def delete(self, name: str) -> None:
        """Delete the collection with a name, and cancel its reembedding; NOT_FOUND if there is no such collection."""
        await self._reembedding.cancel(name)
        await self._pool.run(lambda: self._index.delete(name))

    async def reembed(self, name: str, model_name: str, dimensions: int) -> CollectionDescription:
        """Start to reembed the collection with a name, and describe the collection.

        Args:
            name: name of the collection.
            model_name: name of the new model; empty: the only embedding model.
            dimensions: dimensions of the new vectors; 0: all dimensions of the model.

        Raises:
            ServiceError: NOT_FOUND if there is no such collection or model; INVALID_ARGUMENT for dimensions that the
                model does not support; FAILED_PRECONDITION if the vectors would stay the same, the collection is being
                reembedded, or a record has no text; UNAVAILABLE if the collection was deleted or replaced meanwhile;
                any other error of `ReembeddingJobs.start`.
        """
        collection = await self._access.open(name)
        await self._reembedding.start(collection, model_name, dimensions)
        return await self.describe(collection)

    async def cancel_reembedding(self, name: str) -> CollectionDescription:
        """Cancel the reembedding of the collection with a name, and describe the collection.

        The collection keeps its old model, unless the reembedding has ended before. Nothing is cancelled if there is no
        reembedding.

        Raises:
            ServiceError: NOT_FOUND if there is no such collection.
        """
        await self._access.open(name)
        await self._reembedding.cancel(name)
        return await self.describe(await self._access.open(name))

    async def describe(self, collection: CollectionBackend) -> CollectionDescription:
        """Describe a collection; UNAVAILABLE if it was deleted or replaced, or the index was closed."""
        info = await self._pool.run(collection.info)
        spec = collection.spec
        return CollectionDescription(spec, info, await self._reembedding.status(spec.name))

    async def _describe_or_problem(self, spec: CollectionSpec) -> CollectionDescription | None:
        """Describe the collection with a spec; None if the collection was deleted meanwhile.

        If `get` raises INTERNAL, as for a damaged collection, the description has the spec and the problem, so that a
        list can contain the collection. Any other error of `get` is raised.
        """
        try:
            return await self.get(spec.name)
        except ServiceError as error:
            if error.code is Code.NOT_FOUND:
                return None
            if error.code is not Code.INTERNAL:
                raise
            return CollectionDescription(spec, None, problem=error.message)
