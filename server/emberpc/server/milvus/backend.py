"""All collections of emberpc in a Milvus database."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any

from emberpc.server.collections import CollectionBackend, ReembeddingBackend
from emberpc.server.collections.backend import RestorationBackend, collection_exists, no_collection, unsupported
from emberpc.server.collections.types import CollectionSpec, ProbeFigures, check_page_size
from emberpc.server.deadlines import Deadline
from emberpc.server.errors import Code, ServiceError
from emberpc.server.milvus import schema
from emberpc.server.milvus.collection import BACKEND, MilvusCollection
from emberpc.server.milvus.connection import Connection
from emberpc.server.paging import decode_token, encode_token


class MilvusIndex:
    """All collections of emberpc in a Milvus database; an `IndexBackend`. Safe to use from several threads.

    Milvus also stores the specs, so several servers may use one database. Each server reads the spec whenever a
    collection is requested, since another server may have deleted the collection and created it again.

    Every method that calls Milvus raises the `ServiceError` of `Connection.call` if the call fails.

    Args:
        uri: address of Milvus, such as `http://milvus:19530`, or with a database `http://milvus:19530/database`.
        token: `user:password` or an API key; empty: Milvus requires neither.

    Raises:
        ServiceError: the error of `Connection`, such as UNAVAILABLE if Milvus cannot be reached, FAILED_PRECONDITION if
            it refuses access.
    """

    def __init__(self, uri: str, token: str = "") -> None:
        self._connection = Connection(uri, token)
        self._lock = threading.Lock()
        #: Objects of the collections that were used so far, by name. All threads use the same object of a collection,
        #: since its lock serializes the writes.
        self._known: dict[str, MilvusCollection] = {}

    def create(self, spec: CollectionSpec) -> MilvusCollection:
        """Create a collection in Milvus with its HNSW index, and load it.

        If the index cannot be created or the collection not be loaded, the collection is deleted again.

        Raises:
            ServiceError: INVALID_ARGUMENT for a spec that is invalid or that Milvus does not support; ALREADY_EXISTS if
                a collection has the name.
        """
        spec.check()
        created = datetime.now(timezone.utc)
        arguments = schema.creation(spec, created)
        if self._exists(spec.name):
            raise collection_exists(spec.name)
        try:
            self._call(spec.name, "create_collection", **arguments)
        except ServiceError as error:
            # Another server may have created the collection after the check above. Milvus reports that with its code
            # for unexpected errors, which `Connection.call` makes INTERNAL.
            if error.code is Code.INTERNAL and self._exists(spec.name):
                raise collection_exists(spec.name) from error
            raise
        with ExitStack() as undo:
            undo.callback(self._call, spec.name, "drop_collection")
            self._call(spec.name, "create_index", index_params=schema.graph(spec))
            collection = self._keep(spec, created)
            undo.pop_all()
        return collection

    def get(self, name: str) -> MilvusCollection:
        """Return the collection `name` with its present spec; make Milvus load it, if this server did not use it yet.

        Raises:
            ServiceError: NOT_FOUND if there is no collection with that name, it was not created by emberpc, or its spec
                is damaged.
        """
        spec, created = self._existing(name)
        return self._at_hand(spec, created) or self._keep(spec, created)

    def opened(self, name: str) -> MilvusCollection | None:
        """Return None, so that callers use `get`: only Milvus knows the present spec of a collection."""

    def page(self, page_size: int, page_token: str) -> tuple[list[CollectionSpec], str]:
        """Return a page of the specs of the collections, sorted by name, and the token of the next page.

        Args:
            page_size: maximum number of specs of the page, 1 to 1000. There are fewer, even none, if collections of the
                page are deleted meanwhile, have a damaged spec, or were not created by emberpc.
            page_token: token of the page; empty: the first page.

        Returns:
            The specs, and the token of the next page; empty for the last page.

        Raises:
            ServiceError: INVALID_ARGUMENT for a page size out of range or a wrong token.
        """
        check_page_size(page_size)
        after = decode_token(page_token)
        listed = self._connection.call("listing the collections", "list_collections")
        names = sorted(name for name in map(schema.own_name, listed) if name is not None and name > after)
        token = encode_token(names[page_size - 1]) if len(names) > page_size else ""
        described = [self._describe(name) for name in names[:page_size]]
        return [found[0] for found in described if found is not None], token

    def update(self, name: str, truncation: str) -> None:
        """Set how the collection `name` truncates texts with too many tokens.

        Args:
            name: name of the collection.
            truncation: `refuse`, `end` or `start`.

        Raises:
            ServiceError: NOT_FOUND as in `get`; INVALID_ARGUMENT for another truncation.
        """
        spec, created = self._existing(name)
        self._alter(replace(spec, truncation=truncation), created)

    def update_fingerprint(self, name: str, legacy: str, fingerprint: str) -> MilvusCollection:
        """Bind the collection `name` to `fingerprint` if it is bound to the fingerprint `legacy` of the same model.

        Returns:
            The collection; if it was not bound to `legacy`, unchanged.

        Raises:
            ServiceError: NOT_FOUND as in `get`.
        """
        spec, created = self._existing(name)
        if spec.model_fingerprint == legacy:
            self._alter(replace(spec, model_fingerprint=fingerprint), created)
        return self.get(name)

    def delete(self, name: str) -> None:
        """Delete the collection `name` with its records.

        Raises:
            ServiceError: NOT_FOUND as in `get`; then nothing is deleted.
        """
        self._existing(name)
        with self._lock:
            self._known.pop(name, None)
        self._call(name, "drop_collection")

    def reembed(
        self, source: CollectionBackend, *, model: str, fingerprint: str, dimensions: int
    ) -> ReembeddingBackend:
        """Raise UNIMPLEMENTED: this backend does not support reembedding."""
        remedy = "make a collection under the new model, and import this one's export there with --text-only"
        raise unsupported("ReembedCollection", BACKEND, remedy)

    def reembeddings(self) -> list[ReembeddingBackend]:
        """Return an empty list: no reembedding is unfinished, since this backend does not support reembedding."""
        return []

    def switch(self, reembedding: ReembeddingBackend) -> bool:
        """Raise UNIMPLEMENTED: this backend does not support reembedding."""
        raise unsupported("ReembedCollection", BACKEND, "use the embedded index")

    def cancel_reembedding(self, name: str) -> None:
        """Do nothing: this backend does not support reembedding, so there is none to cancel."""

    def restore(self, name: str, total: int, accept: Callable[[CollectionSpec], None]) -> RestorationBackend:
        """Raise UNIMPLEMENTED: a backup is a database of the embedded backend, which Milvus cannot read."""
        raise unsupported("RestoreCollection", BACKEND, "restore it to an embedded index, and move it by export")

    def probed(self) -> dict[str, ProbeFigures]:
        """Return an empty dict: this backend probes no searches, since an exact search would read all vectors."""
        return {}

    def close(self, deadline: Deadline | None = None) -> bool:
        """Close the connection to Milvus without waiting for calls; `deadline` is ignored. Return True (closed)."""
        self._connection.close()
        return True

    def _keep(self, spec: CollectionSpec, created: datetime) -> MilvusCollection:
        """Make Milvus load a collection, keep an object of it for later calls, and return the object.

        If another thread has kept an object of the collection while Milvus loaded it, that object is returned.
        """
        collection = MilvusCollection(self._connection, spec, created)
        collection.load()
        with self._lock:
            return self._known_as(spec, created) or self._known.setdefault(spec.name, collection)

    def _at_hand(self, spec: CollectionSpec, created: datetime) -> MilvusCollection | None:
        """Return the kept object of the collection that has this spec and creation time, with its spec set to `spec`.

        None if there is no object. If the creation time, or more than truncation and model fingerprint, differs, then
        another collection has the name now: the kept object is dropped, and None is returned.
        """
        with self._lock:
            return self._known_as(spec, created)

    def _known_as(self, spec: CollectionSpec, created: datetime) -> MilvusCollection | None:
        """Do what `_at_hand` does. The caller holds the lock."""
        known = self._known.get(spec.name)
        if known is not None and not (known.created == created and known.adopt(spec)):
            del self._known[spec.name]
            return None
        return known

    def _alter(self, spec: CollectionSpec, created: datetime) -> None:
        """Set the spec of the collection with the name `spec.name` in Milvus, and in its kept object if there is one.

        Only truncation and model fingerprint may differ from the present spec. `created` is the creation time.
        INVALID_ARGUMENT for an invalid spec.
        """
        spec.check()
        self._call(spec.name, "alter_collection_properties", properties=schema.properties(spec, created))
        self._at_hand(spec, created)

    def _exists(self, name: str) -> bool:
        return bool(self._call(name, "has_collection"))

    def _existing(self, name: str) -> tuple[CollectionSpec, datetime]:
        """Return spec and creation time of the collection `name`; raise NOT_FOUND where `_describe` returns None."""
        found = self._describe(name)
        if found is None:
            raise no_collection(name)
        return found

    def _describe(self, name: str) -> tuple[CollectionSpec, datetime] | None:
        """Return spec and creation time of the collection `name`.

        None if it is missing, was not created by emberpc, or has a damaged spec.
        """
        if not schema.is_possible(name):
            return None
        try:
            described = self._call(name, "describe_collection")
        except ServiceError as error:
            if error.code is Code.NOT_FOUND:
                return None
            raise
        return schema.read_description(described)

    def _call(self, name: str, method: str, **arguments: Any) -> Any:
        """Call a method of `MilvusClient` with the Milvus name of the collection `name`; see `Connection.call`."""
        return self._connection.call(
            f"collection {name!r}", method, collection_name=schema.milvus_name(name), **arguments
        )
