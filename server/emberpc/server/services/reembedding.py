"""ReembedCollection: records on their way to another model, in the background.

A job for each collection reads its records in the order of their writing, embeds
their texts under the new model, and hands them to the index, until none is left;
then the index switches. What is written meanwhile is embedded too. When only
that is left, writes wait for the moment that it takes, so that it comes to an
end however busy the collection is. A record that cannot be embedded keeps the
old model in place until it is changed or deleted; the others are not waited for.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

from emberpc.bundle import Task
from emberpc.server.collections import CollectionBackend, IndexBackend, ReembeddingBackend, StoredRecord
from emberpc.server.engine import Caller, Engine, Lane, Model, Truncation
from emberpc.server.errors import Code, ServiceError
from emberpc.server.services.binding import matches
from emberpc.server.services.bulk_embedding import GROUP_TEXTS, BulkEmbedder
from emberpc.server.services.forms import check_dimensions, shape
from emberpc.server.services.index_pool import IndexPool
from emberpc.server.services.requests import Limits
from emberpc.server.services.tasks import end
from emberpc.v1 import index_pb2 as pb

log = logging.getLogger(__name__)

#: Records that are embedded and written together: a few groups, so that every worker has one.
_RECORDS = 4 * GROUP_TEXTS
#: Seconds until another look, where something has to change first; longer each time that it has not.
_PAUSE, _LONGEST_PAUSE = 1.0, 60.0
#: What is wrong with the server, not with a text.
_ENDING = frozenset({Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED, Code.DEADLINE_EXCEEDED})
#: So often the places are tried to be changed before everything is looked through again.
_TRIES = 10

Result = TypeVar("Result")


class Reembedder:
    """The jobs of all collections.

    Args:
        engine: the models.
        index: the collections.
        pool: where the index's calls run.
        limits: how large a text may be.
    """

    def __init__(self, engine: Engine, index: IndexBackend, pool: IndexPool, limits: Limits) -> None:
        self._engine = engine
        self._index = index
        self._pool = pool
        self._limits = limits
        self._jobs: dict[str, _Job] = {}

    async def start(self, collection: CollectionBackend, model_name: str, dimensions: int) -> None:
        """Begin to take a collection's records over to another model.

        Raises:
            ServiceError: NOT_FOUND if the model is not served, INVALID_ARGUMENT for dimensions that it does not have,
                FAILED_PRECONDITION if nothing would change, as a job is under way, or as records have no text.
        """
        model = self._engine.model(model_name, Task.EMBEDDING, "model")
        check_dimensions(model, dimensions, "dimensions")
        spec = dataclasses.replace(
            collection.spec,
            model=model_name,
            model_fingerprint=model.fingerprint,
            dimensions=dimensions or model.manifest.dimensions,
        )
        if spec == collection.spec:
            raise ServiceError(
                Code.FAILED_PRECONDITION,
                f"collection {spec.name!r} is under {model_name!r} with {spec.dimensions} dimensions already",
                reason="SAME_MODEL",
                metadata={"collection": spec.name, "model": model_name},
            )
        # It looks at every record for one without a text.
        self._run(await self._pool.run(lambda: self._index.reembed(spec), heavy=True))

    async def resume(self) -> None:
        """Go on with what was under way when the server was last stopped."""
        for reembedding in await self._pool.run(self._index.reembeddings):
            log.info("collection %s: going on to %s", reembedding.spec.name, reembedding.spec.model)
            self._run(reembedding)

    async def cancel(self, name: str) -> None:
        """End a collection's job and throw away what it did; nothing if there is none."""
        job = self._jobs.pop(name, None)
        if job is not None:
            await end([job.task])
        await self._pool.run(lambda: self._index.cancel_reembedding(name))

    async def close(self) -> None:
        """End all jobs; they go on when the server is started again."""
        await end([job.task for job in self._jobs.values()])

    async def writable(self, name: str) -> None:
        """Wait while a collection is about to change places with its successor."""
        job = self._jobs.get(name)
        if job is not None:
            await job.writable.wait()

    async def status(self, name: str) -> pb.Reembedding | None:
        """Say how a collection's job stands; None if there is none."""
        job = self._jobs.get(name)
        if job is None:
            return None
        try:
            done, total = await self._pool.run(job.reembedding.counts)
        except ServiceError:  # it has just ended
            return None
        message = pb.Reembedding(
            model=job.reembedding.spec.model, done=min(done, total), total=total, problem=job.problem
        )
        message.start_time.FromDatetime(job.reembedding.started)
        return message

    def _run(self, reembedding: ReembeddingBackend) -> None:
        name = reembedding.spec.name
        job = self._jobs[name] = _Job(self._engine, self._index, self._pool, self._limits, reembedding)

        def forget(_: asyncio.Task[None]) -> None:
            if self._jobs.get(name) is job:
                del self._jobs[name]

        job.task.add_done_callback(forget)


class _Job:
    """One collection's way to another model."""

    def __init__(
        self, engine: Engine, index: IndexBackend, pool: IndexPool, limits: Limits, reembedding: ReembeddingBackend
    ) -> None:
        self._engine = engine
        self._index = index
        self._pool = pool
        self._limits = limits
        self.reembedding = reembedding
        #: Why it does not go on; empty: it does.
        self.problem = ""
        self.writable = asyncio.Event()
        self.writable.set()
        #: Records that could not be embedded: their revisions, and why.
        self._failed: dict[str, tuple[int, str]] = {}
        self._tries = 0
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        name, pause = self.reembedding.spec.name, _PAUSE
        try:
            while True:
                try:
                    if await self._step():
                        break
                    pause = _PAUSE
                except ServiceError as error:
                    if error.reason == "CLOSED":
                        log.info("collection %s: the way to another model ended: %s", name, error.message)
                        return
                    self._say(error.message)
                    # Some may have been given out and not taken.
                    self.reembedding.rewind()
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, _LONGEST_PAUSE)
            log.info("collection %s is under %s now", name, self.reembedding.spec.model)
        except Exception:
            log.exception("collection %s: the way to another model ended", name)
        finally:
            self.writable.set()

    async def _step(self) -> bool:
        """Take some records over; return whether the new collection is in place."""
        records = await self._in_pool(self.reembedding.next, _RECORDS)
        if records:
            if len(records) == _RECORDS:
                self.writable.set()
            await self._take(records)
            return False
        await self._see_to_failed()
        if self._failed:
            self.writable.set()
            await asyncio.sleep(_PAUSE)
            return False
        if await self._in_pool(self._index.switch, self.reembedding):
            return True
        # There was a write in between: let the next try be without.
        self.writable.clear()
        self._tries += 1
        if self._tries % _TRIES == 0:
            self.writable.set()
            self.reembedding.rewind()
            await asyncio.sleep(_PAUSE)
        return False

    async def _take(self, records: Sequence[StoredRecord]) -> None:
        """Embed records and hand them over."""
        embedder = self._embedder()
        groups = [records[i : i + GROUP_TEXTS] for i in range(0, len(records), GROUP_TEXTS)]
        tasks = [asyncio.create_task(embedder.embed([record.text for record in group])) for group in groups]
        try:
            found = await asyncio.gather(*tasks)
        finally:
            await end(tasks)
        if not self._failed:
            self._say("")
        dimensions, unit = self.reembedding.spec.dimensions, embedder.model.manifest.normalize
        for group, embedded in zip(groups, found, strict=True):
            for places, inference in embedded.parts:
                matrix = shape(inference.output, dimensions, unit=unit)
                await self._in_pool(self.reembedding.take, [group[i] for i in places], matrix)
            for i, failure in embedded.failures.items():
                self._failed[group[i].id] = (group[i].revision, failure.message)

    def _say(self, problem: str) -> None:
        if problem and problem != self.problem:
            log.warning("collection %s stays under its model: %s", self.reembedding.spec.name, problem)
        self.problem = problem
        if problem:
            # Nobody is to wait for what may take long.
            self.writable.set()

    async def _in_pool(self, work: Callable[..., Result], *arguments: object) -> Result:
        return await self._pool.run(lambda: work(*arguments))

    def _embedder(self) -> BulkEmbedder:
        spec = self.reembedding.spec
        model: Model = self._engine.model(spec.model, Task.EMBEDDING)
        if not matches(model, spec):  # a job of the old scheme goes on; the collection is bound by the new one later
            message = f"model {spec.model!r} is another one than when this began; serve that, or cancel and begin anew"
            raise ServiceError(Code.UNAVAILABLE, message, reason="MODEL_MISMATCH")
        return BulkEmbedder(
            self._engine,
            self._limits,
            model,
            model.manifest.prompts.passage,
            Truncation(spec.truncation),
            Caller("reembedding", Lane.BULK),
            f"reembedding of {spec.name}",
            ending=_ENDING,
        )

    async def _see_to_failed(self) -> None:
        """Forget the failures of records that were changed or deleted since; say what is wrong with the others."""
        if not self._failed:
            return
        present = await self._in_pool(self.reembedding.source_revisions, list(self._failed))
        self._failed = {key: each for key, each in self._failed.items() if present.get(key) == each[0]}
        problem = ""
        if self._failed:
            record_id, (_, why) = next(iter(self._failed.items()))
            one = len(self._failed) == 1
            problem = (
                f"{len(self._failed)} record{'' if one else 's'} cannot be embedded: change or delete "
                f"{'it' if one else 'them'}, such as {record_id!r}: {why}"
            )
        self._say(problem)
