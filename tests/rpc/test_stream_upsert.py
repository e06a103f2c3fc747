"""UpsertRecordsStream: every record is stored once, also if the server is killed, and invalid ones fail alone."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from emberpc.client import (
    AsyncClient,
    Client,
    FailedPrecondition,
    InputError,
    InvalidArgument,
    NotFound,
    Record,
    UpsertCheckpoint,
)
from emberpc.v1 import index_pb2 as pb
from emberpc.v1 import index_pb2_grpc
from emberpc.wire import vectors
from examples.server_process import ServerProcess
from stream_helpers import LETTERS, texts_of

Serve = Callable[..., ServerProcess]
LONG = " ".join(LETTERS * 2)


@pytest.fixture(scope="module")
def tiny_server(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server of the tiny model."""
    process = ServerProcess({"tiny": tiny_bundle}, tmp_path_factory.mktemp("data"))
    yield process
    assert process.stop() == 0, process.output
    assert "Traceback" not in process.output


@pytest.fixture
def client(tiny_server: ServerProcess) -> Iterator[Client]:
    with Client(tiny_server.address) as connected:
        yield connected
        for collection in connected.collections():
            connected.delete_collection(collection.name)


def records_of(count: int) -> list[Record]:
    return [Record(f"id-{i:05}", text, {"number": i}) for i, text in enumerate(texts_of(count))]


def test_texts_are_embedded_and_checkpoints_state_the_stored_number(client: Client) -> None:
    client.create_collection("c", model="tiny")
    records = records_of(500)
    seen = []
    for checkpoint in client.upsert_stream("c", iter(records), batch_size=40):
        seen.append(checkpoint)
        assert client.count("c") >= checkpoint.done
    assert [checkpoint.done for checkpoint in seen] == [*range(40, 500, 40), 500]
    assert [checkpoint.sequence for checkpoint in seen] == list(range(1, 14))
    assert sum(checkpoint.inserted for checkpoint in seen) == 500
    found = list(client.records("c", with_vectors=True, page_size=1000))
    assert found == records
    expected = client.embed([record.text for record in records])
    assert np.abs(np.stack([record.vector for record in found if record.vector is not None]) - expected).max() < 1e-5
    (again,) = client.upsert_stream("c", records[:7])
    assert (again.inserted, again.updated) == (0, 7)


def test_invalid_records_fail_alone_in_both_clients(tiny_server: ServerProcess, client: Client) -> None:
    bad: list[Any] = [
        {"id": "long", "text": LONG},
        {"id": "", "text": "a"},
        {"id": "blank", "text": " "},
        {"id": "big", "text": "a", "metadata": {"text": "x" * 70_000}},
        {"id": "twice", "text": "b"},
        {"id": "unsendable", "text": "\udce9"},
    ]
    given = [{"id": "twice", "text": "a"}, *bad, {"id": "last", "text": "c"}]

    async def run() -> list[UpsertCheckpoint]:
        async with AsyncClient(tiny_server.address) as asynchronous:
            return [checkpoint async for checkpoint in asynchronous.upsert_stream("two", given)]

    for name in ("one", "two"):
        client.create_collection(name, model="tiny")
    for name, outcome in (("one", list(client.upsert_stream("one", given))), ("two", asyncio.run(run()))):
        assert outcome[-1].done == len(given)
        failures = {failure.index: failure for checkpoint in outcome for failure in checkpoint.failures}
        assert sorted(failures) == [1, 2, 3, 4, 5, 6]
        assert {record.id: record.text for record in client.records(name)} == {"twice": "a", "last": "c"}
        words = {1: "at most 32", 2: "id is empty", 3: "text is empty", 4: "metadata has"}
        for index, part in words.items():
            error = failures[index].error
            assert isinstance(error, InvalidArgument)
            assert part in error.message
        assert isinstance(failures[5].error, InputError)
        assert "records[5].id is 'twice'" in str(failures[5].error)
        assert isinstance(failures[6].error, InputError)


def test_failures_of_records_with_one_id_have_their_own_indexes(client: Client) -> None:
    client.create_collection("same", model="tiny")
    given = [{"id": "a", "text": LONG}, {"id": "a", "text": "a"}, {"id": "b", "text": "b"}, {"id": "b", "text": LONG}]
    for batch_size, wrong in ((1, [0, 3]), (4, [0, 1, 3])):
        checkpoints = list(client.upsert_stream("same", given, batch_size=batch_size))
        assert sorted(failure.index for each in checkpoints for failure in each.failures) == wrong
        assert checkpoints[-1].done == 4


def test_records_with_invalid_vectors_fail_alone(client: Client) -> None:
    client.create_collection("v", dimensions=4)
    rows = np.random.default_rng(0).normal(size=(100, 4)).astype(np.float32)
    rows[17] = 0
    records = [Record(f"{i:03}", vector=row) for i, row in enumerate(rows)]
    records.insert(50, Record("narrow", vector=np.ones(3, dtype=np.float32)))
    outcome = list(client.upsert_stream("v", records, batch_size=30))
    failures = {failure.id: str(failure.error) for checkpoint in outcome for failure in checkpoint.failures}
    assert set(failures) == {"017", "narrow"}
    assert failures["017"].startswith("vector has length zero, so no direction for cosine; give a vector that is not")
    assert failures["narrow"] == "vector has 3 dimensions, the collection has 4; give a vector of 4 dimensions"
    found = list(client.records("v", with_vectors=True))
    assert [record.id for record in found] == [f"{i:03}" for i in range(100) if i != 17]
    for record in found:
        assert record.vector is not None
        assert record.vector.tobytes() == rows[int(record.id)].tobytes()


def test_an_invalid_stream_is_refused_with_the_reason(client: Client) -> None:
    client.create_collection("v", dimensions=4)
    with pytest.raises(NotFound, match="'none'"):
        list(client.upsert_stream("none", records_of(1)))
    with pytest.raises(FailedPrecondition, match="takes vectors only"):
        list(client.upsert_stream("v", records_of(1)))
    with pytest.raises(InputError, match="window"):
        client.upsert_stream("v", [], window=0)
    assert list(client.upsert_stream("v", [])) == []


def message(number: int, count: int = 1, collection: str = "v") -> pb.UpsertRecordsStreamRequest:
    return pb.UpsertRecordsStreamRequest(
        collection=collection,
        batch_number=number,
        records=[pb.Record(id=f"{number}-{i}") for i in range(count)],
        vectors=vectors.encode(np.ones((count, 4), dtype=np.float32)),
    )


WRONG = [
    ([], "collection is missing"),
    ([message(1, collection="")], "collection is missing"),
    ([message(0)], "batch_number is 0 after 0"),
    ([message(2), message(2)], "batch_number is 2 after 2"),
    ([message(1), message(2, collection="w")], "collection is 'w', and the stream is of 'v'"),
    ([message(1, 4097)], "records has more than 4096"),
]


@pytest.mark.parametrize(("messages", "words"), WRONG)
def test_messages_out_of_order_end_the_stream(
    tiny_server: ServerProcess, client: Client, messages: list[pb.UpsertRecordsStreamRequest], words: str
) -> None:
    client.create_collection("v", dimensions=4)
    with grpc.insecure_channel(tiny_server.address) as channel, pytest.raises(grpc.RpcError) as raised:
        list(index_pb2_grpc.IndexServiceStub(channel).UpsertRecordsStream(iter(messages)))
    assert isinstance(raised.value, grpc.Call)
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert str(raised.value.details()).startswith(words)


def test_the_command_upsert_reports_invalid_records_by_their_lines(
    tiny_server: ServerProcess, client: Client, tmp_path: Path
) -> None:
    client.create_collection("c", model="tiny")
    file = tmp_path / "records.jsonl"
    lines = [{"id": "a", "text": "a"}, {"id": "long", "text": LONG}, {"id": "b", "text": "b"}, {"id": "", "text": "c"}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [sys.executable, "-m", "emberpc.cli.main", "upsert", "c", str(file), "--stream", "--json"]
    run = subprocess.run(
        [*command, "--target", tiny_server.address], capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 2, run.stderr
    assert json.loads(run.stdout) == {"inserted": 2, "updated": 0, "sequence": 1}
    assert f"{file}:2: text has" in run.stderr
    assert f"{file}:4: id is empty" in run.stderr
    assert "2 of 4 records were not written" in run.stderr
    assert client.count("c") == 2


@pytest.fixture
def serve(tiny_bundle: Path, tmp_path: Path) -> Iterator[Serve]:
    """A function that starts servers of the tiny model on one data directory; all are ended after the test."""
    started: list[ServerProcess] = []

    def start(listen: str = "127.0.0.1:0") -> ServerProcess:
        started.append(ServerProcess({"tiny": tiny_bundle}, tmp_path, listen=listen))
        return started[-1]

    yield start
    for server in started:
        if server.process.returncode is None:
            server.kill()


def test_every_record_is_stored_once_after_a_kill_of_the_server(serve: Serve) -> None:
    """No acknowledged record is lost, and the resumed stream ends after all records."""
    first = serve()
    texts, given, acknowledged = texts_of(50), 0, 0
    restarted = threading.Event()
    counted: list[int] = []

    def restart() -> None:
        try:
            first.kill()
            reported = acknowledged
            second = serve(first.address)
            with Client(second.address) as other:
                counted.append(other.count("c") - reported)
        finally:
            restarted.set()  # the input must end also after an error

    thread = threading.Thread(target=restart)

    def corpus() -> Iterator[Record]:
        nonlocal given
        left = 500
        while left:
            left -= restarted.is_set()
            given += 1
            yield Record(f"{given - 1:06}", texts[given % 50])

    with Client(first.address) as client:
        client.create_collection("c", model="tiny")
        for checkpoint in client.upsert_stream("c", corpus(), window=512):
            assert acknowledged <= checkpoint.done
            assert not checkpoint.failures
            acknowledged = checkpoint.done
            if acknowledged >= 1000 and thread.ident is None:
                thread.start()
        thread.join()
        assert counted[0] >= 0
        assert acknowledged == given == client.count("c")
        ids = [record.id for record in client.records("c", page_size=1000)]
    assert ids == [f"{i:06}" for i in range(given)]


def test_the_window_limits_the_records_read_ahead(client: Client) -> None:
    client.create_collection("c", dimensions=4)
    read = done = maximum = 0

    def corpus() -> Iterator[Record]:
        nonlocal read, maximum
        for i in range(5000):
            read += 1
            maximum = max(maximum, read - done)
            yield Record(str(i), vector=np.ones(4, dtype=np.float32))

    for checkpoint in client.upsert_stream("c", corpus(), batch_size=50, window=200):
        done = checkpoint.done
    assert done == read == client.count("c") == 5000
    # Beside the unacknowledged records, those of the checkpoint that the client reads may count.
    assert maximum <= 250
