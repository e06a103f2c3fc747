"""Reembed collections in the background: replace the vectors of all records by those of another model.

A collection that is reembedded has a job. The job reads the records in the order in which they were written, embeds
their texts with the new model, and stores the vectors in the index. Records that are written meanwhile are embedded
too. When all records have new vectors, the index switches to the new vectors. If a new record prevents the switch,
further writes wait while the job embeds this record and tries again, so that the job can end in a busy collection. If a
record cannot be embedded, the job continues with the other records, and tries the record again about once a minute.
The collection keeps its old model until the record is embedded, changed or deleted.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, TypeVar

from emberpc.bundle import Task
from emberpc.server.collections import CollectionBackend, IndexBackend, ReembeddingBackend, StoredRecord
from emberpc.server.engine import Caller, Engine, Lane, Model, Truncation
from emberpc.server.errors import Code, ServiceError
from emberpc.server.pipelines.bulk_embedding import GROUP_TEXTS, SERVER_ERRORS, BulkEmbedder
from emberpc.server.pipelines.cancel_tasks import cancel_tasks
from emberpc.server.pipelines.collection_model import is_model_of
from emberpc.server.pipelines.embedding import check_dimensions, shape
from emberpc.server.pipelines.index_pool import IndexPool
from emberpc.server.pipelines.limits import Limits

log = logging.getLogger(__name__)

#: Maximum number of records that a step of a job embeds: a few groups, so that several workers have texts.
_RECORDS = 4 * GROUP_TEXTS
#: Seconds before a failed step is tried again: the pause after the first failure, which is doubled after each further
#: failure in a row, and the longest pause. `_PAUSE` is also the wait while some records cannot be embedded, and the
#: wait after each `_SWITCH_TRIES` failed switches.
_PAUSE, _LONGEST_PAUSE = 1.0, 60.0
#: After each further this many failed switches, the job reads all records again, in case it has missed one, and lets
#: writes through.
_SWITCH_TRIES = 10
#: Number of pauses of `_PAUSE` seconds for records that cannot be embedded, after which the job tries them again.
_WAITS = 60

Result = TypeVar("Result")


@dataclass(frozen=True)
class ReembeddingStatus:
    """The progress of a job.

    Attributes:
        model: name of the new model.
        done: number of records with new vectors, at most `total`. Records that were deleted meanwhile may be counted.
        total: number of records of the collection.
        problem: why the job cannot end for now: the latest error of a step, or the records that cannot be embedded.
            Empty: there is no problem.
        started: when the reembedding began; a restart of the server does not change it.
    """

    model: str
    done: int
    total: int
    problem: str
    started: datetime


class ReembeddingJobs:
    """Runs the reembedding jobs of all collections, at most one for each collection. Use from one event loop only.

    Args:
        engine: the models.
        index: the collections.
        pool: runs the blocking calls of the index.
        limits: limits of a text.
    """

    def __init__(self, engine: Engine, index: IndexBackend, pool: IndexPool, limits: Limits) -> None:
        self._engine = engine
        self._index = index
        self._pool = pool
        self._limits = limits
        self._jobs: dict[str, _Job] = {}
        #: Tasks that start or cancel a job, as long as they run; `close` waits for them.
        self._changes: set[asyncio.Task[None]] = set()

    async def start(self, collection: CollectionBackend, model_name: str, dimensions: int) -> None:
        """Start the job that reembeds a collection with another model; return when the job has begun.

        Args:
            collection: the collection.
            model_name: name of the new model; empty: the only embedding model.
            dimensions: dimensions of the new vectors; 0: all dimensions of the model.

        Raises:
            ServiceError: NOT_FOUND if the model is not served; INVALID_ARGUMENT for dimensions that the model does not
                support, or if the name is empty and several embedding models are served; UNAVAILABLE if the collection
                was deleted or replaced meanwhile; FAILED_PRECONDITION if the model is no embedding model, the name is
                empty and no embedding model is served, the collection has this model and these dimensions already, a
                job of the collection exists, or a record has no text; RESOURCE_EXHAUSTED if too many heavy calls wait
                or the disk is full; UNIMPLEMENTED if the index backend cannot reembed; any other error of
                `IndexBackend.reembed`.
        """
        model = self._engine.model(model_name, Task.EMBEDDING, "model")
        check_dimensions(model, dimensions, "dimensions")
        spec, fingerprint = collection.spec, model.fingerprint
        wanted = dimensions or model.manifest.dimensions
        if (spec.model, spec.model_fingerprint, spec.dimensions) == (model.name, fingerprint, wanted):
            raise ServiceError(
                Code.FAILED_PRECONDITION,
                f"collection {spec.name!r} has vectors of model {model.name!r} with {spec.dimensions} dimensions "
                "already; name another model or other dimensions",
                reason="SAME_MODEL",
                metadata={"collection": spec.name, "model": model.name},
            )
        begin = partial(self._index.reembed, collection, model=model.name, fingerprint=fingerprint, dimensions=wanted)
        # A heavy call, since the check that every record has a text may take long.
        begun = await self._pool.submit(begin, heavy=True)
        await self._to_its_end(self._run_begun(begun))

    async def resume(self) -> None:
        """Continue the jobs that had not ended when the server stopped. Call this once, at the start of the server."""
        for reembedding in await self._pool.run(self._index.reembeddings):
            log.info("collection %s: resuming the reembedding with %s", reembedding.spec.name, reembedding.spec.model)
            self._run(reembedding)

    async def cancel(self, name: str) -> None:
        """Cancel the job of the collection with a name, and delete the new vectors; do nothing if there is no job.

        The cancellation runs to its end even if the caller leaves.
        """
        await self._to_its_end(self._cancel(name))

    async def _cancel(self, name: str) -> None:
        job = self._jobs.pop(name, None)
        if job is not None:
            await cancel_tasks([job.task])
        await self._pool.run(lambda: self._index.cancel_reembedding(name))

    async def close(self) -> None:
        """Stop all jobs and wait for their ends. After the next start of the server, `resume` continues the jobs."""
        await asyncio.gather(*self._changes, return_exceptions=True)
        await cancel_tasks([job.task for job in self._jobs.values()])

    async def wait_writable(self, name: str) -> None:
        """Wait until the collection with a name accepts writes.

        Writers must call this before each write, since the index itself does not delay writes. The wait lasts while the
        job embeds the last records and tries to switch; `_Job._step` says when it ends. Without a job, there is no
        wait.
        """
        job = self._jobs.get(name)
        if job is not None:
            await job.writable.wait()

    async def status(self, name: str) -> ReembeddingStatus | None:
        """Return the progress of the job of the collection with a name.

        None if there is no job, or if its progress cannot be read, as when the job has just ended.
        """
        job = self._jobs.get(name)
        if job is None:
            return None
        try:
            done, total = await self._pool.run(job.reembedding.counts)
        except ServiceError:  # the job has just ended
            return None
        reembedding = job.reembedding
        return ReembeddingStatus(reembedding.spec.model, min(done, total), total, job.problem, reembedding.started)

    async def _to_its_end(self, change: Coroutine[Any, Any, None]) -> None:
        """Await `change`, the start or cancellation of a job, which runs to its end even if the caller leaves.

        If `change` ended early, the index and `self._jobs` could disagree about the job.
        """
        task = asyncio.create_task(change)
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)
        await asyncio.shield(task)

    async def _run_begun(self, begun: Future[ReembeddingBackend]) -> None:
        self._run(await asyncio.wrap_future(begun))

    def _run(self, reembedding: ReembeddingBackend) -> None:
        name = reembedding.spec.name
        job = self._jobs[name] = _Job(self._engine, self._index, self._pool, self._limits, reembedding)

        def remove(_: asyncio.Task[None]) -> None:
            if self._jobs.get(name) is job:
                del self._jobs[name]

        job.task.add_done_callback(remove)


class _Job:
    """The job that reembeds one collection.

    The constructor starts the job in `task`. The job ends when the collection has switched, when the job is cancelled,
    or when the collection or the index is closed or the collection is deleted. After any other error the job pauses and
    tries again, without end.
    """

    def __init__(
        self, engine: Engine, index: IndexBackend, pool: IndexPool, limits: Limits, reembedding: ReembeddingBackend
    ) -> None:
        self._engine = engine
        self._index = index
        self._pool = pool
        self._limits = limits
        self.reembedding = reembedding
        #: As `ReembeddingStatus.problem`.
        self.problem = ""
        self.writable = asyncio.Event()
        self.writable.set()
        #: The records that could not be embedded: revision and error message of each, by id.
        self._failed: dict[str, tuple[int, str]] = {}
        self._switch_tries = 0
        self._waits = 0
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        name, pause = self.reembedding.spec.name, _PAUSE
        try:
            while True:
                try:
                    if await self._step():
                        break
                    pause = _PAUSE
                    continue
                except ServiceError as error:
                    if error.reason == "CLOSED":
                        log.info("collection %s: the reembedding ended: %s", name, error.message)
                        return
                    self._set_problem(error.message)
                except Exception:
                    log.exception("collection %s: a step of the reembedding failed", name)
                    self._set_problem("the server made an error; its log says which")
                # The failed step may have read records that it did not store, so the job starts again at the first
                # record; records with new vectors are skipped.
                self.reembedding.rewind()
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
            log.info("collection %s has the vectors of model %s now", name, self.reembedding.spec.model)
        finally:
            self.writable.set()

    async def _step(self) -> bool:
        """Do the next step of the job: embed and store up to 256 records or, if none remains, try to switch.

        If some records cannot be embedded, the step waits a second and does not switch. After each 60 of these steps,
        the job reads all records again, and so tries the failed records again. After a failed switch, writes wait until
        a step reads 256 records, the job has a problem or ends, or the number of failed switches is a multiple of ten.

        Returns:
            Whether the collection has switched, so that the job is done.

        Raises:
            ServiceError: any error of `_embed_and_store`, of the index, or of the reembedding. After
                `self.reembedding.rewind`, the step can be tried again, unless the reason is CLOSED.
        """
        records = await self._in_pool(self.reembedding.next, _RECORDS)
        if records:
            if len(records) == _RECORDS:
                self.writable.set()
            await self._embed_and_store(records)
            return False
        await self._update_failed()
        if self._failed:
            self.writable.set()
            await asyncio.sleep(_PAUSE)
            self._waits += 1
            if self._waits % _WAITS == 0:
                self.reembedding.rewind()  # the cause of the failures may have passed
            return False
        if await self._in_pool(self._index.switch, self.reembedding):
            return True
        # Probably a record was written meanwhile. Writes wait from now on, so that a later switch can succeed.
        self.writable.clear()
        self._switch_tries += 1
        if self._switch_tries % _SWITCH_TRIES == 0:
            self.writable.set()
            self.reembedding.rewind()
            await asyncio.sleep(_PAUSE)
        return False

    async def _embed_and_store(self, records: Sequence[StoredRecord]) -> None:
        """Embed the texts of records, and store the records with their new vectors.

        A record that cannot be embedded is noted in `self._failed` instead. If no record failed before this call, or
        none does after it, the problem of the job is cleared, since the model works.

        Raises:
            ServiceError: NOT_FOUND if no model with the name of the new model is served; FAILED_PRECONDITION if the
                served model is no embedding model; UNAVAILABLE if it has another fingerprint than the new model; any
                error of the index, or an error of the engine with a code of `SERVER_ERRORS`.
        """
        embedder = self._embedder()
        groups = [records[i : i + GROUP_TEXTS] for i in range(0, len(records), GROUP_TEXTS)]
        tasks = [asyncio.create_task(embedder.embed([record.text for record in group])) for group in groups]
        try:
            embedded_groups = await asyncio.gather(*tasks)
        finally:
            await cancel_tasks(tasks)
        if not self._failed:
            self._set_problem("")
        dimensions, unit = self.reembedding.spec.dimensions, embedder.model.manifest.normalize
        for group, embedded in zip(groups, embedded_groups, strict=True):
            for indexes, inference in embedded.parts:
                matrix = shape(inference.output, dimensions, unit=unit)
                stored = [group[i] for i in indexes]
                await self._in_pool(self.reembedding.take, stored, matrix)
                for record in stored:
                    self._failed.pop(record.id, None)  # it may have failed before a rewind
            for i, failure in embedded.failures.items():
                self._failed[group[i].id] = (group[i].revision, failure.message)
        if not self._failed:
            self._set_problem("")

    def _set_problem(self, problem: str) -> None:
        if problem and problem != self.problem:
            log.warning("collection %s keeps its model: %s", self.reembedding.spec.name, problem)
        self.problem = problem
        if problem:
            # The problem may last, so writes must not wait for it.
            self.writable.set()

    async def _in_pool(self, work: Callable[..., Result], *arguments: object) -> Result:
        return await self._pool.run(lambda: work(*arguments))

    def _embedder(self) -> BulkEmbedder:
        spec = self.reembedding.spec
        model: Model = self._engine.model(spec.model, Task.EMBEDDING)
        # An older version of the server may have begun the job, with the legacy fingerprint of the model. Then the job
        # continues, and `CollectionAccess.open` binds the collection to the present fingerprint after the switch.
        if not is_model_of(spec, model):
            message = f"model {spec.model!r} is another one than when this began; serve that, or cancel and begin again"
            raise ServiceError(Code.UNAVAILABLE, message, reason="MODEL_MISMATCH")
        return BulkEmbedder(
            self._engine,
            self._limits,
            model,
            model.manifest.prompts.passage,
            Truncation(spec.truncation),
            Caller("reembedding", Lane.BULK),
            f"reembedding of {spec.name}",
            ending=SERVER_ERRORS,
        )

    async def _update_failed(self) -> None:
        """Forget the failed records that were changed or deleted since, and set the problem of the job accordingly.

        If no record failed before, do nothing. If no failed record remains, the problem is cleared.
        """
        if not self._failed:
            return
        revisions = await self._in_pool(self.reembedding.source_revisions, list(self._failed))
        self._failed = {key: each for key, each in self._failed.items() if revisions.get(key) == each[0]}
        problem = ""
        if self._failed:
            record_id, (_, message) = next(iter(self._failed.items()))
            single = len(self._failed) == 1
            problem = (
                f"{len(self._failed)} record{'' if single else 's'} cannot be embedded: change or delete "
                f"{'it' if single else 'them'}, such as {record_id!r}: {message}"
            )
        self._set_problem(problem)
