"""IndexService: manage and back up collections; write, read, search and analyse records."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any, cast

from emberpc.bundle.cores import usable_cores
from emberpc.server.collections import IndexBackend, SearchOutcome
from emberpc.server.collections.filters import Filter
from emberpc.server.engine import Engine, Lane
from emberpc.server.errors import invalid
from emberpc.server.pipelines.backups import CollectionBackups
from emberpc.server.pipelines.collection_access import CollectionAccess
from emberpc.server.pipelines.collection_analysis import CollectionAnalysis
from emberpc.server.pipelines.collection_management import CollectionManagement
from emberpc.server.pipelines.index_pool import IndexPool
from emberpc.server.pipelines.limits import Limits
from emberpc.server.pipelines.records import RecordWriter, UpsertRequest
from emberpc.server.pipelines.reembedding import ReembeddingJobs
from emberpc.server.pipelines.search import RESPONSE_REMEDY, CollectionSearch
from emberpc.server.pipelines.search_groups import SearchGroups
from emberpc.server.pipelines.upsert_stream import UpsertedBatch, UpsertMessage, UpsertStream
from emberpc.server.services import backups, record_responses, requests, responses
from emberpc.server.services.filter_messages import read_filter
from emberpc.server.services.index_messages import (
    RequestedParts,
    caller_vectors,
    collection_message,
    new_records,
    read_collection,
    read_each_record,
)
from emberpc.server.services.search_request import read_search_request
from emberpc.server.services.search_response import search_response
from emberpc.server.statuses import status_of
from emberpc.v1 import index_pb2 as pb
from emberpc.v1 import index_pb2_grpc

#: Number of hits of a Search response above which the response is serialized in the pool. To serialize a record takes
#: about 10 µs, unless it was returned before; so a large response would block the event loop for milliseconds.
_MANY_HITS = 200
#: Characters of the metadata (JSON) of all hits above which a Search response is serialized in the pool. To serialize a
#: character takes about 0.1 µs.
_MUCH_METADATA = 64 * 1024
#: The methods whose responses have records. They return serialized bytes, which take less memory than a message.
_WITH_RECORDS = ("BatchGetRecords", "ListRecords", "Search", "ClusterRecords")


class IndexService(index_pb2_grpc.IndexServiceServicer):
    """Implements the IndexService of index.proto on an index backend.

    Methods report errors to callers by `ServiceError`; index.proto lists the status codes and the causes.

    Args:
        engine: the models, which embed texts of records and queries.
        index: the index backend, which stores the collections.
        pool: runs the blocking calls of the index.
        limits: limits of a call.
        reembedding: the reembedding jobs.
    """

    def __init__(
        self, engine: Engine, index: IndexBackend, pool: IndexPool, limits: Limits, reembedding: ReembeddingJobs
    ) -> None:
        self._engine = engine
        self._pool = pool
        self._limits = limits
        self._reembedding = reembedding
        self._access = CollectionAccess(engine, index, pool)
        self._management = CollectionManagement(engine, index, pool, self._access, reembedding)
        self._writer = RecordWriter(engine, limits, pool, self._access, reembedding)
        self._analysis = CollectionAnalysis(pool)
        self._backups = CollectionBackups(index, pool)
        self._search = CollectionSearch(engine, limits, pool, SearchGroups(pool, usable_cores()), self._access)

    async def CreateCollection(
        self, request: pb.CreateCollectionRequest, context: requests.Context
    ) -> pb.CreateCollectionResponse:
        """Create a collection and return it with its defaults; errors are those of `CollectionManagement.create`.

        INVALID_ARGUMENT, too, for a distance or truncation that this server does not know.
        """
        created = await self._management.create(read_collection(request.collection))
        return pb.CreateCollectionResponse(collection=collection_message(created))

    async def GetCollection(
        self, request: pb.GetCollectionRequest, context: requests.Context
    ) -> pb.GetCollectionResponse:
        """Return settings and state of the collection `request.name`.

        Errors are those of `CollectionManagement.get`, such as NOT_FOUND, INTERNAL if the collection is damaged, and
        RESOURCE_EXHAUSTED if the collection cannot be opened now, as on a full disk.
        """
        return pb.GetCollectionResponse(collection=collection_message(await self._management.get(request.name)))

    async def ListCollections(
        self, request: pb.ListCollectionsRequest, context: requests.Context
    ) -> pb.ListCollectionsResponse:
        """Return a page of the collections, sorted by name; errors are those of `CollectionManagement.page`."""
        size = requests.page_size(request.page_size)
        descriptions, token = await self._management.page(size, request.page_token)
        return pb.ListCollectionsResponse(collections=map(collection_message, descriptions), next_page_token=token)

    async def UpdateCollection(
        self, request: pb.UpdateCollectionRequest, context: requests.Context
    ) -> pb.UpdateCollectionResponse:
        """Change the truncation of a collection, and return the changed collection.

        A truncation that is not set becomes REFUSE.

        Raises:
            ServiceError: INVALID_ARGUMENT if `update_mask` is empty or names another field, or the truncation is
                unknown; as `CollectionManagement.set_truncation` does.
        """
        if not request.update_mask.paths:
            raise invalid("update_mask", "is empty; name the fields to change, such as truncation")
        for i, path in enumerate(request.update_mask.paths):
            if path != "truncation":
                raise invalid(f"update_mask.paths[{i}]", f"is {path!r}; only truncation can be changed")
        truncation = requests.truncation(request.collection.truncation, "collection.truncation")
        updated = await self._management.set_truncation(request.collection.name, truncation)
        return pb.UpdateCollectionResponse(collection=collection_message(updated))

    async def DeleteCollection(
        self, request: pb.DeleteCollectionRequest, context: requests.Context
    ) -> pb.DeleteCollectionResponse:
        """Delete a collection and cancel its reembedding; NOT_FOUND if there is no such collection."""
        await self._management.delete(request.name)
        return pb.DeleteCollectionResponse()

    async def UpsertRecords(
        self, request: pb.UpsertRecordsRequest, context: requests.Context
    ) -> pb.UpsertRecordsResponse:
        """Insert or replace records; return the number of new and of replaced records, and the receipt of the write.

        The texts are embedded unless the request has vectors; with vectors the response has no usages and timings.
        Errors are those of `RecordWriter.upsert`; without vectors, INVALID_ARGUMENT, too, for an unknown truncation.
        """
        given = request.HasField("vectors")
        upsert_request = UpsertRequest(
            collection=request.collection,
            record_count=len(request.records),
            read_records=lambda: new_records(request.records),
            read_vectors=partial(caller_vectors, request.vectors, len(request.records), "vectors") if given else None,
            truncation=None if given else requests.optional_truncation(request.truncation),
            expected_revisions=list(request.expected_revisions) or None,
        )
        upserted = await self._writer.upsert(upsert_request, requests.caller(context))
        result, inference = upserted.result, upserted.inference
        response = pb.UpsertRecordsResponse(
            inserted_count=result.inserted, updated_count=result.updated, receipt=responses.receipt(result)
        )
        if inference is not None:
            response.usages.extend(responses.usages(inference))
            response.timings.CopyFrom(responses.timings([inference]))
        return response

    async def UpsertRecordsStream(
        self, request_iterator: AsyncIterator[pb.UpsertRecordsStreamRequest], context: requests.Context
    ) -> AsyncIterator[pb.UpsertRecordsStreamResponse]:
        """Insert or replace the records of a stream of any length; yield a response for each message.

        A response is a checkpoint: all records up to and including its message are written, except those that failed.

        Raises:
            ServiceError: INVALID_ARGUMENT if there is no message or the first names no collection; as
                `CollectionAccess.open`, `UpsertStream.add` and `UpsertStream.run` do.
        """
        first = await anext(request_iterator, None)
        if first is None or not first.collection:
            raise invalid("collection", "is missing; the first message of a stream must name a collection")
        collection = await self._access.open(first.collection)
        caller, request_id = requests.caller(context, default=Lane.BULK), requests.request_id(context)
        stream = UpsertStream(self._engine, self._limits, self._pool, self._reembedding, collection, caller, request_id)
        read = partial(self._upsert_message, request_iterator)
        stream.add(read(first))
        del first  # its memory is freed before the end of the stream
        async with aclosing(stream.run(request_iterator, read)) as batches:
            async for batch in batches:
                yield _batch_response(batch, collection.spec.model_fingerprint, request_id)

    async def BatchGetRecords(  # type: ignore[override]
        self, request: pb.BatchGetRecordsRequest, context: requests.Context
    ) -> bytes:
        """Return a serialized BatchGetRecordsResponse (see `_WITH_RECORDS`) with the records of the given ids.

        Raises:
            ServiceError: INVALID_ARGUMENT for wrong parts or a wrong number of ids; as `CollectionAccess.call` and
                `record_responses.batch_get` do.
        """
        parts = RequestedParts(request.parts)
        self._limits.check_ids(len(request.ids))
        return await self._access.call(
            request.collection,
            lambda collection: record_responses.batch_get(collection, request.ids, parts, self._limits),
            requests.caller(context),
        )

    async def DeleteRecords(
        self, request: pb.DeleteRecordsRequest, context: requests.Context
    ) -> pb.DeleteRecordsResponse:
        """Delete the records with given ids, or those that match a filter; return their number and the receipt.

        If no record matches the filter, the response has warnings that give probable reasons.
        Errors are those of `RecordWriter.delete`; INVALID_ARGUMENT, too, for a wrong filter.
        """
        condition, caller = _filter(request), requests.caller(context)
        deleted = await self._writer.delete(request.collection, request.ids, condition, caller)
        return pb.DeleteRecordsResponse(
            deleted_count=deleted.result.deleted,
            receipt=responses.receipt(deleted.result),
            warnings=deleted.warnings,
        )

    async def ListRecords(  # type: ignore[override]
        self, request: pb.ListRecordsRequest, context: requests.Context
    ) -> bytes:
        """Return a serialized ListRecordsResponse (see `_WITH_RECORDS`): a page of the records, sorted by id.

        Raises:
            ServiceError: INVALID_ARGUMENT for a wrong filter, part or page size; as `CollectionAccess.call` and
                `record_responses.page` do.
        """
        condition, parts = _filter(request), RequestedParts(request.parts)
        size, token = requests.page_size(request.page_size), request.page_token
        return await self._access.call(
            request.collection,
            lambda collection: record_responses.page(collection, size, token, condition, parts, self._limits),
            requests.caller(context),
            heavy=condition is not None,
        )

    async def CountRecords(self, request: pb.CountRecordsRequest, context: requests.Context) -> pb.CountRecordsResponse:
        """Return the number of records that match the filter; without a filter, of all records.

        Errors are those of `CollectionAccess.call` and `record_responses.count`; INVALID_ARGUMENT for a wrong filter.
        """
        condition = _filter(request)
        return await self._access.call(
            request.collection,
            lambda collection: record_responses.count(collection, condition),
            requests.caller(context),
            heavy=condition is not None,
        )

    async def Search(self, request: pb.SearchRequest, context: requests.Context) -> bytes:  # type: ignore[override]
        """Return a serialized SearchResponse (see `_WITH_RECORDS`) with the hits and the plan of each query.

        Errors are those of `read_search_request` and `CollectionSearch.search`; INVALID_ARGUMENT, too, for a wrong
        priority or part; RESOURCE_EXHAUSTED if the response would be too large.
        """
        caller = requests.caller(context, request.priority)
        parts = RequestedParts.of(request.parts)
        results = await self._search.search(request.collection, read_search_request(request, parts), caller)
        serialize = partial(search_response, results, parts, self._check_search_response)
        return await self._pool.run(serialize) if _is_large(results.outcomes) else serialize()

    async def VerifyCollection(
        self, request: pb.VerifyCollectionRequest, context: requests.Context
    ) -> AsyncIterator[pb.VerifyCollectionResponse]:
        """Check all records for damage, and check that searches find a sample of the records, or all if `full` is set.

        The responses have the progress and the problems that were found. A problem does not end the call. Some problems
        are repaired, see index.proto.
        Errors are those of `CollectionAccess.open` and `CollectionAnalysis.verify`.
        """
        collection = await self._access.open(request.name)
        async with aclosing(self._analysis.verify(collection, requests.caller(context), full=request.full)) as steps:
            async for step in steps:
                yield record_responses.verification(step)

    def BackupCollection(
        self, request: pb.BackupCollectionRequest, context: requests.Context
    ) -> AsyncIterator[pb.BackupCollectionResponse]:
        """Return an iterator over the responses with the chunks of a backup; for its errors, see `backup_responses`."""
        return backups.backup_responses(self._backups, lambda: self._access.open(request.name), context)

    async def RestoreCollection(
        self, request_iterator: AsyncIterator[pb.RestoreCollectionRequest], context: requests.Context
    ) -> pb.RestoreCollectionResponse:
        """Create a collection from the chunks of a backup, and return its description.

        Errors are those of `CollectionBackups.restore` and `CollectionManagement.describe`.
        """
        collection = await backups.restore(self._backups, request_iterator)
        description = await self._management.describe(collection)
        return pb.RestoreCollectionResponse(collection=collection_message(description))

    async def FindDuplicates(
        self, request: pb.FindDuplicatesRequest, context: requests.Context
    ) -> pb.FindDuplicatesResponse:
        """Return a page of the pairs of records whose vectors have at least a given cosine, greatest cosine first.

        Pairs may be missing, see index.proto.
        Errors are those of `CollectionAccess.open` and `CollectionAnalysis.find_duplicates`; INVALID_ARGUMENT, too, for
        a wrong page size.
        """
        size, caller = requests.page_size(request.page_size), requests.caller(context)
        page = await self._access.use(
            request.collection,
            lambda collection: self._analysis.find_duplicates(
                collection, request.min_score, size, request.page_token, caller
            ),
        )
        return pb.FindDuplicatesResponse(
            pairs=[
                pb.DuplicatePair(first_id=pair.first_id, second_id=pair.second_id, score=pair.score)
                for pair in page.pairs
            ],
            next_page_token=page.next_token,
        )

    async def ClusterRecords(  # type: ignore[override]
        self, request: pb.ClusterRecordsRequest, context: requests.Context
    ) -> bytes:
        """Return a serialized ClusterRecordsResponse (see `_WITH_RECORDS`): clusters of the records, with examples.

        Errors are those of `CollectionAccess.open`, `CollectionAnalysis.clusters` and `record_responses.clusters`.
        """
        count, examples, caller = request.cluster_count, request.examples_per_cluster, requests.caller(context)
        found = await self._access.use(
            request.collection, lambda collection: self._analysis.clusters(collection, count, examples, caller)
        )
        return await self._pool.run(partial(record_responses.clusters, found, self._limits))

    async def ReembedCollection(
        self, request: pb.ReembedCollectionRequest, context: requests.Context
    ) -> pb.ReembedCollectionResponse:
        """Start to reembed a collection in the background, and return its description.

        The call first checks that each record has a text, which may take long. Errors are those of
        `CollectionManagement.reembed`.
        """
        description = await self._management.reembed(request.name, request.model, request.dimensions)
        return pb.ReembedCollectionResponse(collection=collection_message(description))

    async def CancelReembedding(
        self, request: pb.CancelReembeddingRequest, context: requests.Context
    ) -> pb.CancelReembeddingResponse:
        """Cancel the reembedding of a collection, if there is one, and return the collection's description.

        The collection keeps the model that it has. NOT_FOUND if there is no such collection.
        """
        description = await self._management.cancel_reembedding(request.name)
        return pb.CancelReembeddingResponse(collection=collection_message(description))

    def _check_search_response(self, size: int) -> None:
        self._limits.check_response(size, RESPONSE_REMEDY)

    def _upsert_message(
        self, messages: AsyncIterator[pb.UpsertRecordsStreamRequest], message: pb.UpsertRecordsStreamRequest
    ) -> UpsertMessage:
        """Convert `message`, the latest of the stream `messages`, to the message of the pipeline.

        The pipeline reads the records and vectors later; until it calls `release`, the bytes of `message` stay counted.
        INVALID_ARGUMENT for an unknown truncation if texts must be embedded.
        """
        held = requests.hold(messages)
        count, given = len(message.records), message.HasField("vectors")
        embedded = count > 0 and not given
        return UpsertMessage(
            collection=message.collection,
            batch_number=message.batch_number,
            record_count=count,
            read_records=lambda: read_each_record(message.records, self._limits),
            read_vectors=partial(caller_vectors, message.vectors, count, "vectors") if given else None,
            truncation=requests.optional_truncation(message.truncation) if embedded else None,
            size=held.size,
            release=held.release,
        )


def _filter(request: pb.DeleteRecordsRequest | pb.ListRecordsRequest | pb.CountRecordsRequest) -> Filter | None:
    return read_filter(request.filter) if request.HasField("filter") else None


def _is_large(outcomes: Sequence[SearchOutcome]) -> bool:
    """Return whether all queries have over `_MANY_HITS` hits together, or metadata of over `_MUCH_METADATA`."""
    records = [record for outcome in outcomes for record, _ in outcome.hits]
    return len(records) > _MANY_HITS or sum(len(record.metadata_text) for record in records) > _MUCH_METADATA


def _batch_response(batch: UpsertedBatch, fingerprint: str, request_id: str) -> pb.UpsertRecordsStreamResponse:
    response = pb.UpsertRecordsStreamResponse(
        batch_number=batch.batch_number,
        model_fingerprint=fingerprint,
        failures=[
            pb.RecordFailure(id=failed.id, error=status_of(failed.error, request_id)) for failed in batch.failures
        ],
    )
    if batch.result is not None:
        response.inserted_count, response.updated_count = batch.result.inserted, batch.result.updated
        response.receipt.CopyFrom(responses.receipt(batch.result))
    return response


def add_index_service(service: IndexService, server: Any) -> None:
    """Register an IndexService with a gRPC server, as the generated `add_IndexServiceServicer_to_server` does.

    But the methods of `_WITH_RECORDS` get no serializer, since they return serialized bytes.
    """
    index_pb2_grpc.add_IndexServiceServicer_to_server(service, cast(Any, _WithoutSerializers(server)))


class _WithoutSerializers:
    """Stands in for a gRPC server in generated code; registers the methods of `_WITH_RECORDS` without a serializer."""

    def __init__(self, server: Any) -> None:
        self._server = server

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """Do nothing: generated code also passes the same methods to `add_registered_method_handlers`."""

    def add_registered_method_handlers(self, name: str, methods: dict[str, Any]) -> None:
        """Register `methods`, the handlers by method name, with the server; `name` is that of the service."""
        changed = {method: methods[method]._replace(response_serializer=None) for method in _WITH_RECORDS}
        self._server.add_registered_method_handlers(name, {**methods, **changed})
