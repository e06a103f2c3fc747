"""Upsert records, whose texts are embedded if the caller gives no vectors, and delete records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from emberpc.server.collections import CollectionBackend, NewRecord, WriteResult
from emberpc.server.collections.filters import Filter
from emberpc.server.engine import Caller, Engine, Inference, InferenceRequest, Truncation
from emberpc.server.errors import invalid, items_of
from emberpc.server.pipelines.collection_access import CollectionAccess
from emberpc.server.pipelines.collection_model import collection_model
from emberpc.server.pipelines.embedding import Matrix, shape
from emberpc.server.pipelines.index_pool import IndexPool
from emberpc.server.pipelines.limits import EMPTY_RECORD, Limits
from emberpc.server.pipelines.reembedding import ReembeddingJobs


@dataclass(frozen=True)
class UpsertRequest:
    """Records to insert or replace.

    Attributes:
        collection: name of the collection.
        record_count: number of records.
        read_records: returns the records; runs in the pool, since metadata may take seconds to read. May be called a
            second time, see `CollectionAccess.use`; so may `read_vectors`.
        read_vectors: returns the records' vectors, float32 (records, dimensions). None: the texts are embedded.
        truncation: the truncation of texts that are too long for the model; None: that of the collection. Not used
            with vectors.
        expected_revisions: the revision that each record must have just before the write; 0: the record must be
            missing. None: no check.
    """

    collection: str
    record_count: int
    read_records: Callable[[], list[NewRecord]]
    read_vectors: Callable[[], Matrix] | None
    truncation: Truncation | None
    expected_revisions: Sequence[int] | None


@dataclass(frozen=True)
class UpsertedRecords:
    """The result of an upsert, and the inference of the records' texts (None if the caller gave vectors)."""

    result: WriteResult
    inference: Inference | None


@dataclass(frozen=True)
class DeletedRecords:
    """The result of a delete, and warnings.

    `warnings` are sentences that say why the filter probably matched no record. The list is empty without a filter, if
    a record was deleted, or if no reason was found.
    """

    result: WriteResult
    warnings: Sequence[str]


class RecordWriter:
    """Writes records to collections.

    Args:
        engine: embeds the records' texts.
        limits: limits of a call.
        pool: runs the blocking calls of the index.
        access: opens collections.
        reembedding: the reembedding jobs; writes wait while a job embeds the last records and switches.
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
        """Insert or replace records in one write: all or, after an error, none.

        A write that has begun runs to its end even if the caller leaves or the deadline passes.

        Raises:
            ServiceError: NOT_FOUND if there is no such collection, or if texts must be embedded and the collection's
                model is not served; INVALID_ARGUMENT for wrong records or vectors, or a wrong number of records;
                ABORTED if an expected revision differs; FAILED_PRECONDITION if texts must be embedded and the
                collection has no model or another model made its vectors, or if there are vectors and the collection
                changes its model during the call; RESOURCE_EXHAUSTED if too many writes or tokens wait, the deadline
                would probably pass, or the disk is full; DEADLINE_EXCEEDED if the deadline passes while the records are
                read or embedded; any other error of `CollectionAccess.open`, `Inferrer.infer` and
                `CollectionBackend.upsert`.
        """
        self._limits.check_count(request.record_count, "records", "record")
        return await self._access.use(
            request.collection,
            lambda collection: self._upsert(collection, request, caller),
            has_vectors=request.read_vectors is not None,
        )

    async def _upsert(self, collection: CollectionBackend, request: UpsertRequest, caller: Caller) -> UpsertedRecords:
        # The collection was opened before this wait, during which its model may change. If it changes,
        # `CollectionAccess.use` refuses the caller's vectors, which belong to the old model.
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
            self._limits.check_texts(texts, items_of("records", "text"), remedy=EMPTY_RECORD)
            truncation = request.truncation or Truncation(collection.spec.truncation)
            prompt, path = model.manifest.prompts.passage, items_of("records", "text")
            inference = await self._engine.inferrer.infer(
                InferenceRequest(model, texts, prompt, truncation, path, caller)
            )
            matrix = shape(inference.output, collection.spec.dimensions, unit=model.manifest.normalize)
        # `run` cancels a running call only if the argument `caller` is set. It is left out here, so a write that has
        # begun is completed even if the caller leaves or the deadline passes.
        upsert = partial(collection.upsert, records, matrix, request.expected_revisions)
        return UpsertedRecords(await self._pool.run(upsert, within=writers), inference)

    async def delete(self, name: str, ids: Sequence[str], condition: Filter | None, caller: Caller) -> DeletedRecords:
        """Delete the records with some ids, or the records that meet a filter, in one write.

        Args:
            name: name of the collection.
            ids: the ids, at most 10,000; must be empty if there is a filter. Missing ids are ignored.
            condition: the filter; None if there are ids.
            caller: the caller.

        Raises:
            ServiceError: NOT_FOUND if there is no such collection; INVALID_ARGUMENT if there are both ids and a filter,
                neither, or too many ids; RESOURCE_EXHAUSTED if too many writes wait or, for a filter, too many heavy
                calls; DEADLINE_EXCEEDED if the deadline passed; any other error of `CollectionAccess.call`,
                `CollectionBackend.delete` and `CollectionBackend.delete_matching`.
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
        # The argument `caller` is set: if the caller leaves while the index looks for records that meet the filter, the
        # search is cancelled, and no record is deleted.
        return await self._access.call(name, delete, caller, heavy=condition is not None, within=writers)


def filter_warnings(collection: CollectionBackend, condition: Filter | None, found: int) -> list[str]:
    """Return sentences that say why a filter probably matches no record of a collection; empty: no reason. Blocks.

    Args:
        collection: the collection.
        condition: the filter; None: there are no sentences.
        found: number of records that matched the filter; if it is not 0, there are no sentences.

    Raises:
        ServiceError: any error of `CollectionBackend.mismatches`.
    """
    return [] if condition is None or found else collection.mismatches(condition)
