"""Upsert records, which embeds their texts, and delete records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from emberpc.server.collections import CollectionBackend, NewRecord, WriteResult
from emberpc.server.collections.filters import Filter
from emberpc.server.engine import Caller, Engine, Inference, InferenceRequest, Truncation
from emberpc.server.errors import invalid, items_of
from emberpc.server.pipelines.collection_access import CollectionAccess
from emberpc.server.pipelines.embedding import Matrix, shape
from emberpc.server.pipelines.index_pool import IndexPool
from emberpc.server.pipelines.limits import Limits
from emberpc.server.pipelines.model_binding import collection_model
from emberpc.server.pipelines.reembedding import ReembeddingJobs


@dataclass(frozen=True)
class UpsertRequest:
    """Records to insert or replace.

    Attributes:
        collection: name of the collection.
        record_count: number of records.
        read_records: returns the records; runs in the pool, since metadata may take seconds to read.
        read_vectors: returns the records' vectors, float32 (records, dimensions). None: their texts are embedded.
        truncation: the truncation of long texts; None: as the collection says.
        expected_revisions: the revision that each record must have now; None: any.
    """

    collection: str
    record_count: int
    read_records: Callable[[], list[NewRecord]]
    read_vectors: Callable[[], Matrix] | None
    truncation: Truncation | None
    expected_revisions: Sequence[int] | None


@dataclass(frozen=True)
class UpsertedRecords:
    """The result of an upsert, and the inference of the records' texts; None if the request had vectors."""

    result: WriteResult
    inference: Inference | None


@dataclass(frozen=True)
class DeletedRecords:
    """The result of a delete, and sentences that say why its filter probably matches no record."""

    result: WriteResult
    warnings: Sequence[str]


class RecordWriter:
    """Writes records to collections.

    Args:
        engine: embeds the records' texts.
        limits: limits of a call.
        pool: runs the blocking calls of the index.
        access: opens collections.
        reembedding: the reembedding jobs; writes wait while a job switches collections.
    """

    def __init__(
        self, engine: Engine, limits: Limits, pool: IndexPool, access: CollectionAccess, reembedding: ReembeddingJobs
    ) -> None:
        self._engine = engine
        self._limits = limits
        self._pool = pool
        self._access = access
        self._reembedding = reembedding

    async def upsert(self, request: UpsertRequest, caller: Caller) -> UpsertedRecords:
        """Insert or replace records.

        Raises:
            ServiceError: as `CollectionBackend.upsert` does, and as `collection_model` and `Inferrer.infer` do if the
                texts are embedded; INVALID_ARGUMENT for wrong records or vectors; FAILED_PRECONDITION for vectors if
                the collection changes its model meanwhile; RESOURCE_EXHAUSTED if too many writes of it wait.
        """
        self._limits.check_count(request.record_count, "records", "record")
        return await self._access.use(
            request.collection,
            lambda collection: self._upsert(collection, request, caller),
            has_vectors=request.read_vectors is not None,
        )

    async def _upsert(self, collection: CollectionBackend, request: UpsertRequest, caller: Caller) -> UpsertedRecords:
        # The collection was opened before: vectors of the request belong to the model that it had then.
        await self._reembedding.wait_writable(request.collection)
        writers = self._pool.writers(request.collection)
        records = await self._pool.run(request.read_records, caller, within=writers)
        texts = [record.text for record in records]
        inference = None
        if request.read_vectors is not None:
            self._limits.check_texts(texts, items_of("records", "text"), allow_empty=True)
            matrix = request.read_vectors()
        else:
            model = collection_model(self._engine, collection)
            self._limits.check_texts(texts, items_of("records", "text"))
            truncation = request.truncation or Truncation(collection.spec.truncation)
            prompt, path = model.manifest.prompts.passage, items_of("records", "text")
            inference = await self._engine.inferrer.infer(
                InferenceRequest(model, texts, prompt, truncation, path, caller)
            )
            matrix = shape(inference.output, collection.spec.dimensions, unit=model.manifest.normalize)
        # Not cancelled when the caller leaves: a write that has begun runs to its end.
        upsert = partial(collection.upsert, records, matrix, request.expected_revisions)
        return UpsertedRecords(await self._pool.run(upsert, within=writers), inference)

    async def delete(self, name: str, ids: Sequence[str], condition: Filter | None, caller: Caller) -> DeletedRecords:
        """Delete the records with some ids, or those that match a filter.

        Args:
            name: name of the collection.
            ids: the ids; empty if there is a filter.
            condition: the filter; None if there are ids.
            caller: the caller.

        Raises:
            ServiceError: INVALID_ARGUMENT if there are both, neither or too many ids; as `CollectionBackend.delete` and
                `CollectionBackend.delete_matching` do; DEADLINE_EXCEEDED if the deadline passed.
        """
        if condition is None:
            self._limits.check_ids(len(ids))
        elif ids:
            raise invalid("filter", "is set and so are ids; give one of the two")

        def delete(collection: CollectionBackend) -> DeletedRecords:
            if condition is None:
                return DeletedRecords(collection.delete(ids), [])
            deleted = collection.delete_matching(condition)
            return DeletedRecords(deleted, filter_warnings(collection, condition, deleted.deleted))

        await self._reembedding.wait_writable(name)
        writers = self._pool.writers(name)
        # The search for the records that match can be cancelled, and then no record is deleted.
        return await self._access.call(name, delete, caller, heavy=condition is not None, within=writers)


def filter_warnings(collection: CollectionBackend, condition: Filter | None, found: int) -> list[str]:
    """Return sentences that say why a filter without matches probably matches no record. Blocks.

    Args:
        collection: the collection.
        condition: the filter; None: no warnings.
        found: number of records that match the filter.
    """
    return [] if condition is None or found else collection.mismatches(condition)
