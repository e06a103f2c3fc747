"""Cancelled calls of ReembedCollection and CancelReembedding leave no job half begun or half ended."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from emberpc.server.collections import CollectionBackend, CollectionSpec, Distance, NewRecord, StoredRecord
from emberpc.server.engine import Caller, Engine, Lane, Registry
from emberpc.server.errors import Code, ServiceError
from emberpc.server.index import Index
from emberpc.server.pipelines import reembedding
from emberpc.server.pipelines.collection_access import CollectionAccess
from emberpc.server.pipelines.index_pool import IndexPool
from emberpc.server.pipelines.limits import Limits
from emberpc.server.pipelines.records import RecordWriter, UpsertRequest
from emberpc.server.pipelines.reembedding import ReembeddingJobs
from waiting import Changes, until_idle


class SteeredIndex:
    """An index in which a test can delay, replace or break one method."""

    def __init__(self, index: Index) -> None:
        self.real = index
        #: Notified after each call of a method.
        self.changes = Changes()
        self.replaced: dict[str, Callable[..., object]] = {}

    def __getattr__(self, name: str) -> Any:
        found = self.replaced.get(name) or getattr(self.real, name)
        return self.changes.watched(found) if callable(found) else found

    def delay(self, name: str) -> tuple[threading.Event, threading.Event]:
        """Let a method wait before it runs; return the event of its call, and the event that lets it continue."""
        called, go_on = threading.Event(), threading.Event()
        method = getattr(self.real, name)

        def wait(*arguments: object, **keywords: object) -> object:
            called.set()
            assert go_on.wait(300)
            return method(*arguments, **keywords)

        self.replaced[name] = wait
        return called, go_on


class Steered:
    """Reembedding jobs, and a collection `c` of one record under the model `a`; the model `b` is there, too."""

    def __init__(self, index: Index, engine: Engine, pool: ThreadPoolExecutor) -> None:
        self.index = SteeredIndex(index)
        self.limits = Limits(100, 10_000, 2**24, 2**25, 4096)
        self.pool = IndexPool(pool, heavy=1)
        self.engine = engine
        self.jobs = ReembeddingJobs(engine, cast("Any", self.index), self.pool, self.limits)
        self.access = CollectionAccess(engine, cast("Any", self.index), self.pool)

    async def start(self) -> None:
        await self.jobs.start(self.index.get("c"), "b", 0)

    async def reembed(self, *_: object) -> None:
        """Reembed the collection, unless it is reembedded already."""
        if self.index.get("c").spec.model == "a":
            await self.start()
            await self.until_reembedded()

    async def until_reembedded(self) -> None:
        await self.index.changes.until(lambda: self.index.real.get("c").spec.model == "b")

    async def leave(self, call: asyncio.Task[None], delayed: tuple[threading.Event, threading.Event]) -> None:
        """Cancel a call once its delayed method runs, then let that method go on."""
        called, go_on = delayed
        assert await asyncio.to_thread(called.wait, 300)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        assert call.cancelled()
        go_on.set()


@pytest.fixture
def steered(tiny_bundle: Path, other_tiny_bundle: Path, tmp_path: Path) -> Iterator[Steered]:
    with ThreadPoolExecutor(4) as pool, closing(Index(tmp_path / "data")) as index:
        engine = Engine(Registry(pool), pool, workers=1, batch_tokens=512, max_queue_tokens=4096)
        with closing(engine):
            model = engine.registry.load("a", tiny_bundle)
            engine.registry.load("b", other_tiny_bundle)
            dimensions = model.manifest.dimensions
            index.create(CollectionSpec("c", dimensions, model="a", model_fingerprint=model.fingerprint))
            index.get("c").upsert([NewRecord("r", "a text")], np.ones((1, dimensions), dtype=np.float32))
            yield Steered(index, engine, pool)


async def test_a_reembedding_runs_though_its_starting_call_was_cancelled(steered: Steered) -> None:
    await steered.leave(asyncio.create_task(steered.start()), steered.index.delay("reembed"))
    await steered.until_reembedded()
    await steered.jobs.close()


async def test_a_cancel_reembedding_is_completed_though_its_call_was_cancelled(steered: Steered) -> None:
    steered.index.replaced["switch"] = lambda reembedding: False
    await steered.start()
    assert await steered.jobs.status("c") is not None
    await steered.leave(asyncio.create_task(steered.jobs.cancel("c")), steered.index.delay("cancel_reembedding"))
    steered.index.replaced.clear()
    await steered.index.changes.until(lambda: not steered.index.real.reembeddings())
    await steered.start()
    await steered.until_reembedded()
    await steered.jobs.close()


async def test_a_reembedding_without_a_model_name_uses_the_only_model(steered: Steered) -> None:
    steered.engine.registry.remove("a")
    collection = steered.index.get("c")
    await steered.jobs.start(collection, "", 0)
    await steered.until_reembedded()
    with pytest.raises(ServiceError, match="has vectors of model 'b' with 32 dimensions already") as refused:
        await steered.jobs.start(steered.index.get("c"), "", 0)
    assert refused.value.metadata["model"] == "b"
    await steered.jobs.close()


async def test_close_waits_for_a_start_whose_call_was_cancelled(steered: Steered) -> None:
    called, go_on = steered.index.delay("reembed")
    call = asyncio.create_task(steered.start())
    assert await asyncio.to_thread(called.wait, 300)
    call.cancel()
    closed = asyncio.create_task(steered.jobs.close())
    await until_idle()
    assert not closed.done()
    go_on.set()
    await asyncio.wait_for(closed, 300)


async def test_a_reembedding_continues_after_an_unexpected_error(
    steered: Steered, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(reembedding, "_PAUSE", 0.001)

    def fail(_: object) -> bool:
        del steered.index.replaced["switch"]
        raise RuntimeError("broken once")

    steered.index.replaced["switch"] = fail
    await steered.start()
    await steered.until_reembedded()
    await steered.jobs.close()
    assert "a step of the reembedding failed" in caplog.text


@pytest.mark.parametrize("has_vectors", [True, False])
async def test_a_write_that_waits_for_a_model_change_stores_no_vectors_of_the_old_model(
    steered: Steered, monkeypatch: pytest.MonkeyPatch, has_vectors: bool
) -> None:
    monkeypatch.setattr(steered.jobs, "wait_writable", steered.reembed)
    writer = RecordWriter(steered.engine, steered.limits, steered.pool, steered.access, steered.jobs)
    dimensions = steered.index.get("c").spec.dimensions
    matrix = np.ones((1, dimensions), dtype=np.float32)
    records = [NewRecord("new", "another text")]
    request = UpsertRequest("c", 1, lambda: records, (lambda: matrix) if has_vectors else None, None, None)
    call = writer.upsert(request, Caller("test", Lane.INTERACTIVE))
    if has_vectors:
        with pytest.raises(ServiceError, match="changed from model 'a' to 'b' while the call waited") as refused:
            await call
        assert refused.value.code is Code.FAILED_PRECONDITION
        assert steered.index.get("c").count() == 1
    else:
        assert (await call).result.inserted == 1
    await steered.jobs.close()


@pytest.mark.parametrize("has_vectors", [True, False])
async def test_a_call_with_vectors_is_not_repeated_after_a_model_change(steered: Steered, has_vectors: bool) -> None:
    models = []

    async def work(collection: CollectionBackend) -> int:
        models.append(collection.spec.model)
        await steered.reembed()
        return await asyncio.to_thread(collection.count)

    call = steered.access.use("c", work, has_vectors=has_vectors)
    if has_vectors:
        with pytest.raises(ServiceError, match="vectors of the call do not belong to it"):
            await call
        assert models == ["a"]
    else:
        assert await call == 1
        assert models == ["a", "b"]
    await steered.jobs.close()


async def test_a_reembedding_does_not_change_a_new_collection_of_the_same_name(steered: Steered) -> None:
    called, go_on = steered.index.delay("reembed")
    call = asyncio.create_task(steered.start())
    assert await asyncio.to_thread(called.wait, 300)
    steered.index.delete("c")
    other = CollectionSpec("c", 3, distance=Distance.EUCLIDEAN, m=32)
    steered.index.create(other)
    go_on.set()
    with pytest.raises(ServiceError, match="deleted") as refused:
        await call
    assert refused.value.code is Code.UNAVAILABLE
    assert steered.index.get("c").spec == other
    assert steered.index.reembeddings() == []


async def test_a_reembedding_keeps_a_setting_changed_at_its_start(steered: Steered) -> None:
    called, go_on = steered.index.delay("reembed")
    call = asyncio.create_task(steered.start())
    assert await asyncio.to_thread(called.wait, 300)
    steered.index.update("c", "end")
    go_on.set()
    await call
    await steered.until_reembedded()
    await steered.jobs.close()
    assert steered.index.get("c").spec.truncation == "end"


class OneRecord:
    """A reembedding of one record, which is read again after `rewind` until it has a new vector."""

    spec = CollectionSpec("c", 1, model="m")
    now = datetime.now(timezone.utc)
    record = StoredRecord("r", "text", "{}", "", 1, now, now)

    def __init__(self) -> None:
        self.unread = [self.record]
        self.taken: list[StoredRecord] = []

    def next(self, _: int) -> list[StoredRecord]:
        read, self.unread = self.unread, []
        return read

    def rewind(self) -> None:
        self.unread = [] if self.taken else [self.record]

    def take(self, records: list[StoredRecord], _: object) -> None:
        self.taken += records

    def source_revisions(self, ids: list[str]) -> dict[str, int]:
        return dict.fromkeys(ids, 1)


@pytest.mark.parametrize("rewound", [False, True])
async def test_a_record_that_failed_once_does_not_prevent_the_switch(
    monkeypatch: pytest.MonkeyPatch, rewound: bool
) -> None:
    """The record is tried again after some pauses, or when another failure makes the job read all records again."""
    monkeypatch.setattr(reembedding, "_PAUSE", 0.0)
    monkeypatch.setattr(reembedding, "_WAITS", 10**9 if rewound else 3)
    failures = [ServiceError(Code.INTERNAL, "for once")]
    parts = [([0], SimpleNamespace(output=np.ones((1, 1), dtype=np.float32)))]
    way, problems = OneRecord(), []

    class Embedder:
        model = SimpleNamespace(manifest=SimpleNamespace(normalize=False))

        async def embed(self, _: list[str]) -> Any:
            if failures:
                return SimpleNamespace(parts=[], failures={0: failures.pop()})
            return SimpleNamespace(parts=parts, failures={})

    def switch(_: object) -> bool:
        problems.append(job.problem)
        return True

    def source_revisions(ids: list[str]) -> dict[str, int]:
        if rewound:
            way.rewind()
        return dict.fromkeys(ids, 1)

    monkeypatch.setattr(reembedding._Job, "_embedder", lambda _: Embedder())
    monkeypatch.setattr(way, "source_revisions", source_revisions)
    with ThreadPoolExecutor(1) as threads:
        pool = IndexPool(threads, 1)
        job = reembedding._Job(None, SimpleNamespace(switch=switch), pool, None, way)  # type: ignore[arg-type]
        await asyncio.wait_for(job.task, 300)
    assert way.taken == [way.record]
    assert problems == [""]
