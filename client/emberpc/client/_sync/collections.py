"""Methods about whole collections."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from emberpc.client._core import checks, collections
from emberpc.client._sync.runner import Runner
from emberpc.client.exceptions import AlreadyExists
from emberpc.client.types import Collection, Distance, Truncation, Verification


class CollectionMethods:
    """Methods of `Client` that create, change, list, check and delete collections."""

    _runner: Runner

    def create_collection(
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
            name: name of the collection: 1 to 128 letters, digits, `.`, `_` and `-`, starting with a letter or digit.
            model: name of the model that embeds texts of records and queries; empty: records must have vectors.
            dimensions: dimensions of the vectors, at most 16,000; with a model one of its Matryoshka dimensions, or 0
                for all. Without a model, 0 is refused.
            distance: the measure that compares vectors.
            truncation: how texts of records with too many tokens are truncated, unless an upsert states otherwise.
            m: links of a node of the HNSW graph per layer, 4 to 64; 0: the server's default.
            ef_construction: candidates that an insertion into the graph keeps, 16 to 2000; 0: the server's default.
            indexed_fields: metadata fields that filters use often, at most 16. The server keeps an index of each, which
                makes every write a little slower. With Milvus without effect.
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
            return self._runner.run_one(call, timeout)
        except AlreadyExists as error:
            if not checks.flag(exist_ok, "exist_ok"):
                raise
            existing = self._runner.run_one(collections.get_collection(name), timeout)
            return collections.check_alike(existing, call.request, error)

    def get_collection(self, name: str, *, timeout: float | None = None) -> Collection:
        """Return a collection: its settings, number of records, size, and the progress of a reembedding.

        Args:
            name: name of the collection.
            timeout: seconds that one request may take, with all its tries; None: the `timeout` of the constructor.

        Raises:
            NotFound: there is no collection of this name.
            Internal: the collection is damaged, and cannot be opened.
        """
        return self._runner.run_one(collections.get_collection(name), timeout)

    def collections(self, *, page_size: int = 0, timeout: float | None = None) -> Iterator[Collection]:
        """Iterate over the collections of the server, in the order of their names; unusable ones have a `problem`.

        Args:
            page_size: collections per request, at most 1000; 0: the server's default.
            timeout: seconds that one request may take, with all its tries; None: the `timeout` of the constructor.

        Raises:
            EmberpcError: a request failed; raised when the next collection is taken. A wrong `page_size` raises
                InputError or InputTypeError at once.
        """
        return self._runner.pages(lambda token: collections.list_collections(token, page_size), timeout)

    def update_collection(self, name: str, truncation: Truncation, *, timeout: float | None = None) -> Collection:
        """Change how a collection truncates texts of records with too many tokens, and return the collection.

        The new setting applies to later writes; stored records do not change.

        Args:
            name: name of the collection.
            truncation: the new setting.
            timeout: seconds that one request may take, with all its tries; None: the `timeout` of the constructor.

        Raises:
            NotFound: there is no collection of this name.
        """
        return self._runner.run_one(collections.update_collection(name, truncation), timeout)

    def delete_collection(self, name: str, *, timeout: float | None = None) -> None:
        """Delete a collection with all its records, and cancel its reembedding.

        Args:
            name: name of the collection.
            timeout: seconds that one request may take, with all its tries; None: the `timeout` of the constructor.

        Raises:
            NotFound: there is no collection of this name, perhaps since a try of this call whose response was lost
                deleted it.
        """
        return self._runner.run_one(collections.delete_collection(name), timeout)

    def reembed_collection(
        self, name: str, model: str, *, dimensions: int = 0, timeout: float | None = None
    ) -> Collection:
        """Start to replace the vectors of a collection by those of another model, in the background.

        Searches use the old vectors until all new vectors exist, and the new vectors from then on. `get_collection`
        returns the progress. A restarted server continues the reembedding.

        Args:
            name: name of the collection.
            model: name of the new model; empty: the only embedding model of the server.
            dimensions: dimensions of the new vectors; 0: those of the model.
            timeout: seconds that one request may take, with all its tries; None: the `timeout` of the constructor.

        Returns:
            The collection, with its `reembedding` if that still runs.

        Raises:
            NotFound: there is no collection or no model of this name.
            InvalidArgument: the model does not have these dimensions, or `model` is empty and there are several.
            FailedPrecondition: the collection has vectors of this model and dimensions already, another reembedding of
                the collection runs, a record has no text, or the model does not embed texts.
            Unimplemented: the server's index backend has no reembedding.
            EmberpcError: the call failed otherwise.
        """
        return self._runner.run_one(collections.reembed(name, model, dimensions), timeout)

    def cancel_reembedding(self, name: str, *, timeout: float | None = None) -> Collection:
        """Cancel the reembedding of a collection, and return the collection; the old vectors stay.

        Does nothing if no reembedding runs.

        Args:
            name: name of the collection.
            timeout: seconds that one request may take, with all its tries; None: the `timeout` of the constructor.

        Raises:
            NotFound: there is no collection of this name.
        """
        return self._runner.run_one(collections.cancel_reembedding(name), timeout)

    def verify_collection(
        self,
        name: str,
        *,
        full: bool = False,
        progress: Callable[[int, int], None] | None = None,
        timeout: float | None = None,
    ) -> Verification:
        """Check that every record of a collection is undamaged, and that searches find a random sample of the records.

        The server repairs two kinds of problems, and reports them all the same: words that are not those of the texts,
        and vectors that searches miss. Give a large collection a long timeout.

        Args:
            name: name of the collection, which may be read and written meanwhile.
            full: whether to search for every record by its own vector. False: for a random sample of about 2000.
            progress: called repeatedly with the number of checked records and the number of all records.
            timeout: seconds that one request may take, with all its tries; None: the `timeout` of the constructor.

        Returns:
            The number of records that were checked, and the problems that were found.

        Raises:
            NotFound: there is no collection of this name.
            Unimplemented: the server's index backend has no verification.
            EmberpcError: the call failed otherwise.
        """
        return self._runner.run_steps(collections.verify_collection(name, progress, full), None, timeout)
