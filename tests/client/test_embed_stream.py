"""`embed_stream` of both clients answers every text once, also after broken connections, and reads few items ahead."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import numpy as np
import pytest

from emberpc.client import (
    AsyncClient,
    Cancelled,
    Client,
    DeadlineExceeded,
    FailedPrecondition,
    InputError,
    InputTypeError,
    Internal,
    InvalidArgument,
    NotFound,
    StreamedEmbedding,
    Unavailable,
)
from emberpc.v1 import types_pb2
from fake_server import FakeServer, Fault, vector_of

Shell = Any
TEXTS = [f"text number {i}" for i in range(1000)]
UNAVAILABLE = Fault(grpc.StatusCode.UNAVAILABLE, "stopping", "STOPPING")


def check(results: list[StreamedEmbedding], texts: dict[str, str]) -> None:
    """Check that each text has one result, with its vector."""
    assert Counter(result.id for result in results) == Counter(dict.fromkeys(texts, 1))
    for result in results:
        assert result.error is None
        assert result.vector is not None
        assert result.vector.flags.owndata
        assert np.array_equal(result.vector, vector_of(texts[result.id]))
        assert result.tokens == len(texts[result.id].split()) + 2


def requests(fake: FakeServer) -> list[Any]:
    """Return the messages that the server received."""
    return [asked.request for asked in fake.asked["EmbedStream"]]


def test_every_text_is_answered_once_by_its_number(fake: FakeServer, shell: Shell) -> None:
    check(shell("embed_stream", TEXTS), {str(i): text for i, text in enumerate(TEXTS)})
    assert requests(fake)[0].HasField("config")
    assert [len(request.items) for request in requests(fake)] == [0, *[64] * 15, 40]


@pytest.mark.parametrize(("batch_size", "window"), [(1, 1), (3, 4), (100, 10), (1000, 5000)])
def test_every_text_is_answered_with_any_batch_size_and_window(
    fake: FakeServer, shell: Shell, batch_size: int, window: int
) -> None:
    texts = {f"id-{i}": text for i, text in enumerate(TEXTS[:200])}
    check(shell("embed_stream", texts.items(), batch_size=batch_size, window=window), texts)


def test_any_id_is_returned_also_if_it_is_repeated(fake: FakeServer, shell: Shell) -> None:
    items = [("ключ", "a"), ("🦊", "b"), "c", ("", "d"), ("same", "e"), ("same", "f"), ("a\udce9", "g"), ("7", "h")]
    results = shell("embed_stream", items)
    assert Counter(result.id for result in results) == Counter(["ключ", "🦊", "2", "", "same", "same", "a\udce9", "7"])


def test_an_invalid_text_fails_alone(fake: FakeServer, shell: Shell) -> None:
    results = {result.id: result for result in shell("embed_stream", ["a", "bad", "b", "lone \udce9", "c"])}
    assert {key for key, result in results.items() if result.vector is not None} == {"0", "2", "4"}
    refused, unsendable = results["1"].error, results["3"].error
    assert isinstance(refused, InvalidArgument)
    assert (refused.message, refused.reason) == ("text is bad", "INVALID_FIELD")
    assert isinstance(unsendable, InputError)
    assert "items[3] holds a lone surrogate" in str(unsendable)


def test_an_empty_stream_gives_no_results(fake: FakeServer, shell: Shell) -> None:
    assert shell("embed_stream", []) == []
    assert shell("embed_stream", ["\udce9"])[0].vector is None


def test_embed_stream_sends_all_its_options(fake: FakeServer, shell: Shell) -> None:
    shell(
        "embed_stream",
        ["a"],
        model="m",
        input_kind="query",
        dimensions=4,
        truncation="start",
        dtype="int8",
        normalize=False,
        priority="interactive",
    )
    config = requests(fake)[0].config
    assert (config.model, config.dimensions, config.normalize) == ("m", 4, False)
    assert config.input_kind == types_pb2.INPUT_KIND_QUERY
    assert config.truncation == types_pb2.TRUNCATION_START
    assert config.dtype == types_pb2.DATA_TYPE_INT8
    assert config.priority == types_pb2.PRIORITY_INTERACTIVE
    shell("embed_stream", ["a"])
    config = requests(fake)[2].config
    assert not config.HasField("normalize")
    assert config.priority == types_pb2.PRIORITY_BULK


WRONG = [
    ({"items": "one"}, InputTypeError, "items is of type str"),
    ({"items": 7}, InputTypeError, "items is of type int"),
    ({"items": [], "batch_size": 0}, InputError, "batch_size"),
    ({"items": [], "window": 0}, InputError, "window"),
    ({"items": [], "dtype": "int4"}, InputError, "dtype"),
    ({"items": [], "timeout": 0}, InputError, "timeout"),
]


@pytest.mark.parametrize(("arguments", "kind", "words"), WRONG)
def test_an_invalid_argument_is_refused_before_the_first_result(
    fake: FakeServer, shell: Shell, arguments: dict[str, Any], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        shell.client.embed_stream(**arguments)
    assert not fake.asked


@pytest.mark.parametrize("item", [7, ("id",), (1, "a"), ("id", None), b"a"])
def test_an_item_of_a_wrong_type_raises_input_type_error(fake: FakeServer, shell: Shell, item: object) -> None:
    with pytest.raises(InputTypeError, match=r"items\[1\]"):
        shell("embed_stream", ["a", item])


def test_an_error_of_the_source_of_items_is_raised_unchanged(fake: FakeServer, shell: Shell) -> None:
    def source() -> Iterator[str]:
        yield "a"
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        shell("embed_stream", source(), batch_size=1)


@pytest.mark.parametrize("window", [1, 64, 300])
def test_the_window_limits_the_items_read_ahead(fake: FakeServer, shell: Shell, window: int) -> None:
    read = taken = maximum = 0

    def source() -> Iterator[str]:
        nonlocal read, maximum
        for text in TEXTS:
            read += 1
            maximum = max(maximum, read - taken)
            yield text

    for _ in shell.iterate("embed_stream", source(), batch_size=32, window=window):
        taken += 1
    assert taken == 1000
    # Results that the caller has not consumed yet are those of one request at most.
    assert window / 2 < maximum <= window + 32


def test_no_item_is_read_before_the_first_result_is_requested(fake: FakeServer, shell: Shell) -> None:
    read: list[str] = []

    def source() -> Iterator[str]:
        for text in TEXTS:
            read.append(text)
            yield text

    results = shell.iterate("embed_stream", source(), window=100, batch_size=10)
    assert not read
    next(results)
    assert len(read) <= 110
    results.close()
    assert len(read) <= 110


@pytest.mark.parametrize("broken", [[2], [2, 5], [1, 2, 3], [12]])
def test_a_broken_stream_resumes_with_the_unanswered_texts(fake: FakeServer, shell: Shell, broken: list[int]) -> None:
    """The server stops at message number n of each connection."""
    for n in broken:
        fake.faults["EmbedStream"].extend([*[None] * n, UNAVAILABLE])
    texts = {f"id-{i}": text for i, text in enumerate(TEXTS)}
    check(shell("embed_stream", texts.items()), texts)
    configs = [request for request in requests(fake) if request.HasField("config")]
    assert len(configs) == len(broken) + 1
    # At most the texts in progress are sent again.
    assert sum(len(request.items) for request in requests(fake)) <= 1000 + 64 * 16 * len(broken)


def test_answered_texts_are_not_sent_again(fake: FakeServer, shell: Shell) -> None:
    fake.faults["EmbedStream"].extend([None, None, None, UNAVAILABLE])
    shell("embed_stream", TEXTS[:40], batch_size=10, window=10)
    assert [[int(item.id) for item in request.items] for request in requests(fake)] == [
        [],
        list(range(10)),
        list(range(10, 20)),
        list(range(20, 30)),
        [],
        list(range(20, 30)),
        list(range(30, 40)),
    ]


def test_a_stream_fails_after_the_timeout_without_responses(fake: FakeServer, shell: Shell) -> None:
    fake.faults["EmbedStream"].extend([None, *[UNAVAILABLE] * 50])
    with pytest.raises(Unavailable, match="stopping") as raised:
        shell("embed_stream", TEXTS, timeout=5)  # time for the first response on a slow host
    assert raised.value.reason == "STOPPING"


def test_a_stream_whose_first_connections_fail_ends_after_5_tries(fake: FakeServer, shell: Shell) -> None:
    fake.faults["EmbedStream"].extend([UNAVAILABLE] * 6)
    with pytest.raises(Unavailable):
        shell("embed_stream", TEXTS)
    assert len(fake.asked["EmbedStream"]) == 5


def test_a_full_server_is_called_again_after_its_retry_delay(fake: FakeServer, shell: Shell) -> None:
    full = Fault(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", "QUEUE_FULL", retry_after=0.01)
    fake.faults["EmbedStream"].extend([full, None, None, UNAVAILABLE, full])
    check(shell("embed_stream", TEXTS), {str(i): text for i, text in enumerate(TEXTS)})


def test_an_error_that_is_not_temporary_ends_the_stream(fake: FakeServer, shell: Shell) -> None:
    fake.faults["EmbedStream"].append(Fault(grpc.StatusCode.NOT_FOUND, "there is no model 'm'", "MODEL_NOT_FOUND"))
    with pytest.raises(NotFound, match="no model 'm'"):
        shell("embed_stream", TEXTS, model="m")


def test_a_stream_to_a_silent_server_ends_after_the_timeout(fake: FakeServer, shell: Shell) -> None:
    released = threading.Event()
    fake.hooks["EmbedStream"] = lambda _: released.wait(300)
    try:
        with pytest.raises(DeadlineExceeded, match="no response from .* within 0.3 s"):
            shell("embed_stream", TEXTS, timeout=0.3)
    finally:
        released.set()


def test_a_stream_ends_if_a_restarted_server_has_another_model(fake: FakeServer, shell: Shell) -> None:
    fake.faults["EmbedStream"].extend([None, None, UNAVAILABLE])

    def hook(request: Any) -> None:
        if len(fake.asked["EmbedStream"]) == 3:
            fake.fingerprint = "two"

    fake.hooks["EmbedStream"] = hook
    with pytest.raises(FailedPrecondition, match="another model 'canned'") as raised:
        shell("embed_stream", TEXTS)
    assert raised.value.reason == "MODEL_CHANGED"


def test_a_server_that_ends_early_or_answers_twice_is_an_internal_error(
    fake: FakeServer, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.stream_ends_after = 2
    with pytest.raises(Internal, match="before it had answered all of it"):
        shell("embed_stream", TEXTS)
    fake.stream_ends_after = None
    fake.stream_repeats = True
    with pytest.raises(Internal, match="was not asked or has answered"):
        shell("embed_stream", TEXTS)


def test_closing_the_iterator_of_results_ends_the_stream(fake: FakeServer, shell: Shell) -> None:
    results = shell.iterate("embed_stream", iter(lambda: "endless", None))
    for _ in range(300):
        next(results)
    results.close()
    assert fake.streams_ended.wait(300)


def test_closing_the_client_ends_its_streams() -> None:
    with FakeServer() as fake:
        client = Client(fake.target)
        results = client.embed_stream(iter(lambda: "endless", None))
        next(results)
        client.close()
        with pytest.raises(Cancelled):
            list(results)


async def test_closing_the_asynchronous_client_ends_its_streams() -> None:
    with FakeServer() as fake:
        client = AsyncClient(fake.target)
        results = client.embed_stream(iter(lambda: "endless", None))
        await anext(results)
        await client.close()
        with pytest.raises(Cancelled):
            [result async for result in results]


async def test_items_may_come_from_an_asynchronous_iterator(fake: FakeServer) -> None:
    async def source() -> AsyncIterator[tuple[str, str]]:
        for i, text in enumerate(TEXTS):
            if i % 100 == 0:
                await asyncio.sleep(0)
            yield f"id-{i}", text

    async with AsyncClient(fake.target) as client:
        results = [result async for result in client.embed_stream(source())]
    check(results, {f"id-{i}": text for i, text in enumerate(TEXTS)})


async def test_streams_of_one_client_run_concurrently(fake: FakeServer) -> None:
    async with AsyncClient(fake.target) as client:

        async def run(name: str) -> list[StreamedEmbedding]:
            items = [(f"{name}-{i}", text) for i, text in enumerate(TEXTS)]
            return [result async for result in client.embed_stream(items)]

        for name, results in zip("abc", await asyncio.gather(*map(run, "abc")), strict=True):
            check(results, {f"{name}-{i}": text for i, text in enumerate(TEXTS)})
