"""Reembedding of a collection with another model during searches and writes."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from emberpc.cli.main import main
from emberpc.client import Client, FailedPrecondition, NotFound, Record
from examples.server_process import ServerProcess
from waiting import wait_until

WORDS = "a cab is here the dog runs over green hills and sings of rain at night".split()  # noqa: SIM905 - plainer


@pytest.fixture(scope="module")
def models(tiny_bundle: Path, other_tiny_bundle: Path) -> dict[str, Path]:
    return {"a": tiny_bundle, "b": other_tiny_bundle}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def server(models: dict[str, Path], data_dir: Path) -> Iterator[ServerProcess]:
    with ServerProcess(models, data_dir) as process:
        yield process
    assert "Traceback" not in process.output


@pytest.fixture
def client(server: ServerProcess) -> Iterator[Client]:
    """A client of `server`; the collections of a test are deleted afterwards."""
    with Client(server.address) as connected:
        yield connected
        for collection in connected.collections():
            connected.delete_collection(collection.name)


def texts(count: int) -> dict[str, str]:
    chance = random.Random(count)
    return {f"r{i}": f"{' '.join(chance.choices(WORDS, k=8))} {i}" for i in range(count)}


def filled(client: Client, count: int) -> dict[str, str]:
    found = texts(count)
    client.create_collection("c", model="a")
    client.upsert("c", [Record(key, text, {"n": len(text)}) for key, text in found.items()], batch_size=1000)
    return found


def axis(number: int, dimensions: int = 4) -> np.ndarray:
    vector: np.ndarray = np.eye(dimensions, dtype=np.float32)[number]
    return vector


def under(client: Client, model: str) -> bool:
    return client.get_collection("c").model == model


def check(client: Client, model: str, expected: dict[str, str]) -> None:
    """Check that each record is stored with the vector that the model gives its text, and that a search finds it."""
    records = {record.id: record for record in client.records("c", with_vectors=True, page_size=1000)}
    assert {key: record.text for key, record in records.items()} == expected
    wanted = client.embed([expected[key] for key in records], model=model)
    found = [record.vector for record in records.values() if record.vector is not None]
    assert np.allclose(np.stack(found), wanted, atol=1e-4)
    some = list(expected)[:20]
    for key, result in zip(some, client.search_batch("c", [expected[key] for key in some], top_k=1), strict=True):
        assert result.hits[0].score == pytest.approx(1, abs=1e-3), key
    assert client.verify_collection("c").ok


def test_calls_succeed_and_no_record_is_lost_during_a_reembedding(
    server: ServerProcess, client: Client, data_dir: Path
) -> None:
    expected = filled(client, 1500)
    stays = client.get("c", ["r7"])[0]
    before = client.get_collection("c")
    failures: list[Exception] = []
    stop = threading.Event()

    def write() -> None:
        chance = random.Random(1)
        i = 0
        with Client(server.address) as other:
            while not stop.is_set():
                i += 1
                try:
                    changed, gone = f"r{chance.randrange(10, 1000)}", f"r{chance.randrange(1000, 1500)}"
                    written = {f"new{i}": f"new text {i}", changed: f"changed {i} times"}
                    other.upsert("c", [Record(key, text) for key, text in written.items()])
                    expected.update(written)
                    other.delete("c", [gone])
                    expected.pop(gone, None)
                except Exception as error:
                    failures.append(error)
                    return

    def search() -> None:
        with Client(server.address) as other:
            while not stop.is_set():
                try:
                    assert len(other.search("c", "the dog sings", top_k=5)) == 5
                except Exception as error:
                    failures.append(error)
                    return

    threads = [threading.Thread(target=write), threading.Thread(target=search), threading.Thread(target=search)]
    for thread in threads:
        thread.start()
    described = client.reembed_collection("c", "b")
    assert described.model == "a"
    assert described.reembedding is not None
    assert (described.reembedding.model, described.reembedding.problem) == ("b", "")
    wait_until(lambda: bool(failures) or under(client, "b"))
    after = client.get_collection("c")
    stop.set()
    for thread in threads:
        thread.join(300)
    assert failures == []
    assert after.reembedding is None
    assert after.create_time == before.create_time
    assert after.sequence > before.sequence
    (kept,) = client.get("c", ["r7"])
    assert (kept, kept.revision, kept.update_time) == (stays, stays.revision, stays.update_time)
    check(client, "b", expected)
    assert len(list((data_dir / "collections").iterdir())) == 1


@pytest.mark.parametrize("count", [3000, pytest.param(6000, id="with a graph", marks=pytest.mark.slow)])
def test_a_reembedding_continues_after_the_server_was_killed(
    models: dict[str, Path], tmp_path: Path, count: int
) -> None:
    crashed = ServerProcess(models, tmp_path)
    with Client(crashed.address) as client:
        expected = filled(client, count)
        client.reembed_collection("c", "b")

        def begun() -> bool:
            now = client.get_collection("c").reembedding
            return now is None or now.done > 0

        wait_until(begun)
        assert under(client, "a")
        crashed.kill()
    for _ in range(2):
        with ServerProcess(models, tmp_path) as server, Client(server.address) as client:
            wait_until(lambda: under(client, "b"))
            check(client, "b", expected)
        assert "Traceback" not in server.output


def test_a_reembedding_can_be_cancelled(client: Client, data_dir: Path) -> None:
    expected = filled(client, 3000)
    client.reembed_collection("c", "b")
    with pytest.raises(FailedPrecondition, match="on its way to another model already; wait, or cancel that"):
        client.reembed_collection("c", "b")
    assert client.cancel_reembedding("c").reembedding is None
    assert under(client, "a")
    assert client.cancel_reembedding("c").model == "a"
    check(client, "a", expected)
    assert len(list((data_dir / "collections").iterdir())) == 1
    client.reembed_collection("c", "b")
    client.delete_collection("c")
    assert list(client.collections()) == []


def test_a_record_that_cannot_be_embedded_delays_the_switch_until_it_is_changed(client: Client) -> None:
    expected = filled(client, 300)
    client.reembed_collection("c", "b")
    dimensions = client.get_collection("c").dimensions
    client.upsert("c", [Record("bare", vector=axis(0, dimensions))])

    def reported() -> bool:
        now = client.get_collection("c").reembedding
        assert now is not None
        return "1 record cannot be embedded: change or delete it, such as 'bare'" in now.problem

    wait_until(reported)
    assert under(client, "a")
    client.upsert("c", [Record("bare", "with a text now")])
    wait_until(lambda: under(client, "b"))
    check(client, "b", {**expected, "bare": "with a text now"})


def test_invalid_reembeddings_are_refused(client: Client) -> None:
    filled(client, 5)
    with pytest.raises(FailedPrecondition, match="of model 'a' with .* dimensions already"):
        client.reembed_collection("c", "a")
    with pytest.raises(NotFound, match="no model 'none'"):
        client.reembed_collection("c", "none")
    with pytest.raises(NotFound, match="no collection 'none'"):
        client.reembed_collection("none", "a")
    with pytest.raises(NotFound):
        client.cancel_reembedding("none")
    client.create_collection("bare", dimensions=4)
    client.upsert("bare", [Record("x", vector=axis(0))])
    with pytest.raises(FailedPrecondition, match="1 record of collection 'bare' has no text to embed"):
        client.reembed_collection("bare", "a")


def test_a_collection_of_vectors_can_be_reembedded_with_a_model(client: Client) -> None:
    client.create_collection("c", dimensions=4)
    client.upsert("c", [Record("x", "the dog", vector=axis(0)), Record("y", "rain", vector=axis(1))])
    client.reembed_collection("c", "a")
    wait_until(lambda: under(client, "a"))
    check(client, "a", {"x": "the dog", "y": "rain"})


def test_the_command_reembed_waits_for_the_end_of_the_reembedding(
    server: ServerProcess, client: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = filled(client, 300)

    def reembed(*arguments: str) -> tuple[int, str]:
        code = main(["collection", "reembed", "c", *arguments, "--target", server.address])
        return code, capsys.readouterr().err

    assert reembed("--model", "b") == (0, "c now has the model b, with 32 dimensions\n")
    check(client, "b", expected)
    _, begun = reembed("--model", "a", "--no-wait")
    assert begun.startswith(("the server embeds c with a", "c now has the model a"))
    assert reembed("--model", "b", "--cancel")[0] == 2
    assert reembed("--cancel")[1].startswith("c keeps its model: ")


@pytest.mark.parametrize("with_vectors", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_an_upsert_stream_with_vectors_ends_if_the_model_changes(client: Client, with_vectors: bool) -> None:
    client.create_collection("c", model="a")
    vectors = client.embed(["first text", "second text"], model="a") if with_vectors else [None, None]

    def read() -> Iterator[Record]:
        yield Record("first", "first text", vector=vectors[0])
        wait_until(lambda: client.count("c") == 1)
        client.reembed_collection("c", "b")
        wait_until(lambda: under(client, "b"))
        yield Record("second", "second text", vector=vectors[1])

    checkpoints = client.upsert_stream("c", read(), batch_size=1)
    if with_vectors:
        with pytest.raises(FailedPrecondition, match="another model than when the stream began") as refused:
            list(checkpoints)
        assert refused.value.reason == "MODEL_MISMATCH"
        check(client, "b", {"first": "first text"})
    else:
        assert [checkpoint.done for checkpoint in checkpoints][-1] == 2
        check(client, "b", {"first": "first text", "second": "second text"})
