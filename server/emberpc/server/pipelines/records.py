"""Upsert records, with an embedding of their texts if the caller gives no vectors, and delete records."""

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
        truncation: the truncation of long texts; None: that of the collection.
        expected_revisions: the revision that each record must have now, 0 for a missing record; None: no check.
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
    """The result of a delete, and `warnings`: sentences that give probable reasons why the filter matched no record."""

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
        """Insert or replace records, in one write. A write that has begun runs to its end even if the caller leaves.

        Raises:
            ServiceError: NOT_FOUND if the collection, or its model for texts, does not exist; INVALID_ARGUMENT for
                wrong records or vectors; ABORTED if an expected revision differs; FAILED_PRECONDITION if the texts must
                be embedded and the collection has no model or another one is served, or if there are vectors and the
                collection changes its model meanwhile; RESOURCE_EXHAUSTED if too many writes or tokens wait, or the
                disk is full; DEADLINE_EXCEEDED if the deadline passes before the write begins; any other error of
                `Inferrer.infer` and `CollectionBackend.upsert`.
        """
        self._limits.check_count(request.record_count, "records", "record")
        return await self._access.use(
            request.collection,
            lambda collection: self._upsert(collection, request, caller),
            has_vectors=request.read_vectors is not None,
        )

    async def _upsert(self, collection: CollectionBackend, request: UpsertRequest, caller: Caller) -> UpsertedRecords:
        # The collection must be opened before this wait: vectors of the request belong to the model of that moment.
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
        # The pool does not get the caller, so a write that has begun runs to its end if the caller leaves.
        upsert = partial(collection.upsert, records, matrix, request.expected_revisions)
        return UpsertedRecords(await self._pool.run(upsert, within=writers), inference)

    async def delete(self, name: str, ids: Sequence[str], condition: Filter | None, caller: Caller) -> DeletedRecords:
        """Delete the records with some ids, or the records that meet a filter.

        Args:
            name: name of the collection.
            ids: the ids, at most 10,000; must be empty if there is a filter.
            condition: the filter; None if there are ids.
            caller: the caller.

        Raises:
            ServiceError: NOT_FOUND if there is no such collection; INVALID_ARGUMENT if there are both ids and a filter,
                neither, or too many ids; RESOURCE_EXHAUSTED if too many writes wait or, for a filter, too many heavy
                calls; DEADLINE_EXCEEDED if the deadline passed; any other error of `CollectionBackend.delete` and
                `CollectionBackend.delete_matching`.
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
        # The pool gets the caller: if the caller leaves while the records that meet the filter are searched for, no
        # record is deleted.
        return await self._access.call(name, delete, caller, heavy=condition is not None, within=writers)


def filter_warnings(collection: CollectionBackend, condition: Filter | None, found: int) -> list[str]:
    """Return sentences that say why a filter probably matches no record of a collection. Blocks.

    Args:
        collection: the collection.
        condition: the filter; None: there are no sentences.
        found: number of records that matched the filter; with more than 0, there are no sentences.

    Raises:
        ServiceError: any error of `CollectionBackend.mismatches`.
    """
    return [] if condition is None or found else collection.mismatches(condition)
