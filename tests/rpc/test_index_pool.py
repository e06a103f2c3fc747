"""Blocking calls of the index: cancelled ones end, heavy ones leave threads to others, and queues are limited."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from time import perf_counter
from typing import Any

import grpc.aio
import numpy as np
import pytest

from aio_server import channel_to
from emberpc.server import cancellation
from emberpc.server.collections import CollectionSpec
from emberpc.server.engine import Caller, Engine, Registry
from emberpc.server.errors import Code, ServiceError
from emberpc.server.handlers import Handlers
from emberpc.server.index import Collection, Index
from emberpc.server.index.storage.database import translated
from emberpc.server.pipelines import index_pool
from emberpc.server.pipelines.index_pool import IndexPool
from emberpc.server.pipelines.limits import Limits
from emberpc.server.pipelines.reembedding import ReembeddingJobs
from emberpc.server.pipelines.slots import Slots
from emberpc.server.services.index import IndexService, add_index_service
from emberpc.v1 import filter_pb2, index_pb2_grpc, types_pb2
from emberpc.v1 import index_pb2 as pb
from index_helpers import DIMENSIONS, records, vectors
from waiting import Changes, until_idle

THREADS, HEAVY = 6, 2
ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"


@pytest.fixture
def changes(monkeypatch: pytest.MonkeyPatch) -> Changes:
    """Notified when a call takes a slot, begins to wait for one, or releases one."""
    found = Changes()
    found.watch(monkeypatch, Slots, "take", "release")
    return found


async def test_slots_are_given_in_order_and_not_to_cancelled_waiters() -> None:
    slots = Slots(1, 2, "calls", retry_seconds=3)
    await slots.take()
    first, second = (asyncio.create_task(slots.take()) for _ in range(2))
    await until_idle()
    with pytest.raises(ServiceError, match="1 calls are under way and 2 wait") as refused:
        await slots.take()
    assert (refused.value.code, refused.value.retry_after) == (Code.RESOURCE_EXHAUSTED, 3)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    assert slots.waiting == 1
    slots.release()
    await second
    assert not slots.idle
    slots.release()
    assert slots.idle


async def test_a_slot_of_a_waiter_cancelled_meanwhile_is_passed_on() -> None:
    slots = Slots(1, 2, "calls")
    await slots.take()
    leaving, staying = (asyncio.create_task(slots.take()) for _ in range(2))
    await until_idle()
    slots.release()
    leaving.cancel()
    await staying
    slots.release()
    # The same for a waiter that is cancelled before it gets its slot.
    await slots.take()
    leaving = asyncio.create_task(slots.take())
    await until_idle()
    leaving.cancel()
    slots.release()
    await asyncio.gather(leaving, return_exceptions=True)
    assert slots.idle


async def test_a_cancelled_call_stops_and_a_cancelled_waiting_call_does_not_begin(changes: Changes) -> None:
    began: list[str] = []
    entered, ended = threading.Event(), threading.Event()

    def work(name: str) -> None:
        began.append(name)
        entered.set()
        try:
            while True:
                cancellation.check()
        finally:
            ended.set()

    with ThreadPoolExecutor(1) as executor:
        pool = IndexPool(executor, heavy=1)
        running = asyncio.create_task(pool.run(lambda: work("running"), Caller(), heavy=True))
        await asyncio.to_thread(entered.wait, 300)
        waiting = [
            asyncio.create_task(pool.run(lambda: work("in the pool"), Caller())),
            asyncio.create_task(pool.run(lambda: work("heavy"), Caller(), heavy=True)),
        ]
        await until_idle()
        for task in (*waiting, running):
            task.cancel()
        await asyncio.gather(*waiting, running, return_exceptions=True)
        assert await asyncio.to_thread(ended.wait, 300)
        await changes.until(lambda: pool.heavy.idle)
    assert began == ["running"]


async def test_a_slot_is_free_when_its_thread_ends_and_not_when_the_call_is_cancelled(changes: Changes) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def work() -> None:
        entered.set()
        assert go_on.wait(300)

    with ThreadPoolExecutor(2) as executor:
        pool = IndexPool(executor, heavy=1)
        writers = pool.writers("c")
        task = asyncio.create_task(pool.run(work, heavy=True, within=writers))
        await asyncio.to_thread(entered.wait, 300)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert not pool.heavy.idle
        assert not writers.idle
        go_on.set()
        await changes.until(lambda: pool.heavy.idle and writers.idle)
        assert await pool.run(lambda: 5, heavy=True) == 5


async def test_a_deadline_ends_the_work_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    now, checks = 0.0, 0

    def work() -> None:
        nonlocal now, checks
        while True:
            cancellation.check()
            checks += 1
            now += 10

    monkeypatch.setattr(cancellation, "monotonic", lambda: now)
    with ThreadPoolExecutor(1) as executor, pytest.raises(ServiceError) as stopped:
        await IndexPool(executor, heavy=1).run(work, Caller(deadline=perf_counter() + 1000))
    assert stopped.value.code is Code.DEADLINE_EXCEEDED
    assert 0 < checks <= 100


async def test_close_ends_running_work_and_does_not_block_the_event_loop() -> None:
    entered = threading.Event()

    def work() -> None:
        entered.set()
        while True:
            cancellation.check()

    with ThreadPoolExecutor(1) as executor:
        pool = IndexPool(executor, heavy=1)
        # The handler is cancelled, and its thread has not noticed it yet when the pool is closed.
        running = asyncio.create_task(pool.run(work, Caller()))
        await asyncio.to_thread(entered.wait, 300)
        await pool.close()
        with pytest.raises(ServiceError, match="stopped"):
            await running
        with pytest.raises(ServiceError, match="stopped"):
            await pool.run(work, Caller())


async def test_unused_slots_of_writers_are_removed(changes: Changes) -> None:
    with ThreadPoolExecutor(1) as executor:
        pool = IndexPool(executor, heavy=1)
        for name in map(str, range(100)):
            await pool.run(lambda: None, within=pool.writers(name))
            await changes.until(lambda name=name: pool.writers(name).idle)  # type: ignore[misc]
        assert len(pool._writers) == 1


class Served:
    """A server of two collections; counts of `endless` never end in SQLite, like a long count with a wide filter."""

    def __init__(self, pool: IndexPool, stub: index_pb2_grpc.IndexServiceAsyncStub) -> None:
        self.pool, self.stub = pool, stub

    def count(self, **options: Any) -> grpc.aio.UnaryUnaryCall[Any, Any]:
        return self.stub.CountRecords(pb.CountRecordsRequest(collection="endless", filter=EXISTS), **options)


EXISTS = filter_pb2.Filter(existence=filter_pb2.Existence(field="id"))


@pytest.fixture
async def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Served]:
    real = Collection.count

    def count(self: Collection, condition: Any = None) -> int:
        if self.spec.name == "endless" and condition is not None:
            with self._calls.enter(), translated("endless"):
                return int(self._store._connection().execute(ENDLESS).fetchone()[0])
        return real(self, condition)

    monkeypatch.setattr(Collection, "count", count)
    with closing(Index(tmp_path)) as index, ThreadPoolExecutor(THREADS) as executor:
        for name in ("endless", "other"):
            index.create(CollectionSpec(name, DIMENSIONS)).upsert(records(*map(str, range(20))), vectors(20, seed=1))
        pool = IndexPool(executor, heavy=HEAVY)
        engine = Engine(Registry(executor), executor, workers=1, batch_tokens=1000, max_queue_tokens=1000)
        limits = Limits(1000, 1000, 2**24, 2**25, 1000)
        server = grpc.aio.server()
        service = IndexService(engine, index, pool, limits, ReembeddingJobs(engine, index, pool, limits))
        Handlers(server).add(add_index_service, service)
        async with channel_to(server) as channel:
            yield Served(pool, index_pb2_grpc.IndexServiceStub(channel))
        await pool.close()
        engine.close()


def vector(values: np.ndarray) -> types_pb2.Vectors:
    return types_pb2.Vectors(data=values.astype("<f4").tobytes(), rows=len(values), dimensions=DIMENSIONS)


async def test_writes_reads_and_searches_run_beside_heavy_calls_that_can_be_cancelled(
    served: Served, changes: Changes
) -> None:
    counts = [served.count() for _ in range(8)]
    await changes.until(lambda: served.pool.heavy.waiting == 8 - HEAVY)
    stub = served.stub
    for name in ("other", "endless"):
        await stub.UpsertRecords(
            pb.UpsertRecordsRequest(collection=name, records=[pb.Record(id="new")], vectors=vector(vectors(1)))
        )
        got = await stub.BatchGetRecords(pb.BatchGetRecordsRequest(collection=name, ids=["new"]))
        assert [record.id for record in got.records] == ["new"]
        query = pb.SearchQuery(vector=vector(vectors(1)))
        found = await stub.Search(pb.SearchRequest(collection=name, queries=[query], top_k=1))
        assert [hit.record.id for hit in found.results[0].hits] == ["new"]
    assert not any(call.done() for call in counts)
    for call in counts:
        call.cancel()
    await changes.until(lambda: served.pool.heavy.idle)
    other = pb.CountRecordsRequest(collection="other", filter=EXISTS)
    assert (await stub.CountRecords(other)).count == 20


async def test_heavy_calls_end_at_their_deadlines(served: Served, changes: Changes) -> None:
    counts = [served.count(timeout=0.2) for _ in range(8)]
    for each in await asyncio.gather(*counts, return_exceptions=True):
        assert isinstance(each, grpc.aio.AioRpcError)
        assert each.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await changes.until(lambda: served.pool.heavy.idle)


async def test_filtered_searches_wait_like_heavy_calls_and_can_be_cancelled(served: Served, changes: Changes) -> None:
    counts = [served.count() for _ in range(HEAVY)]
    await changes.until(lambda: not served.pool.heavy._free)
    query = pb.SearchQuery(vector=vector(vectors(1)))
    request = pb.SearchRequest(collection="other", queries=[query], filter=EXISTS, top_k=20)
    gone, kept = served.stub.Search(request), served.stub.Search(request)
    await changes.until(lambda: served.pool.heavy.waiting == 1)
    gone.cancel()
    for call in counts:
        call.cancel()
    assert len((await kept).results[0].hits) == 20
    await changes.until(lambda: served.pool.heavy.idle)


@pytest.mark.parametrize("rpc", ["CountRecords", "ListRecords", "DeleteRecords", "Search"])
async def test_explaining_a_filter_runs_as_a_heavy_call_and_can_be_cancelled(
    served: Served, changes: Changes, monkeypatch: pytest.MonkeyPatch, rpc: str
) -> None:
    began, free = threading.Event(), []

    def endless(self: Collection, condition: Any) -> list[str]:
        free.append(served.pool.heavy._free)
        began.set()
        while True:
            cancellation.check()

    monkeypatch.setattr(Collection, "mismatches", endless)
    nothing = filter_pb2.Filter(
        comparison=filter_pb2.Comparison(
            field="id", operator=filter_pb2.COMPARISON_OPERATOR_GREATER, value=filter_pb2.FilterValue(number_value=1)
        )
    )
    requests = {
        "CountRecords": pb.CountRecordsRequest(collection="other", filter=nothing),
        "ListRecords": pb.ListRecordsRequest(collection="other", filter=nothing),
        "DeleteRecords": pb.DeleteRecordsRequest(collection="other", filter=nothing),
        "Search": pb.SearchRequest(
            collection="other", queries=[pb.SearchQuery(vector=vector(vectors(1)))], filter=nothing
        ),
    }
    call = getattr(served.stub, rpc)(requests[rpc])
    assert await asyncio.to_thread(began.wait, 300)
    # The slot of the search itself may not be free again yet.
    assert free[0] < HEAVY
    call.cancel()
    await changes.until(lambda: served.pool.heavy.idle)


async def test_too_many_heavy_calls_are_refused_with_a_retry_delay(
    served: Served, changes: Changes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served.pool.heavy, "_max_waiting", 3)
    counts = [served.count() for _ in range(HEAVY + 3)]
    await changes.until(lambda: served.pool.heavy.waiting == 3)
    query = pb.SearchQuery(vector=vector(vectors(1)))
    for refused in (
        served.count(),
        served.stub.ClusterRecords(pb.ClusterRecordsRequest(collection="other", cluster_count=2)),
        served.stub.DeleteRecords(pb.DeleteRecordsRequest(collection="other", filter=EXISTS)),
        served.stub.ListRecords(pb.ListRecordsRequest(collection="other", filter=EXISTS)),
    ):
        with pytest.raises(grpc.aio.AioRpcError, match="try again in 1 s") as caught:
            await refused
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert ("grpc-retry-pushback-ms", "1000") in tuple(caught.value.trailing_metadata())
    search = pb.SearchRequest(collection="other", queries=[query], filter=EXISTS, top_k=1)
    searches = [asyncio.ensure_future(served.stub.Search(search)) for _ in range(4)]
    done, waiting = await asyncio.wait(searches, return_when=asyncio.FIRST_COMPLETED)
    assert [each.exception().code() for each in done] == [grpc.StatusCode.RESOURCE_EXHAUSTED]  # type: ignore[union-attr]
    for call in counts:
        call.cancel()
    for each in await asyncio.gather(*waiting):
        assert len(each.results[0].hits) == 1


async def test_writes_of_one_collection_use_at_most_two_threads(
    served: Served, changes: Changes, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    began: list[int] = []
    real = Collection.upsert

    def upsert(self: Collection, *arguments: Any) -> Any:
        if self.spec.name == "endless":
            began.append(1)
            changes.notify()
            assert go_on.wait(300)
        return real(self, *arguments)

    monkeypatch.setattr(Collection, "upsert", upsert)

    def write(name: str, number: int) -> grpc.aio.UnaryUnaryCall[Any, Any]:
        record = pb.Record(id=f"new {number}")
        request = pb.UpsertRecordsRequest(collection=name, records=[record], vectors=vector(vectors(1)))
        return served.stub.UpsertRecords(request)

    writes = [write("endless", i) for i in range(THREADS + 2)]
    # A write has its slot also while its records are read, so all are read before the second write begins.
    await changes.until(lambda: len(began) == 2 and served.pool.writers("endless").waiting == THREADS)
    assert (await write("other", 0)).inserted_count == 1
    assert len(began) == 2
    go_on.set()
    assert [(await each).inserted_count for each in writes] == [1] * len(writes)
    assert index_pool._WRITERS == 2
