"""Streams of requests keep a limited number of bytes and characters, and all unprocessed messages are counted."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, aclosing, closing
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from aio_server import channel_to
from emberpc.server.collections import CollectionSpec
from emberpc.server.engine import Caller, Engine, Inference, InferenceRequest, Registry, Truncation
from emberpc.server.handlers import Handlers
from emberpc.server.in_flight import BytesInFlight
from emberpc.server.index import Index
from emberpc.server.pipelines.bulk_embedding import GROUP_CHARACTERS, GROUPS
from emberpc.server.pipelines.embedding import EmbeddingOptions, InputKind
from emberpc.server.pipelines.embedding_stream import EmbeddingStream, StreamText, TextMessage
from emberpc.server.pipelines.index_pool import IndexPool
from emberpc.server.pipelines.limits import Limits
from emberpc.server.pipelines.reembedding import ReembeddingJobs
from emberpc.server.pipelines.upsert_stream import UpsertMessage, UpsertStream
from emberpc.server.services import index as index_service
from emberpc.server.services.index import IndexService, add_index_service
from emberpc.server.services.index_messages import read_each_record
from emberpc.v1 import index_pb2 as pb
from emberpc.v1 import index_pb2_grpc, types_pb2
from index_helpers import DIMENSIONS, vectors
from stream_helpers import texts_of
from waiting import Changes, until_idle

MIB = 2**20
LIMITS = Limits(1000, 2 * MIB, 2**24, 2**25, 2**20)


class GatedPool:
    """Runs the work of the index after a gate is opened."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()

    async def run(self, work: Callable[[], Any], *_: Any, **__: Any) -> Any:
        await self.gate.wait()
        return work()


class Writable:
    """Delays no write."""

    async def wait_writable(self, name: str) -> None:
        pass


@pytest.mark.parametrize(("size", "held_messages"), [(16 * MIB, 1), (MIB, 4), (3 * MIB, 2), (1000, 64)])
async def test_an_upsert_stream_limits_the_bytes_that_it_reads_ahead(
    tmp_path: Path, size: int, held_messages: int
) -> None:
    held: list[int] = []
    released = 0

    def release() -> None:
        nonlocal released
        released += 1
        held.pop()

    def read(number: int) -> UpsertMessage:
        held.append(size)
        assert sum(held) - size < 4 * MIB
        return UpsertMessage("", number, 0, lambda: iter(()), None, None, size, release)

    async def numbers() -> AsyncIterator[int]:
        for number in range(1, 100):
            yield number

    pool = GatedPool()
    with closing(Index(tmp_path)) as index:
        collection = index.create(CollectionSpec("c", DIMENSIONS))
        stream = UpsertStream(None, LIMITS, pool, Writable(), collection, Caller(), "")  # type: ignore[arg-type]
        batches: list[int] = []

        async def run() -> None:
            async with aclosing(stream.run(numbers(), read)) as results:
                async for batch in results:
                    batches.append(batch.batch_number)

        running = asyncio.create_task(run())
        await until_idle()
        assert len(held) == held_messages
        pool.gate.set()
        await asyncio.wait_for(running, 300)
    assert batches == list(range(1, 100))
    assert (len(held), released) == (0, 99)


def large_message(number: int) -> pb.UpsertRecordsStreamRequest:
    """Return a message of 1 MiB with one record and its vector."""
    rows = types_pb2.Vectors(data=vectors(1).astype("<f4").tobytes(), rows=1, dimensions=DIMENSIONS)
    record = pb.Record(id=str(number), text="a" * MIB)
    return pb.UpsertRecordsStreamRequest(collection="c", batch_number=number, records=[record], vectors=rows)


async def test_all_unprocessed_messages_of_upsert_streams_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One stream keeps four messages of 1 MiB; another is refused, and served after the first one has ended."""
    gate = threading.Event()

    def gated(*arguments: Any) -> Any:
        assert gate.wait(300)
        return read_each_record(*arguments)

    monkeypatch.setattr(index_service, "read_each_record", gated)
    changes = Changes()
    changes.watch(monkeypatch, BytesInFlight, "add", "remove")
    with closing(Index(tmp_path)) as index, ThreadPoolExecutor(4) as executor:
        index.create(CollectionSpec("c", DIMENSIONS))
        pool = IndexPool(executor, heavy=1)
        engine = Engine(Registry(executor), executor, workers=1, batch_tokens=1000, max_queue_tokens=1000)
        server = grpc.aio.server()
        service = IndexService(engine, index, pool, LIMITS, ReembeddingJobs(engine, index, pool, LIMITS))
        handlers = Handlers(server, max_in_flight_bytes=4 * MIB + MIB // 2)
        handlers.add(add_index_service, service)
        async with AsyncExitStack() as stack:
            stack.callback(engine.close)
            stack.push_async_callback(pool.close)
            channel = await stack.enter_async_context(channel_to(server))
            # After a failed assertion, the server can stop only if its threads do not wait for the gate any more.
            stack.callback(gate.set)
            stub: Any = index_pb2_grpc.IndexServiceStub(channel)
            first = stub.UpsertRecordsStream(large_message(number) for number in range(1, 11))
            await changes.until(lambda: handlers._in_flight.total >= 4 * MIB)
            with pytest.raises(grpc.aio.AioRpcError, match="max_in_flight_bytes") as refused:
                [response async for response in stub.UpsertRecordsStream(iter([large_message(1)]))]
            assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            gate.set()
            assert [response.batch_number async for response in first] == list(range(1, 11))
            again = stub.UpsertRecordsStream(iter([large_message(1)]))
            assert [response.updated_count async for response in again] == [1]
            await changes.until(lambda: handlers._in_flight.total == 0)


class GatedEngine(Engine):
    """The real engine, whose inferences wait for a gate; `groups` counts them."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        super().__init__(Registry(pool), pool, workers=1, batch_tokens=512, max_queue_tokens=2**20)
        self.gate = asyncio.Event()
        self.groups = 0
        self._infer = self.inferrer.infer
        self.inferrer.infer = self._gated_infer  # type: ignore[method-assign]

    async def _gated_infer(self, request: InferenceRequest) -> Inference:
        self.groups += 1
        await self.gate.wait()
        return await self._infer(request)


class Embedded:
    """An EmbeddingStream of the tiny model; `read` counts its messages, `released` those without a waiting text."""

    def __init__(self, engine: Engine, messages: Sequence[Sequence[StreamText]], limits: Limits = LIMITS) -> None:
        options = EmbeddingOptions(InputKind.PASSAGE, Truncation.END, 0, None)
        self.stream = EmbeddingStream(engine, limits, "tiny", options, Caller(), "")
        self._messages = messages
        self.read = self.released = 0
        self.ids: list[str] = []
        self.failures: dict[str, str] = {}

    async def run(self) -> None:
        async with aclosing(self.stream.run(self._texts(), self._message)) as groups:
            async for group in groups:
                self.ids += group.ids
                self.failures |= {id_: error.message for id_, error in group.failures}

    async def _texts(self) -> AsyncIterator[Sequence[StreamText]]:
        for texts in self._messages:
            yield texts

    def _message(self, texts: Sequence[StreamText]) -> TextMessage:
        self.read += 1
        return TextMessage(texts, self._release)

    def _release(self) -> None:
        self.released += 1


@pytest.fixture
async def engine(tiny_bundle: Path) -> AsyncIterator[GatedEngine]:
    with ThreadPoolExecutor(2) as pool:
        made = GatedEngine(pool)
        made.registry.load("tiny", tiny_bundle)
        yield made
        made.close()


#: Items, one for each message: long texts, texts as long as groups, long ids.
ITEMS = {
    "text of 400,000": lambda i: StreamText(str(i), "a " * 200_000),
    "text of 62,000": lambda i: StreamText(str(i), "a " * 31_000),
    "id of 62,000": lambda i: StreamText(f"{i:62000}", "a"),
    "id of 400,000, refused": lambda i: StreamText(f"{i:400000}", " "),
}


@pytest.mark.parametrize("kind", ITEMS)
async def test_an_embed_stream_limits_the_characters_that_it_reads_ahead(engine: GatedEngine, kind: str) -> None:
    items = [ITEMS[kind](i) for i in range(30)]
    size = len(items[0].id) + len(items[0].text)
    # A group of refused texts ends at once, so others run before them.
    slow = [StreamText(f"slow-{i}", "a") for i in range(GROUPS)] if "refused" in kind else []
    streamed = Embedded(engine, [[item] for item in [*slow, *items]])
    running = asyncio.create_task(streamed.run())
    await until_idle()
    read = streamed.read - len(slow)
    # At most the running groups, with one text over their limit, and the waiting texts, with one over their limit.
    assert read * size < (GROUPS + 1) * GROUP_CHARACTERS + 2 * size
    # Too few characters of short messages wait to be counted.
    assert streamed.released == (engine.groups if size >= GROUP_CHARACTERS else streamed.read)
    engine.gate.set()
    await asyncio.wait_for(running, 300)
    assert len(streamed.ids) + len(streamed.failures) == 30 + len(slow)
    assert streamed.released == streamed.read


async def test_a_too_long_text_is_freed_before_its_answer(engine: GatedEngine) -> None:
    limits = Limits(1000, 1000, 2**24, 2**25, 2**20)
    slow = [[StreamText(f"slow-{i}", text)] for i, text in enumerate(texts_of(GROUPS))]
    large = [[StreamText(f"large-{i}", "x" * 100_000)] for i in range(30)]
    streamed = Embedded(engine, [*slow, *large], limits)
    running = asyncio.create_task(streamed.run())
    await until_idle()
    assert engine.groups == GROUPS
    assert len(streamed.stream._waiting) == 30
    assert not any(text.text for text in streamed.stream._waiting)
    engine.gate.set()
    await asyncio.wait_for(running, 300)
    assert len(streamed.ids) == GROUPS
    assert streamed.failures == {
        f"large-{i}": "text has 100000 bytes, a text may have at most 1000; split it" for i in range(30)
    }
