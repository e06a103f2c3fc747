"""IndexService: collections of records, and search in them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any, TypeVar, cast

from emberpc.bundle import Task
from emberpc.server.collections import CollectionBackend, CollectionSpec, IndexBackend, WriteResult
from emberpc.server.collections.filters import Filter
from emberpc.server.cores import usable_cores
from emberpc.server.engine import Caller, Engine, Truncation
from emberpc.server.errors import Code, ServiceError, invalid, items_of
from emberpc.server.services import keeping, reading, replies, requests
from emberpc.server.services.backups import Backups
from emberpc.server.services.binding import collection_model
from emberpc.server.services.bulk import upsert_stream
from emberpc.server.services.filters import check_indexed_fields, read_filter
from emberpc.server.services.forms import Matrix, check_dimensions, shape
from emberpc.server.services.groups import Groups
from emberpc.server.services.index_pool import IndexPool
from emberpc.server.services.opening import Opener
from emberpc.server.services.records import (
    DISTANCES,
    Parts,
    caller_vectors,
    collection_message,
    new_records,
    spec_message,
)
from emberpc.server.services.reembedding import Reembedder
from emberpc.server.services.search_groups import SearchGroups
from emberpc.server.services.searching import Searcher
from emberpc.server.services.slots import Slots
from emberpc.v1 import index_pb2 as pb
from emberpc.v1 import index_pb2_grpc

Result = TypeVar("Result")


class IndexService(index_pb2_grpc.IndexServiceServicer):
    """Serves an index, embedding texts with the models of an engine.

    Args:
        engine: the models.
        index: the collections; its calls block, so they run in `pool`.
        pool: where they run.
        limits: how large a call may be.
        reembedder: takes collections to other models.
    """

    def __init__(
        self, engine: Engine, index: IndexBackend, pool: IndexPool, limits: requests.Limits, reembedder: Reembedder
    ) -> None:
        self._engine = engine
        self._index = index
        self._pool = pool
        self._limits = limits
        self._reembedder = reembedder
        self._groups = Groups(pool, limits)
        self._backups = Backups(index, pool)
        self._searcher = Searcher(engine, limits, pool, SearchGroups(pool, usable_cores()))
        self._opener = Opener(engine, index, pool)

    async def CreateCollection(
        self, request: pb.CreateCollectionRequest, context: requests.Context
    ) -> pb.CreateCollectionResponse:
        """Create a collection."""
        spec = self._spec(request.collection)
        await self._pool.run(lambda: self._index.create(spec))
        return pb.CreateCollectionResponse(collection=await self._with(spec.name, self._describe))

    async def GetCollection(
        self, request: pb.GetCollectionRequest, context: requests.Context
    ) -> pb.GetCollectionResponse:
        """Describe a collection."""
        return pb.GetCollectionResponse(collection=await self._with(request.name, self._describe))

    async def ListCollections(
        self, request: pb.ListCollectionsRequest, context: requests.Context
    ) -> pb.ListCollectionsResponse:
        """List the collections by name."""
        size = requests.page_size(request.page_size)
        specs, token = await self._pool.run(lambda: self._index.page(size, request.page_token))
        found = [await self._describe_or_say_why_not(spec) for spec in specs]
        return pb.ListCollectionsResponse(
            collections=[collection for collection in found if collection is not None], next_page_token=token
        )

    async def UpdateCollection(
        self, request: pb.UpdateCollectionRequest, context: requests.Context
    ) -> pb.UpdateCollectionResponse:
        """Change settings of a collection."""
        if not request.update_mask.paths:
            raise invalid("update_mask", "is empty; name the fields to change, such as truncation")
        for i, path in enumerate(request.update_mask.paths):
            if path != "truncation":
                raise invalid(f"update_mask.paths[{i}]", f"is {path!r}; only truncation can be changed")
        truncation = requests.truncation(request.collection.truncation, "collection.truncation").value
        name = request.collection.name
        await self._pool.run(lambda: self._index.update(name, truncation), within=self._pool.writers(name))
        return pb.UpdateCollectionResponse(collection=await self._with(name, self._describe))

    async def DeleteCollection(
        self, request: pb.DeleteCollectionRequest, context: requests.Context
    ) -> pb.DeleteCollectionResponse:
        """Delete a collection."""
        await self._reembedder.cancel(request.name)
        await self._pool.run(lambda: self._index.delete(request.name))
        return pb.DeleteCollectionResponse()

    async def UpsertRecords(
        self, request: pb.UpsertRecordsRequest, context: requests.Context
    ) -> pb.UpsertRecordsResponse:
        """Insert or replace records."""
        self._limits.check_count(len(request.records), "records", "record")
        await self._reembedder.writable(request.collection)
        return await self._with(request.collection, lambda collection: self._upsert(request, context, collection))

    async def _upsert(
        self, request: pb.UpsertRecordsRequest, context: requests.Context, collection: CollectionBackend
    ) -> pb.UpsertRecordsResponse:
        writers = self._pool.writers(request.collection)
        records = await self._pool.run(lambda: new_records(request.records), context, within=writers)
        response = pb.UpsertRecordsResponse()
        if request.HasField("vectors"):
            self._limits.check_texts([record.text for record in records], items_of("records", "text"), allow_empty=True)
            matrix = caller_vectors(request.vectors, len(records), "vectors")
        else:
            texts = [record.text for record in records]
            default = Truncation(collection.spec.truncation)
            truncation = requests.truncation(request.truncation, default=default)
            matrix = await self._embed_records(collection, texts, truncation, requests.caller(context), response)
        upsert = partial(collection.upsert, records, matrix, list(request.expected_revisions) or None)
        result = await self._pool.run(upsert, within=writers)
        response.inserted_count = result.inserted
        response.updated_count = result.updated
        response.receipt.CopyFrom(replies.receipt(result))
        return response

    def UpsertRecordsStream(
        self, request_iterator: AsyncIterator[pb.UpsertRecordsStreamRequest], context: requests.Context
    ) -> AsyncIterator[pb.UpsertRecordsStreamResponse]:
        """Insert or replace the records of a corpus of any size."""
        writable = self._reembedder.writable
        return upsert_stream(
            self._engine, self._limits, self._pool, self._opener.collection, writable, request_iterator, context
        )

    async def BatchGetRecords(
        self, request: pb.BatchGetRecordsRequest, context: requests.Context
    ) -> pb.BatchGetRecordsResponse:
        """Get records by id."""
        parts = Parts(request.parts)
        if not 1 <= len(request.ids) <= requests.MAX_IDS:
            raise invalid("ids", f"has {len(request.ids)} ids; it must have 1 to {requests.MAX_IDS}")
        return await self._call(
            request.collection,
            lambda collection: reading.batch_get(collection, request.ids, parts, self._limits),
            context,
        )

    async def DeleteRecords(
        self, request: pb.DeleteRecordsRequest, context: requests.Context
    ) -> pb.DeleteRecordsResponse:
        """Delete records by id or by filter."""
        condition = _filter(request)
        if condition is not None and request.ids:
            raise invalid("filter", "is set and so are ids; give one of the two")
        if condition is None and not 1 <= len(request.ids) <= requests.MAX_IDS:
            raise invalid("ids", f"has {len(request.ids)} ids; it must have 1 to {requests.MAX_IDS}")

        def delete(collection: CollectionBackend) -> tuple[WriteResult, list[str]]:
            if condition is None:
                return collection.delete(request.ids), []
            deleted = collection.delete_matching(condition)
            return deleted, reading.warnings(collection, condition, deleted.deleted)

        await self._reembedder.writable(request.collection)
        writers = self._pool.writers(request.collection)
        # What finds the records can be cancelled, and then nothing is deleted.
        result, warnings = await self._call(
            request.collection, delete, context, heavy=condition is not None, within=writers
        )
        return pb.DeleteRecordsResponse(
            deleted_count=result.deleted,
            receipt=replies.receipt(result),
            warnings=warnings,
        )

    async def ListRecords(self, request: pb.ListRecordsRequest, context: requests.Context) -> pb.ListRecordsResponse:
        """List records by id."""
        condition = _filter(request)
        parts = Parts(request.parts)
        size = requests.page_size(request.page_size)
        return await self._call(
            request.collection,
            lambda collection: reading.page(collection, size, request.page_token, condition, parts, self._limits),
            context,
            heavy=condition is not None,
        )

    async def CountRecords(self, request: pb.CountRecordsRequest, context: requests.Context) -> pb.CountRecordsResponse:
        """Count records."""
        condition = _filter(request)

        def count(collection: CollectionBackend) -> pb.CountRecordsResponse:
            found = collection.count(condition)
            return pb.CountRecordsResponse(count=found, warnings=reading.warnings(collection, condition, found))

        return await self._call(request.collection, count, context, heavy=condition is not None)

    async def Search(self, request: pb.SearchRequest, context: requests.Context) -> bytes:  # type: ignore[override]
        """Find the records nearest to each query; the answer is written already, see `add_index_service`."""
        requests.check_priority(request.priority)
        collection = self._opener.at_hand(request.collection)
        if collection is not None:
            try:
                return await self._searcher.search(request, collection, context)
            except ServiceError as error:
                if error.reason != "CLOSED":
                    raise
        return await self._with(request.collection, lambda again: self._searcher.search(request, again, context))

    async def VerifyCollection(
        self, request: pb.VerifyCollectionRequest, context: requests.Context
    ) -> AsyncIterator[pb.VerifyCollectionResponse]:
        """Check that every record is there, undamaged and found."""
        collection = await self._opener.collection(request.name)
        async for message in keeping.verification(collection, self._pool, context, full=request.full):
            yield message

    def BackupCollection(
        self, request: pb.BackupCollectionRequest, context: requests.Context
    ) -> AsyncIterator[pb.BackupCollectionResponse]:
        """Send a collection as one file."""
        return self._backups.backup(self._opener.collection, request, context)

    async def RestoreCollection(
        self, request_iterator: AsyncIterator[pb.RestoreCollectionRequest], context: requests.Context
    ) -> pb.RestoreCollectionResponse:
        """Make a collection of such a file."""
        collection = await self._backups.restore(request_iterator)
        return pb.RestoreCollectionResponse(collection=await self._describe(collection))

    async def FindDuplicates(
        self, request: pb.FindDuplicatesRequest, context: requests.Context
    ) -> pb.FindDuplicatesResponse:
        """Find pairs of records that are much alike."""
        return await self._with(
            request.collection, lambda collection: self._groups.find_duplicates(request, collection, context)
        )

    async def ClusterRecords(
        self, request: pb.ClusterRecordsRequest, context: requests.Context
    ) -> pb.ClusterRecordsResponse:
        """Group the records by likeness."""
        return await self._with(
            request.collection, lambda collection: self._groups.cluster_records(request, collection, context)
        )

    async def ReembedCollection(
        self, request: pb.ReembedCollectionRequest, context: requests.Context
    ) -> pb.ReembedCollectionResponse:
        """Begin to take a collection over to another model, in the background."""
        collection = await self._opener.collection(request.name)
        await self._reembedder.start(collection, request.model, request.dimensions)
        return pb.ReembedCollectionResponse(collection=await self._describe(collection))

    async def CancelReembedding(
        self, request: pb.CancelReembeddingRequest, context: requests.Context
    ) -> pb.CancelReembeddingResponse:
        """Leave a collection under the model that it has."""
        await self._opener.collection(request.name)
        await self._reembedder.cancel(request.name)
        return pb.CancelReembeddingResponse(
            collection=await self._describe(await self._opener.collection(request.name))
        )

    def _spec(self, message: pb.Collection) -> CollectionSpec:
        """Read what a new collection is to be; the index checks the rest."""
        distance = message.distance or pb.DISTANCE_COSINE
        if distance not in DISTANCES:
            raise invalid("collection.distance", f"is {distance}; use COSINE, DOT_PRODUCT or EUCLIDEAN")
        dimensions, fingerprint = message.dimensions, ""
        if message.model:
            model = self._engine.model(message.model, Task.EMBEDDING, "collection.model")
            check_dimensions(model, dimensions, "collection.dimensions")
            dimensions = dimensions or model.manifest.dimensions
            fingerprint = model.fingerprint
        check_indexed_fields(message.indexed_fields, "collection.indexed_fields")
        defaults = CollectionSpec(name=message.name, dimensions=dimensions or 1)
        return CollectionSpec(
            name=message.name,
            model=message.model,
            model_fingerprint=fingerprint,
            dimensions=dimensions,
            distance=DISTANCES[distance],
            truncation=requests.truncation(message.truncation, "collection.truncation").value,
            m=message.hnsw.m or defaults.m,
            ef_construction=message.hnsw.ef_construction or defaults.ef_construction,
            indexed_fields=tuple(message.indexed_fields),
        )

    async def _embed_records(
        self,
        collection: CollectionBackend,
        texts: list[str],
        truncation: Truncation,
        caller: Caller,
        response: pb.UpsertRecordsResponse,
    ) -> Matrix:
        """Embed the texts of records, and say in the response how it went."""
        model = collection_model(self._engine, collection)
        self._limits.check_texts(texts, items_of("records", "text"))
        inference = await self._engine.infer(
            model,
            texts,
            model.manifest.prompts.passage,
            truncation,
            items_of("records", "text"),
            caller,
        )
        response.usages.extend(replies.usages(inference))
        response.timings.CopyFrom(replies.timings([inference]))
        return shape(inference.output, collection.spec.dimensions, unit=model.manifest.normalize)

    async def _with(self, name: str, work: Callable[[CollectionBackend], Awaitable[Result]]) -> Result:
        """Do something with a collection; once more, if another took its place meanwhile, as re-embedding has it."""
        collection = await self._opener.collection(name)
        try:
            return await work(collection)
        except ServiceError as error:
            if error.reason != "CLOSED":
                raise
            successor = await self._opener.collection(name)
            if successor is collection:
                raise
            return await work(successor)

    async def _call(
        self,
        name: str,
        work: Callable[[CollectionBackend], Result],
        context: requests.Context,
        *,
        heavy: bool = False,
        within: Slots | None = None,
    ) -> Result:
        """Do something with a collection in the pool, as `IndexPool.run` does."""
        return await self._with(
            name,
            lambda collection: self._pool.run(lambda: work(collection), context, heavy=heavy, within=within),
        )

    async def _describe(self, collection: CollectionBackend) -> pb.Collection:
        message = await self._pool.run(lambda: collection_message(collection))
        if (status := await self._reembedder.status(message.name)) is not None:
            message.reembedding.CopyFrom(status)
        return message

    async def _describe_or_say_why_not(self, spec: CollectionSpec) -> pb.Collection | None:
        """Describe a collection; one that is damaged must not hide the others. None if it is gone by now."""
        try:
            return await self._with(spec.name, self._describe)
        except ServiceError as error:
            if error.code is Code.NOT_FOUND:
                return None
            if error.code is not Code.INTERNAL:
                raise
            return spec_message(spec, error.message)


def _filter(request: pb.DeleteRecordsRequest | pb.ListRecordsRequest | pb.CountRecordsRequest) -> Filter | None:
    return read_filter(request.filter) if request.HasField("filter") else None


def add_index_service(service: IndexService, server: Any) -> None:
    """Register the service with a server, or what stands for one, as the generated function does.

    Search answers with bytes: nobody is to write them once more.
    """
    index_pb2_grpc.add_IndexServiceServicer_to_server(service, cast(Any, _Written(server)))


class _Written:
    """Hands a service's methods on to a server, but for what makes bytes of the answer of Search."""

    def __init__(self, server: Any) -> None:
        self._server = server

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """Do nothing: generated code gives the same methods to `add_registered_method_handlers` by name."""

    def add_registered_method_handlers(self, name: str, methods: dict[str, Any]) -> None:
        """Register the methods."""
        search = methods["Search"]._replace(response_serializer=None)
        self._server.add_registered_method_handlers(name, {**methods, "Search": search})
