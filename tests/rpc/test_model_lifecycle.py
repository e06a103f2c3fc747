"""Models that change while the server runs: no call fails, no response mixes two models, and old ones are freed."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest

from emberpc.client import (
    AlreadyExists,
    AsyncClient,
    Client,
    EmberpcError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
)
from emberpc.server.engine import Model
from emberpc.v1 import embedding_pb2, embedding_pb2_grpc, model_pb2, model_pb2_grpc
from emberpc.wire import vectors
from examples.server_process import ServerProcess
from waiting import wait_until

TEXT = "a cab is here"


def expected(folder: Path) -> tuple[str, np.ndarray]:
    """Return a bundle's fingerprint and its vector of TEXT."""
    model = Model.load("m", folder)
    encoding = model.tokenizer._tokenizer.encode(TEXT)
    return model.fingerprint, model.encoder.run([np.array(encoding.ids)])[0]


def copied(tiny_bundle: Path, other_tiny_bundle: Path, folder: Path) -> Path:
    """Return a models directory with the bundles `a` and `b`."""
    shutil.copytree(tiny_bundle, folder / "a")
    shutil.copytree(other_tiny_bundle, folder / "b")
    return folder


@pytest.fixture(scope="module")
def admin_models(tiny_bundle: Path, other_tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the models directory of the server `admin`, with the bundles `a` and `b`."""
    return copied(tiny_bundle, other_tiny_bundle, tmp_path_factory.mktemp("admin") / "models")


@pytest.fixture(scope="module")
def admin_process(admin_models: Path) -> Iterator[ServerProcess]:
    data_dir = admin_models.parent / "data"
    with ServerProcess({}, data_dir, "--models-dir", str(admin_models), "--model-admin") as process:
        yield process
    assert "Traceback" not in process.output


@pytest.fixture
def admin(admin_process: ServerProcess) -> Iterator[ServerProcess]:
    """A server whose models callers may change; the models and collections of a test are removed afterwards."""
    yield admin_process
    with Client(admin_process.address) as client:
        for collection in client.collections():
            client.delete_collection(collection.name)
        for model in client.models():
            if model.name not in ("a", "b"):
                client.unload_model(model.name)
        assert [model.name for model in client.models()] == ["a", "b"]


@pytest.fixture
def connected(admin: ServerProcess) -> Iterator[Client]:
    with Client(admin.address) as client:
        yield client


def test_reloads_under_load_fail_no_call_and_mix_no_vectors(
    admin: ServerProcess, connected: Client, admin_models: Path
) -> None:
    wanted = dict(expected(admin_models / name) for name in "ab")
    connected.load_model("m", "a")
    responses: list[embedding_pb2.EmbedResponse] = []
    failures: list[grpc.RpcError] = []
    stop = threading.Event()

    def load() -> None:
        with grpc.insecure_channel(admin.address) as channel:
            stub = embedding_pb2_grpc.EmbeddingServiceStub(channel)
            while not stop.is_set():
                try:
                    responses.append(stub.Embed(embedding_pb2.EmbedRequest(model="m", texts=[TEXT] * 3), timeout=300))
                except grpc.RpcError as error:
                    failures.append(error)

    callers = [threading.Thread(target=load) for _ in range(4)]
    for caller in callers:
        caller.start()
    served = []
    for i in range(6):
        before = len(responses)
        wait_until(lambda before=before: failures or len(responses) > before + 5)  # type: ignore[misc]  # the default's type
        served.append(connected.reload_model("m", "ba"[i % 2]).fingerprint)
    stop.set()
    for caller in callers:
        caller.join(300)

    assert failures == []
    assert served == [fingerprint for _ in range(3) for fingerprint in reversed(wanted)]
    assert {response.model.fingerprint for response in responses} == set(wanted)
    for response in responses:
        for row in vectors.decode(response.embeddings):
            assert np.allclose(row, wanted[response.model.fingerprint], atol=1e-5)


def test_a_failed_reload_keeps_the_old_model_serving(connected: Client, admin_models: Path) -> None:
    before = connected.embed([TEXT], model="a")
    tokenizer = admin_models / "a" / "tokenizer.json"
    whole = tokenizer.read_bytes()
    try:
        tokenizer.write_text("{}")
        with pytest.raises(
            FailedPrecondition, match=r"model 'a': .*tokenizer\.json has 2 bytes.*export the model again"
        ):
            connected.reload_model("a")
        with pytest.raises(FailedPrecondition, match="no variant 'int8'; the bundle has: fp32") as refused:
            connected.reload_model("a", "b", variant="int8")
        assert refused.value.reason == "MODEL_UNFIT"
        assert np.array_equal(connected.embed([TEXT], model="a"), before)
        with pytest.raises(FailedPrecondition):
            connected.load_model("c", "a")
    finally:
        tokenizer.write_bytes(whole)
    assert [model.name for model in connected.models()] == ["a", "b"]


def test_load_reports_stages_and_the_state_of_the_model(admin: ServerProcess, connected: Client) -> None:
    with grpc.insecure_channel(admin.address) as channel:
        stub = model_pb2_grpc.ModelServiceStub(channel)
        messages = list(stub.LoadModel(model_pb2.LoadModelRequest(name="m", path="b")))
    assert [message.stage for message in messages] == [
        "checking the files",
        "loading the weights",
        "warming up",
        "ready",
    ]
    assert [message.model.state for message in messages] == [model_pb2.MODEL_STATE_LOADING] * 3 + [
        model_pb2.MODEL_STATE_READY
    ]
    assert {message.model.name for message in messages} == {"m"}
    assert messages[-1].model.fingerprint == connected.get_model("b").fingerprint
    stages: list[str] = []
    assert connected.reload_model("m", progress=stages.append).state == "ready"
    assert stages[-1] == "ready"


async def test_the_asynchronous_client_loads_reloads_and_unloads_models(admin: ServerProcess) -> None:
    stages: list[str] = []
    async with AsyncClient(admin.address) as client:
        loaded = await client.load_model("m", "a", progress=stages.append)
        assert (loaded.name, loaded.variant, stages[-1]) == ("m", "fp32", "ready")
        assert (await client.reload_model("m", "b")).fingerprint != loaded.fingerprint
        await client.unload_model("m")
        with pytest.raises(NotFound):
            await client.reload_model("m")
        assert (await client.load_model("m", "b")).name == "m"


def test_an_unloaded_model_finishes_its_calls(minilm_bundle: Path, tmp_path: Path) -> None:
    texts = [f"text number {i} " + "word " * (i % 30) for i in range(150)]
    with ServerProcess({"m": minilm_bundle}, tmp_path, "--model-admin") as server:
        with grpc.insecure_channel(server.address) as channel:
            stub = embedding_pb2_grpc.EmbeddingServiceStub(channel)
            long = stub.Embed.future(embedding_pb2.EmbedRequest(texts=texts))
            # The response to a later call on the same connection shows that the long call has arrived.
            stub.CountTokens(embedding_pb2.CountTokensRequest(texts=["short"]))
            assert not long.done()
            model_pb2_grpc.ModelServiceStub(channel).UnloadModel(model_pb2.UnloadModelRequest(name="m"))
            assert long.result(300).embeddings.rows == 150
        with Client(server.address) as client:
            calls: tuple[Callable[[], object], ...] = (
                lambda: client.embed(["a"]),
                lambda: client.count_tokens(["a"]),
            )
            for call in calls:
                with pytest.raises(FailedPrecondition) as refused:
                    call()
                assert refused.value.reason == "NO_MODEL"
            with pytest.raises(NotFound):
                client.unload_model("m")
            assert client.models() == []


def test_concurrent_loads_of_one_name_run_one_after_the_other(connected: Client) -> None:
    outcomes: list[str] = []

    def load() -> None:
        try:
            outcomes.append(connected.load_model("m", "a").name)
        except AlreadyExists as error:
            outcomes.append(error.reason)

    callers = [threading.Thread(target=load) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(300)
    assert sorted(outcomes) == ["MODEL_EXISTS", "MODEL_EXISTS", "m"]


def test_a_load_continues_after_its_call_is_cancelled(admin: ServerProcess, connected: Client) -> None:
    with grpc.insecure_channel(admin.address) as channel:
        call = model_pb2_grpc.ModelServiceStub(channel).LoadModel(model_pb2.LoadModelRequest(name="m", path="a"))
        next(call)
        call.cancel()
    wait_until(lambda: "m" in [model.name for model in connected.models()])


def test_paths_outside_the_models_directory_are_refused(
    connected: Client, admin_models: Path, tiny_bundle: Path
) -> None:
    (admin_models / "link").symlink_to(tiny_bundle)
    for path in ("../data", str(tiny_bundle), "link", "link/onnx", ""):
        with pytest.raises(InvalidArgument) as refused:
            connected.load_model("m", path)
        assert [violation.field for violation in refused.value.violations] == ["path"]
        if path:
            with pytest.raises(InvalidArgument):
                connected.reload_model("a", path)


def test_without_a_models_directory_only_reloads_of_the_same_folder_are_allowed(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    with (
        ServerProcess({"m": tiny_bundle}, tmp_path, "--model-admin") as server,
        Client(server.address) as client,
    ):
        before = client.get_model("m").load_time
        after = client.reload_model("m").load_time
        assert before is not None
        assert after is not None
        assert after > before
        calls: tuple[Callable[[], object], ...] = (
            lambda: client.load_model("n", "tiny"),
            lambda: client.reload_model("m", "tiny"),
        )
        for call in calls:
            with pytest.raises(FailedPrecondition, match="start it with --models-dir") as refused:
                call()
            assert refused.value.reason == "NO_MODELS_DIR"


@pytest.fixture(scope="module")
def watched_models(tiny_bundle: Path, other_tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models directory of the server `watching`, with the bundle `a`, the hidden bundle `.b` and an invalid one."""
    folder = copied(tiny_bundle, other_tiny_bundle, tmp_path_factory.mktemp("watched") / "models")
    shutil.move(folder / "b", folder / ".b")
    (folder / "bad").mkdir()
    (folder / "bad" / "emberpc.json").write_text("{")
    return folder


@pytest.fixture(scope="module")
def watching(
    watched_models: Path, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """A server that watches its models directory, and whose models callers may not change."""
    flags = ("--models-dir", str(watched_models), "--watch-models", "0.05")
    with ServerProcess({"pinned": tiny_bundle}, tmp_path_factory.mktemp("data"), *flags) as process:
        yield process


def test_changes_of_models_are_refused_without_model_admin(watching: ServerProcess) -> None:
    with Client(watching.address) as client:
        calls: tuple[Callable[[], object], ...] = (
            lambda: client.load_model("m", "a"),
            lambda: client.reload_model("a"),
            lambda: client.unload_model("a"),
        )
        before = client.models()
        for call in calls:
            with pytest.raises(PermissionDenied, match="start it with --model-admin"):
                call()
        assert client.models() == before
        assert [model.name for model in before] == ["a", "pinned"]


def test_a_collection_refuses_another_model_of_its_name(connected: Client) -> None:
    connected.load_model("m", "a")
    connected.create_collection("books", model="m")
    connected.upsert("books", [{"id": "1", "text": TEXT}])
    connected.reload_model("m", "b")
    with pytest.raises(FailedPrecondition, match="another 'm'") as refused:
        connected.search("books", TEXT)
    assert refused.value.reason == "MODEL_MISMATCH"
    connected.reload_model("m", "a")
    (hit,) = connected.search("books", TEXT)
    assert hit.record.id == "1"


def test_a_watched_models_directory_loads_reloads_and_unloads_models(
    watching: ServerProcess, watched_models: Path, other_tiny_bundle: Path
) -> None:
    models = watched_models
    with Client(watching.address) as client:

        def fingerprints() -> dict[str, str]:
            return {model.name: model.fingerprint for model in client.models()}

        assert sorted(fingerprints()) == ["a", "pinned"]
        first = fingerprints()["a"]
        (models / ".b").rename(models / "b")
        wait_until(lambda: "b" in fingerprints())

        staged = models / ".a"
        shutil.copytree(other_tiny_bundle, staged)
        shutil.move(models / "a", models / ".old")
        staged.rename(models / "a")
        wait_until(lambda: fingerprints()["a"] != first)

        shutil.rmtree(models / "b")
        wait_until(lambda: "b" not in fingerprints())
        assert sorted(fingerprints()) == ["a", "pinned"]
        assert watching.output.count(f"{models / 'bad'} is not served") == 1


def test_a_missing_models_directory_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="there is no folder"):
        ServerProcess({}, tmp_path, "--models-dir", str(tmp_path / "none"))


def resident_bytes(process_id: int) -> int:
    """Return the memory of a process that is resident."""
    status = Path(f"/proc/{process_id}/status").read_text(encoding="ascii")
    (line,) = [line for line in status.splitlines() if line.startswith("VmRSS:")]
    return int(line.split()[1]) * 1024


@pytest.mark.slow
def test_the_memory_of_replaced_models_is_returned(minilm_bundle: Path, tmp_path: Path) -> None:
    """Ten reloads of a model of 90 MB; the replaced versions also served calls that failed."""
    texts = [f"text number {i} " + "word " * (i % 50) for i in range(64)]
    with ServerProcess({"m": minilm_bundle}, tmp_path, "--model-admin") as server, Client(server.address) as client:

        def work() -> None:
            client.embed(texts)
            with pytest.raises(EmberpcError):
                client.embed(["word " * 1000])

        def settled(bound: float) -> bool:
            work()  # a worker keeps its last batch until it gets another one
            return resident_bytes(server.process.pid) < bound

        client.reload_model("m")
        # Two versions of the model alone take more than 180 MB.
        wait_until(lambda: settled(320 * 2**20))
        first = resident_bytes(server.process.pid)
        for _ in range(10):
            client.reload_model("m")
            wait_until(lambda: settled(first + 70 * 2**20))  # less than one version; the calls alone use 50 MB
