# Generated from ../_sync/collections.py by tools/generate_async_client.py. Edit that file and run the script.
"""Methods about whole collections."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable

from emberpc.client._aio.runner import AsyncRunner
from emberpc.client._core import checks, collections
from emberpc.client.exceptions import AlreadyExists
from emberpc.client.types import Collection, Distance, Truncation, Verification


class AsyncCollectionMethods:
    """Methods of `AsyncClient` that create, change, list, check and delete collections."""

    _runner: AsyncRunner

    async def create_collection(
        self,
        name: str,
        *,
        model: str = "",
        dimensions: int = 0,
        distance: Distance = "cosine",
        truncation: Truncation = "refuse",
        m: int = 0,
        ef_construction: int = 0,
        indexed_fields: Iterable[str] = (),
        exist_ok: bool = False,
        timeout: float | None = None,
    ) -> Collection:
        """Create a collection.

        Args:
            name: name of the collection: 1 to 128 ASCII letters, digits, `.`, `_` and `-`, the first a letter or digit.
            model: name of the model that embeds texts of records and queries; empty: records must have vectors.
            dimensions: dimensions of the vectors, at most 16,000. With a model: its dimensions, one of its Matryoshka
                dimensions, or 0 for its dimensions. Without a model, 0 is refused.
            distance: the measure that compares vectors.
            truncation: how texts of records with too many tokens are truncated, unless an upsert states otherwise.
            m: maximum number of links of a node in a layer of the HNSW graph, 4 to 64; 0: the server's default. In the
                lowest layer, a node may have twice as many.
            ef_construction: candidates that an insertion into the graph keeps, 16 to 2000; 0: the server's default.
            indexed_fields: metadata fields that filters use often, at most 16. The server keeps an index of each, which
                makes every write a little slower. With Milvus, the fields have no effect.
            exist_ok: if a collection of this name exists, return it unchanged instead of raising AlreadyExists. Model
                and distance must be those of the existing collection, and so must `dimensions`, `m` and
                `ef_construction` unless they are 0. `truncation` and `indexed_fields` may differ.
            timeout: seconds that one request may take, with all its tries; None: the `timeout` of the constructor.

        Returns:
            The new collection, or the existing one with `exist_ok`.

        Raises:
            AlreadyExists: a collection of this name exists, perhaps created by a try of this call whose response was
                lost. With `exist_ok`: the existing collection has other settings.
            InvalidArgument: a setting is invalid.
            NotFound: the server serves no model of this name.
            FailedPrecondition: the model does not embed texts.
            EmberpcError: the call failed otherwise.
        """
        checks.flag(exist_ok, "exist_ok")
        call = collections.create_collection(
            name,
            model=model,
            dimensions=dimensions,
            distance=distance,
            truncation=truncation,
            m=m,
            ef_construction=ef_construction,
            indexed_fields=indexed_fields,
        )
        try:
            return await self._runner.run_one(call, timeout)
        except AlreadyExists as error:
            if not exist_ok:
                raise
            existing = await self._runner.run_one(collections.get_collection(name), timeout)
            return collections.check_alike(existing, call.request, error)

    async def get_collection(self, name: str, *, timeout: float | None = None) -> Collection:
        """Return a collection: its settings, number of records, size, and the progress of a reembedding.

        Args:
            name: name of the collection.
            timeout: seconds that one request may take, with all its tries; None: the `timeout` of the constructor.

        Raises:
            NotFound: there is no collection of this name.
            Internal: the collection is damaged, and cannot be opened.
        """
        return await self._runner.run_one(collections.get_collection(name), timeout)

    def collections(self, *, page_size: int = 0, timeout: float | None = None) -> AsyncIterator[Collection]:
        """Iterate over the collections of the server, in the order of their names.

        A collection that cannot be used, for example because it is damaged, has a `problem`. With Milvus, a collection
        with damaged settings is left out.

        Args:
            page_size: collections per request, at most 1000; 0: the server's default.
            timeout: seconds that one request may take, with all its tries; None: the `timeout` of the constructor.

        Raises:
            EmberpcError: a request failed, for example with InvalidArgument for a `page_size` above 1000; raised when
                the next collection is taken, and so is the InputError or InputTypeError for a wrong `timeout`.
            InputError: `page_size` is negative or not below 2**31; raised at once.
            InputTypeError: `page_size` is no int; raised at once.
        """
        return self._runner.pages(lambda token: collections.list_collections(token, page_size), timeout)

    async def update_collection(self, name: str, truncation: Truncation, *, timeout: float | None = None) -> Collection:
        """Change how a collection truncates texts of records with too many tokens, and return the collection.

        The new setting applies to later writes, and to records that a reembedding embeds later. The stored vectors do
        not change.

        Args:
            name: name of the collection.
            truncation: the new setting.
            timeout: seconds that one request may take, with all its tries; None: the `timeout` of the constructor.

        Raises:
            NotFound: there is no collection of this name.
        """
        return await self._runner.run_one(collections.update_collection(name, truncation), timeout)

    async def delete_collection(self, name: str, *, timeout: float | None = None) -> None:
        """Delete a collection with all its records, and cancel its reembedding.

        Args:
            name: name of the collection.
            timeout: seconds that one request may take, with all its tries; None: the `timeout` of the constructor.

        Raises:
            NotFound: there is no collection of this name, perhaps because a try of this call deleted it and the
                response was lost.
        """
        return await self._runner.run_one(collections.delete_collection(name), timeout)

    async def reembed_collection(
        self, name: str, model: str, *, dimensions: int = 0, timeout: float | None = None
    ) -> Collection:
        """Start to replace the vectors of a collection by those of another model, in the background.

        The call first checks that all records have texts, which may take long. Searches use the old vectors until all
        new vectors exist, and the new vectors from then on. `get_collection` returns the progress. A restarted server
        continues the reembedding.

        Args:
            name: name of the collection.
            model: name of the new model; empty: the only embedding model of the server. The present model is allowed if
                the dimensions are others.
            dimensions: dimensions of the new vectors: those of the model, or one of its Matryoshka dimensions; 0: those
                of the model.
            timeout: seconds that one request may take, with all its tries; None: the `timeout` of the constructor.

        Returns:
            The collection, with its `reembedding` if that still runs.

        Raises:
            NotFound: there is no collection of this name, or the server serves no model of this name.
            InvalidArgument: the model does not have these dimensions, or `model` is empty and the server has several
                embedding models.
            FailedPrecondition: the collection has vectors of this model and dimensions already; a reembedding of the
                collection runs, perhaps started by a try of this call whose response was lost; a record has no text;
                the model does not embed texts; or `model` is empty and the server has no embedding model.
            Unimplemented: the server's index backend has no reembedding.
            EmberpcError: the call failed otherwise.
        """
        return await self._runner.run_one(collections.reembed(name, model, dimensions), timeout)

    async def cancel_reembedding(self, name: str, *, timeout: float | None = None) -> Collection:
        """Cancel the reembedding of a collection, and return the collection, which keeps its old vectors.

        If no reembedding runs, for example because it has ended, the collection is returned unchanged.

        Args:
            name: name of the collection.
            timeout: seconds that one request may take, with all its tries; None: the `timeout` of the constructor.

        Raises:
            NotFound: there is no collection of this name.
        """
        return await self._runner.run_one(collections.cancel_reembedding(name), timeout)

    async def verify_collection(
        self,
        name: str,
        *,
        full: bool = False,
        progress: Callable[[int, int], None] | None = None,
        timeout: float | None = None,
    ) -> Verification:
        """Check that every record of a collection is undamaged, and that searches find a random sample of the records.

        The database and its word index are checked too. Two kinds of problems are also repaired: a word index that
        differs from the texts is rebuilt, and vectors that searches of the graph miss are found by later searches. Give
        a large collection a long timeout.

        Args:
            name: name of the collection, which may be read and written meanwhile.
            full: whether to search for every undamaged record by its own vector. False: for a random sample of about
                2000.
            progress: called repeatedly with the number of checked records and the number of all records; None: no
                calls.
            timeout: seconds that one request may take, with all its tries; None: the `timeout` of the constructor.

        Returns:
            The number of records that were checked, and the problems that were found.

        Raises:
            NotFound: there is no collection of this name.
            Unimplemented: the server's index backend has no verification.
            EmberpcError: the call failed otherwise.
        """
        return await self._runner.run_steps(collections.verify_collection(name, progress, full), None, timeout)
