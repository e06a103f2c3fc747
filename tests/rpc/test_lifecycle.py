"""The server as a process: start, failed starts, stop, restart and kill."""

from __future__ import annotations

import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from emberpc.client import Client, FailedPrecondition, Internal, Unavailable
from emberpc.server.app import SERVICE_NAMES
from emberpc.v1 import embedding_pb2, embedding_pb2_grpc
from examples.server_process import ServerProcess
from waiting import wait_until


def start_failing(*flags: str) -> tuple[int, str]:
    """Run a server that must not start; return its exit code and its output."""
    run = subprocess.run(
        [sys.executable, "-m", "emberpc.cli.main", "serve", *flags],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.stdout == ""
    return run.returncode, run.stderr


def test_a_second_server_on_the_same_port_fails_with_an_error(server: ServerProcess, tmp_path: Path) -> None:
    code, error = start_failing("--listen", server.address, "--data-dir", str(tmp_path))
    assert code != 0
    assert server.address in error
    assert "in use" in error
    assert "Traceback" not in error


def test_a_second_server_on_the_same_data_directory_fails_with_an_error(server: ServerProcess) -> None:
    data_dir = server.arguments[server.arguments.index("--data-dir") + 1]
    code, error = start_failing("--listen", "127.0.0.1:0", "--data-dir", data_dir)
    assert code != 0
    assert data_dir in error
    assert "Traceback" not in error


def test_too_little_address_space_ends_the_start_with_an_error(tmp_path: Path) -> None:
    limit = ["prlimit", f"--as={500 * 2**20}"]
    serve = [sys.executable, "-m", "emberpc.cli.main", "serve", "--listen", "127.0.0.1:0", "--data-dir", str(tmp_path)]
    run = subprocess.run(
        [*limit, *serve, "--workers", "3"],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode > 0  # a signal would give a negative code
    assert "limited to 500 MiB (RLIMIT_AS" in run.stderr
    assert "needs at least 832 MiB" in run.stderr
    assert "Traceback" not in run.stderr


def test_the_error_for_too_few_open_files_names_the_remedy(tmp_path: Path) -> None:
    """The error of an earlier version named the data directory or the address as the cause."""
    limit = ["prlimit", "--nofile=16:16"]
    serve = [sys.executable, "-m", "emberpc.cli.main", "serve", "--listen", "127.0.0.1:0", "--data-dir", str(tmp_path)]
    run = subprocess.run([*limit, *serve], check=False, capture_output=True, text=True, timeout=300)
    assert run.returncode > 0
    assert "may have only 16 open files" in run.stderr
    assert "needs at least 64" in run.stderr
    assert "ulimit -n" in run.stderr
    assert str(tmp_path) not in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("flipped", "SHA-256"),
        # Slow, since tests/bundle covers these damages without a server.
        *(
            pytest.param(damage, words, marks=pytest.mark.slow)
            for damage, words in {
                "missing": "no such folder",
                "newer": "format_version",
                "empty": "emberpc.json",
                "no model": "model.onnx is missing",
                "cut": "model.onnx has",
                "no json": "not JSON",
            }.items()
        ),
    ],
)
def test_an_invalid_bundle_is_refused_with_the_reason(
    tiny_bundle: Path, tmp_path: Path, damage: str, words: str
) -> None:
    folder = tmp_path / "bundle"
    if damage == "empty":
        folder.mkdir()
    elif damage != "missing":
        shutil.copytree(tiny_bundle, folder)
        harm(folder, damage)
    code, error = start_failing(
        "--listen", "127.0.0.1:0", "--data-dir", str(tmp_path / "data"), "--model", f"m={folder}"
    )
    assert code != 0
    assert "model 'm'" in error
    assert words in error
    assert "Traceback" not in error


def harm(folder: Path, damage: str) -> None:
    model, manifest = folder / "onnx" / "model.onnx", folder / "emberpc.json"
    if damage == "no model":
        model.unlink()
    elif damage == "cut":
        model.write_bytes(model.read_bytes()[:-1])
    elif damage == "flipped":
        data = bytearray(model.read_bytes())
        data[len(data) // 2] ^= 1
        model.write_bytes(data)
    elif damage == "no json":
        manifest.write_text("{")
    elif damage == "newer":
        manifest.write_text(manifest.read_text().replace('"format_version": 1', '"format_version": 9'))


def test_health_and_reflection_services_answer(server: ServerProcess) -> None:
    with grpc.insecure_channel(server.address) as channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        for name in ("", *SERVICE_NAMES):
            assert check(health_pb2.HealthCheckRequest(service=name)).status == 1
        reflect = channel.stream_stream(
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )
        (response,) = reflect(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        assert set(SERVICE_NAMES) < {service.name for service in response.list_services_response.service}


def test_a_stopping_server_finishes_the_calls_in_flight(minilm_bundle: Path, tmp_path: Path) -> None:
    server = ServerProcess({"minilm": minilm_bundle}, tmp_path, "--drain-seconds", "250")
    texts = [f"text number {i} " + "word " * (i * 3 % 100) for i in range(60)]
    with grpc.insecure_channel(server.address) as channel:
        stub = embedding_pb2_grpc.EmbeddingServiceStub(channel)
        long = stub.Embed.future(embedding_pb2.EmbedRequest(texts=texts))
        # The response to a later call on the same connection shows that the long call has arrived.
        stub.Embed(embedding_pb2.EmbedRequest(texts=["short"]))
        assert not long.done()
        assert server.stop() == 0
        assert long.result().embeddings.rows == 60
        with pytest.raises(grpc.RpcError) as refused:
            stub.Embed(embedding_pb2.EmbedRequest(texts=["too late"]))
    assert isinstance(refused.value, grpc.Call)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "Traceback" not in server.output


@dataclass
class Restarted:
    """A server that runs after another one on the same data directory.

    Attributes:
        server: the server that runs.
        client: a client of that server.
        exit_code: the exit code of the server before, which SIGINT stopped.
    """

    server: ServerProcess
    client: Client
    exit_code: int


@pytest.fixture(scope="module")
def after_restart(
    tiny_bundle: Path, other_tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Restarted]:
    """Return a server that was restarted with another model `m`, and after damage to a collection."""
    data = tmp_path_factory.mktemp("data")
    models = {"tiny": tiny_bundle, "m": other_tiny_bundle}
    with ServerProcess(models, data) as server, Client(server.address) as client:
        client.create_collection("bad", dimensions=4)
        (damaged,) = (data / "collections").iterdir()
        client.create_collection("books", model="tiny")
        client.upsert("books", [{"id": "a", "text": "a whale hunt", "metadata": {"year": 1851, "tags": ["sea"]}}])
        client.create_collection("plays", model="m")
        client.upsert("plays", [{"id": "a", "text": "a whale hunt"}])
        assert client.get_collection("plays").truncation == "refuse"
        client.update_collection("plays", truncation="start")
        server.process.send_signal(signal.SIGINT)
        exit_code = server.process.wait(300)
    (damaged / "records.db").write_bytes(b"no database at all" * 1000)
    measuring = ("--batch-tokens", "0")
    with ServerProcess({**models, "m": tiny_bundle}, data, *measuring) as server, Client(server.address) as client:
        yield Restarted(server, client, exit_code)


@pytest.fixture
def restarted(after_restart: Restarted) -> Client:
    """A client of the server of `after_restart`."""
    return after_restart.client


def test_sigint_stops_the_server_with_exit_code_0(after_restart: Restarted) -> None:
    assert after_restart.exit_code == 0


def test_the_size_of_micro_batches_is_measured_by_default(after_restart: Restarted) -> None:
    """`tests/conftest.py` states a size for most servers of the tests."""
    idle, busy = r"measured on one thread: micro-batches of (\d+) tokens", "measured later: the host was busy"
    found = wait_until(lambda: re.search(f"{idle}|{busy}", after_restart.server.output))
    assert found[1] in (None, "128", "256", "512", "1024")


def test_a_changed_setting_of_a_collection_survives_a_restart(restarted: Client) -> None:
    assert restarted.get_collection("plays").truncation == "start"


def test_collections_survive_a_restart(restarted: Client) -> None:
    (hit,) = restarted.search("books", "hunting whales")
    assert (hit.record.id, hit.record.text) == ("a", "a whale hunt")
    assert hit.record.metadata == {"year": 1851, "tags": ["sea"]}


def test_a_collection_refuses_another_model_of_the_same_name(restarted: Client) -> None:
    with pytest.raises(FailedPrecondition, match="another 'm'") as refused:
        restarted.search("plays", "whales")
    assert refused.value.reason == "MODEL_MISMATCH"
    assert [record.id for record in restarted.get("plays", ["a"])] == ["a"]


def test_a_damaged_collection_does_not_hide_the_others(restarted: Client) -> None:
    restarted.create_collection("good", dimensions=4)
    assert {found.name: found.problem for found in restarted.collections()} == {
        "bad": "the database of collection 'bad' is damaged; restore a backup",
        "books": "",
        "good": "",
        "plays": "",
    }
    with pytest.raises(Internal, match="'bad' is damaged"):
        restarted.count("bad")
    assert restarted.count("good") == 0
    restarted.delete_collection("bad")
    assert [found.name for found in restarted.collections()] == ["books", "good", "plays"]


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_no_acknowledged_record_is_lost_to_kill_9(tiny_bundle: Path, tmp_path: Path, seed: int) -> None:
    """Upserts run until the server is killed at a random moment; every acknowledged record must be stored whole."""
    server = ServerProcess({"tiny": tiny_bundle}, tmp_path)
    chance = random.Random(seed)
    acknowledged: dict[str, str] = {}
    attempted: dict[str, str] = {}
    enough = threading.Event()
    target = chance.randint(5, 60)

    def write() -> None:
        with Client(server.address, timeout=300) as client:
            client.create_collection("c", model="tiny")
            for number in range(100_000):
                batch = {f"id-{(number * 7 + i) % 150}": f"text {number} of id {i}" for i in range(3)}
                attempted.update(batch)
                try:
                    client.upsert("c", [{"id": key, "text": text} for key, text in batch.items()])
                except Unavailable:
                    return
                acknowledged.update(batch)
                if number == target:
                    enough.set()

    writer = threading.Thread(target=write)
    writer.start()
    assert enough.wait(300)
    server.kill()
    writer.join(300)
    assert not writer.is_alive()

    with ServerProcess({"tiny": tiny_bundle}, tmp_path) as again, Client(again.address) as client:
        stored = {record.id: record.text for record in client.records("c")}
        for key, text in acknowledged.items():
            # The batch in progress at the kill may have been written though its response did not arrive.
            assert stored[key] in (text, attempted[key])
        assert set(stored) <= set(attempted)
        last = next(reversed(acknowledged))
        assert any(hit.record.id == last for hit in client.search("c", stored[last], top_k=len(stored)))
