"""What `Client` asks about a collection as a whole."""

from __future__ import annotations

# What the methods have in common is said once, in the docstring of `Client`.
# ruff: noqa: D417
from collections.abc import Callable, Iterator

from emberpc.client import _collections, _groups
from emberpc.client._running import Runner
from emberpc.client.types import Cluster, Collection, DuplicatePair, Verification


class GroupCalls:
    """The part of `Client` that looks at all records of a collection. Give a large one more time."""

    _runner: Runner

    def duplicates(
        self, collection: str, *, min_score: float = 0.95, timeout: float | None = None
    ) -> Iterator[DuplicatePair]:
        """Walk over the pairs of records that are much alike, most alike first, at most 100,000.

        Up to 20,000 records each is compared with every other; of more, under
        cosine, each is looked for in the graph, which finds up to 20 others of
        a record.

        Args:
            collection: name of the collection.
            min_score: the least cosine of their vectors, above 0 and at most 1.
        """
        return self._runner.pages(
            lambda token: _groups.find_duplicates(collection, token, min_score=min_score), timeout
        )

    def clusters(
        self, collection: str, count: int, *, examples: int = 5, timeout: float | None = None
    ) -> list[Cluster]:
        """Group a collection's records by likeness, with k-means.

        Args:
            collection: name of the collection.
            count: clusters, 2 to 1000; fewer come out if records are equal.
            examples: records to give of each, at most 100.

        Returns:
            The clusters, largest first.
        """
        return self._runner.run_one(_groups.cluster_records(collection, count, examples=examples), timeout)

    def reembed_collection(
        self, name: str, model: str, *, dimensions: int = 0, timeout: float | None = None
    ) -> Collection:
        """Begin to embed a collection's texts under another model, in the background.

        The collection answers under the model that it has until all is there,
        and then at once under the new one. `get_collection` tells how far it
        is; a restart of the server goes on with it.

        Args:
            name: name of the collection.
            model: name of the new model.
            dimensions: of its vectors; 0: the model's.

        Raises:
            NotFound: there is no such collection or model.
            FailedPrecondition: it is under that model, on its way to another, or has records without text.
        """
        return self._runner.run_one(_collections.reembed(name, model, dimensions), timeout)

    def cancel_reembedding(self, name: str, *, timeout: float | None = None) -> Collection:
        """Leave a collection under the model that it has; nothing if it is on its way to no other."""
        return self._runner.run_one(_collections.cancel_reembedding(name), timeout)

    def verify_collection(
        self,
        name: str,
        *,
        full: bool = False,
        progress: Callable[[int, int], None] | None = None,
        timeout: float | None = None,
    ) -> Verification:
        """Check that every record of a collection is undamaged, and that a search finds a random sample of them.

        Args:
            name: name of the collection, which may be read and written meanwhile.
            full: search for every record by its own vector; otherwise for a random sample.
            progress: told again and again how many records are checked, of how many.

        Returns:
            How many records were checked, and what is wrong.
        """
        return self._runner.follow(_collections.verify_collection(name, progress, full), None, timeout)
