"""EmbedStream under load: texts in progress are limited, and a failure affects as few texts as possible."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest

from aio_server import FIXED_WINDOWS, channel_to
from emberpc.server.engine import Caller, Engine, Inference, InferenceRequest, Lane, Registry
from emberpc.server.engine.sessions.session import Output
from emberpc.server.engine.tokenizing import TokenIds
from emberpc.server.errors import Code, ServiceError
from emberpc.server.handlers import Handlers
from emberpc.server.pipelines import bulk_embedding
from emberpc.server.pipelines.limits import Limits
from emberpc.server.services.embedding import EmbeddingService
from emberpc.v1 import embedding_pb2 as pb
from emberpc.v1 import embedding_pb2_grpc, errors_pb2
from emberpc.wire import status
from fake_runner import FakeRunner
from stream_helpers import LETTERS, Answers, messages, texts_of
from waiting import Changes, until_idle


class WatchedEngine(Engine):
    """The real engine; it awaits `before` before each inference, which may raise an error."""

    def __init__(self, pool: ThreadPoolExecutor, max_queue_tokens: int = 2**20) -> None:
        super().__init__(Registry(pool), pool, workers=1, batch_tokens=512, max_queue_tokens=max_queue_tokens)
        self.before: Callable[[Sequence[str], Caller], Any] | None = None
        #: Notified when an inference begins or ends.
        self.changes = Changes()
        self.under_way = 0
        self.asked = 0
        self._infer = self.inferrer.infer
        self.inferrer.infer = self._watched_infer  # type: ignore[method-assign]

    async def _watched_infer(self, request: InferenceRequest) -> Inference:
        self.under_way += 1
        self.asked += len(request.texts)
        self.changes.notify()
        try:
            if self.before is not None:
                await self.before(request.texts, request.caller)
            return await self._infer(request)
        finally:
            self.under_way -= 1
            self.changes.notify()


@asynccontextmanager
async def serving(bundle: Path, **settings: Any) -> AsyncIterator[tuple[WatchedEngine, Any]]:
    """Run a server in this event loop on a real port; yield its engine and a stub."""
    with ThreadPoolExecutor(2) as pool:
        engine = WatchedEngine(pool, **settings)
        engine.registry.load("tiny", bundle)
        server = grpc.aio.server(options=FIXED_WINDOWS)
        service = EmbeddingService(engine, Limits(4096, 2**20, 2**24, 2**25, 2**20))
        Handlers(server).add(embedding_pb2_grpc.add_EmbeddingServiceServicer_to_server, service)
        async with channel_to(server, fixed_windows=True) as channel:
            yield engine, embedding_pb2_grpc.EmbeddingServiceStub(channel)
        engine.close()


#: Calls on a connection after which a stream on it is at rest if no count changed. Both sides of a connection handle
#: frames in order, so a call that is answered shows that all frames before it were handled. A frame may cause another
#: one, such as a larger window after a read, so one call is not enough.
QUIET_CALLS = 100


async def at_rest(stub: Any, engine: WatchedEngine, count: Callable[[], int], under_way: int) -> None:
    """Wait until a stream on the stub's connection makes no progress.

    Args:
        stub: the stub.
        engine: the engine.
        count: returns a number that grows with the progress of the stream.
        under_way: inferences that never end.
    """
    quiet, before = 0, 0
    while quiet < QUIET_CALLS:
        with pytest.raises(grpc.aio.AioRpcError, match="no model 'none'"):
            await stub.Embed(pb.EmbedRequest(model="none", texts=["a"]))
        # While the engine works, the calls are answered before the stream goes on.
        quiet = quiet + 1 if engine.under_way == under_way and count() == before > 0 else 0
        before = count()


async def test_texts_are_answered_before_the_next_message_arrives(tiny_bundle: Path) -> None:
    async with serving(tiny_bundle) as (_, stub):
        call = stub.EmbedStream()
        await call.write(pb.EmbedStreamRequest(config=pb.EmbedStreamConfig()))
        assert (await call.read()).model.name == "tiny"
        for key in "xyz":
            await call.write(pb.EmbedStreamRequest(items=[pb.EmbedStreamItem(id=key, text="a b")]))
            assert list((await call.read()).ids) == [key]
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF


async def test_the_server_stops_reading_if_its_responses_are_not_read(tiny_bundle: Path) -> None:
    """The responses to 20,000 texts have 20 MB, which neither the server nor the buffers of gRPC keep."""
    total, sent = 20_000, 0
    keys = [f"{i}".zfill(1000) for i in range(total)]

    async def write(call: Any) -> None:
        nonlocal sent
        for request in messages(((key, "a") for key in keys), 50):
            await call.write(request)
            sent += len(request.items)
        await call.done_writing()

    async with serving(tiny_bundle) as (engine, stub):
        call = stub.EmbedStream()
        writing = asyncio.create_task(write(call))
        await at_rest(stub, engine, lambda: sent, 0)
        assert engine.under_way == 0
        assert engine.asked <= sent < total / 10
        answered: Counter[str] = Counter()
        while (response := await call.read()) is not grpc.aio.EOF:
            answered.update(response.ids)
        await writing
        assert answered == Counter(keys)


async def test_texts_in_progress_are_limited_and_run_in_the_bulk_lane(tiny_bundle: Path) -> None:
    gate = asyncio.Event()
    lanes, maximum = set(), 0
    async with serving(tiny_bundle) as (engine, stub):

        async def wait(texts: Sequence[str], caller: Caller) -> None:
            nonlocal maximum
            lanes.add(caller.lane)
            maximum = max(maximum, engine.under_way)
            assert len(texts) <= 64
            await gate.wait()

        engine.before = wait
        call = stub.EmbedStream(messages(((str(i), text) for i, text in enumerate(texts_of(2000))), 100))
        await engine.changes.until(lambda: engine.under_way == 8)
        gate.set()
        answers = Answers([response async for response in call])
    assert len(answers.vectors) == 2000
    assert maximum == 8
    assert lanes == {Lane.BULK}


async def test_cancelling_a_stream_ends_its_work(tiny_bundle: Path) -> None:
    async with serving(tiny_bundle) as (engine, stub):

        async def forever(texts: Sequence[str], caller: Caller) -> None:
            await asyncio.Event().wait()

        engine.before = forever
        call = stub.EmbedStream(messages(((str(i), "a") for i in range(1000)), 100))
        await engine.changes.until(lambda: engine.under_way == 8)
        call.cancel()
        await engine.changes.until(lambda: engine.under_way == 0)
        engine.before = None
        answers = Answers([response async for response in stub.EmbedStream(messages([("again", "a")], 1))])
        assert set(answers.vectors) == {"again"}


async def test_cancelling_a_stream_with_unread_responses_ends_its_work(tiny_bundle: Path) -> None:
    """The stream is then writing a response, and not waiting for an inference."""
    async with serving(tiny_bundle) as (engine, stub):

        async def hold_one(texts: Sequence[str], caller: Caller) -> None:
            if "held" in texts:
                await asyncio.Event().wait()

        engine.before = hold_one
        call = stub.EmbedStream()
        items = [("held", "held"), *((f"{i}".zfill(1000), "a") for i in range(20_000))]
        writing = asyncio.create_task(_write_all(call, messages(items, 50)))
        await at_rest(stub, engine, lambda: engine.asked, 1)
        held, asked = engine.under_way, engine.asked
        call.cancel()
        await engine.changes.until(lambda: engine.under_way == 0)
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
        assert held == 1
        assert asked < 2_000


async def _write_all(call: Any, requests: Iterator[pb.EmbedStreamRequest]) -> None:
    for request in requests:
        await call.write(request)


async def test_a_failed_inference_fails_only_the_texts_of_its_group(
    tiny_bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(tiny_bundle) as (engine, stub):

        async def fail_some(texts: Sequence[str], caller: Caller) -> None:
            if "poison" in texts:
                raise ServiceError(Code.INTERNAL, "the model failed on this call")

        engine.before = fail_some
        items = [(str(i), "poison" if i == 100 else "a b") for i in range(300)]
        call = stub.EmbedStream(messages(items, 50), metadata=((status.REQUEST_ID_KEY, "stream-1"),))
        answers = Answers([response async for response in call])
    assert "100" in answers.failures
    assert 1 <= len(answers.failures) <= 64
    assert len(answers.failures) + len(answers.vectors) == 300
    error = answers.failures["100"]
    assert error.code == Code.INTERNAL.value
    assert error.message.endswith("request id stream-1")
    assert "stream-1" in caplog.text


async def test_a_stream_waits_for_a_full_queue(tiny_bundle: Path) -> None:
    refusals = 3
    async with serving(tiny_bundle) as (engine, stub):

        async def full(texts: Sequence[str], caller: Caller) -> None:
            nonlocal refusals
            if refusals:
                refusals -= 1
                raise ServiceError(Code.RESOURCE_EXHAUSTED, "full", reason="QUEUE_FULL", retry_after=0.01)

        engine.before = full
        answers = Answers([response async for response in stub.EmbedStream(messages([("a", "a"), ("b", "b")], 2))])
    assert set(answers.vectors) == {"a", "b"}
    assert refusals == 0


class Blocked(FakeRunner):
    """A model that blocks until `let_go` is set."""

    def __init__(self) -> None:
        self.entered, self.let_go = threading.Event(), threading.Event()

    def run(self, batch: Sequence[TokenIds], threads: int = 1) -> Output:
        self.entered.set()
        assert self.let_go.wait(300)
        return np.zeros((len(batch), 1), dtype=np.float32)


async def test_a_new_stream_is_refused_while_the_queue_is_full(tiny_bundle: Path) -> None:
    async with serving(tiny_bundle, max_queue_tokens=40) as (engine, stub):
        blocked, texts = Blocked(), [np.zeros(40, dtype=np.int64)]
        running = [asyncio.create_task(engine._scheduler.run(blocked, texts))]
        await asyncio.to_thread(blocked.entered.wait, 300)
        running.append(asyncio.create_task(engine._scheduler.run(blocked, texts)))
        await until_idle()
        assert engine.waiting_tokens == 40
        # The config alone: where a further message fails to be sent, grpc.aio may report INTERNAL in place of the
        # status (grpc/grpc#36066). The clients wait for the first response before they send more.
        call = stub.EmbedStream(messages([], 1))
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            [response async for response in call]
        blocked.let_go.set()
        await asyncio.gather(*running)
    assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert int(dict(tuple(raised.value.trailing_metadata() or ()))[status.PUSHBACK_KEY]) >= 0


async def test_a_group_that_cannot_meet_its_deadline_fails_without_a_retry(tiny_bundle: Path) -> None:
    async with serving(tiny_bundle) as (engine, stub):
        asked = 0

        async def too_late(texts: Sequence[str], caller: Caller) -> None:
            nonlocal asked
            asked += 1
            raise ServiceError(Code.RESOURCE_EXHAUSTED, "late", reason="DEADLINE_TOO_SOON", retry_after=0.01)

        engine.before = too_late
        answers = Answers([response async for response in stub.EmbedStream(messages([("a", "a")], 1))])
    assert {error.code for error in answers.failures.values()} == {Code.RESOURCE_EXHAUSTED.value}
    assert asked == 1


async def test_texts_fail_if_the_queue_stays_full(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk_embedding, "_RETRY_SECONDS", 0.2)
    async with serving(tiny_bundle) as (engine, stub):

        async def full(texts: Sequence[str], caller: Caller) -> None:
            raise ServiceError(Code.RESOURCE_EXHAUSTED, "full", reason="QUEUE_FULL", retry_after=0.01)

        engine.before = full
        answers = Answers([response async for response in stub.EmbedStream(messages([("a", "a"), ("b", "b")], 2))])
    assert {error.code for error in answers.failures.values()} == {Code.RESOURCE_EXHAUSTED.value}
    retry = status.detail(answers.failures["a"], errors_pb2.RetryInfo)
    assert retry is not None
    assert retry.retry_delay.ToNanoseconds() == 10_000_000


async def test_a_group_larger_than_the_queue_is_divided(tiny_bundle: Path) -> None:
    async with serving(tiny_bundle, max_queue_tokens=40) as (_, stub):
        items = [(str(i), " ".join(LETTERS[:18])) for i in range(20)]
        answers = Answers([response async for response in stub.EmbedStream(messages(items, 20))])
    assert len(answers.vectors) == 20


async def test_a_stopping_server_ends_the_stream(tiny_bundle: Path) -> None:
    async with serving(tiny_bundle) as (engine, stub):

        async def stopping(texts: Sequence[str], caller: Caller) -> None:
            raise ServiceError(Code.UNAVAILABLE, "the server is stopping; try again", reason="STOPPING")

        engine.before = stopping
        call = stub.EmbedStream(messages([("a", "a")], 1))
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            [response async for response in call]
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
