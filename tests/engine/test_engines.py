"""OpenVINO runs the same models as ONNX Runtime: the same vectors, the same errors, the same server."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from emberpc.bundle.contents import Contents
from emberpc.client import Client
from emberpc.server.engine import Model, ModelLoadError, Registry, Runtimes
from emberpc.server.engine.models.encoders import _ROWS, Encoder
from emberpc.server.engine.models.extremes import fault_at_the_limits
from emberpc.server.engine.priority import lower_priority
from emberpc.server.engine.sessions.runtime import Runtime
from emberpc.server.engine.sessions.session import Feeds, LoadCancellation, Session, SessionError
from emberpc.server.engine.tokenizing import TextTokenizer, TokenIds
from examples.server_process import ServerProcess
from fixtures_bundles import save_with_external_weights

# Not `openvino` itself, whose import sends a usage event.
ov = pytest.importorskip("emberpc.server.engine.sessions.openvino", reason="the extra openvino is not installed").ov

HAS_BF16 = "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
needs_bf16 = pytest.mark.skipif(not HAS_BF16, reason="this processor has no bf16 instructions")
OPENVINO = Runtime("openvino", streams=2)


def with_engine(engine: str, precision: str = "fp32", streams: int = 2) -> Runtimes:
    return Runtimes({"": engine}, {"": precision}, streams)


#: Batches of several shapes: a text alone, padding, texts of equal length, a long text.
BATCHES = [
    [np.array([2, 7, 3])],
    [np.array([2, 7, 8, 9, 10, 3]), np.array([2, 11, 3]), np.array([2, 3])],
    [np.array([2, 5 + row, 3]) for row in range(20)],
    [np.array([2, *range(5, 30), 3])],
]


@pytest.mark.parametrize("name", ["tiny_bundle", "tiny_classifier_bundle", "other_tiny_bundle"])
def test_both_engines_give_the_same_outputs(name: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(name)
    first, second = Model.load("m", folder), Model.load("m", folder, runtimes=with_engine("openvino"))
    assert first.fingerprint == second.fingerprint
    assert first.classifier_fingerprint == second.classifier_fingerprint
    for batch in [*BATCHES, *reversed(BATCHES)]:
        expected, got = (model.finish(model.encoder.run(batch)) for model in (first, second))
        np.testing.assert_allclose(got, expected, atol=2e-5)


@needs_bf16
def test_bf16_gives_nearly_the_same_vectors_and_another_fingerprint(tiny_bundle: Path) -> None:
    exact, rounded = (
        Model.load("m", tiny_bundle, runtimes=with_engine("openvino", precision)) for precision in ("fp32", "bf16")
    )
    for batch in BATCHES:
        expected, got = exact.encoder.run(batch), rounded.encoder.run(batch)
        assert got.dtype == np.float32
        assert not np.array_equal(got, expected)
        np.testing.assert_allclose(got, expected, atol=0.05)
    assert exact.fingerprint != rounded.fingerprint
    assert exact.legacy_fingerprint
    assert not rounded.legacy_fingerprint


def test_bf16_is_refused_on_a_processor_without_it(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class OldProcessor:
        def __init__(self) -> None:
            self._core = core()

        def get_property(self, _device: str, _name: str) -> list[str]:
            return ["FP32", "INT8"]

        def __getattr__(self, name: str) -> object:
            return getattr(self._core, name)

    core = ov.Core
    monkeypatch.setattr(ov, "Core", OldProcessor)
    with pytest.raises(ModelLoadError, match="the processor has no bf16 instructions; serve .* --precision fp32"):
        Model.load("m", tiny_bundle, runtimes=with_engine("openvino", "bf16"))
    assert Model.load("m", tiny_bundle, runtimes=with_engine("openvino")).encoder


def test_bf16_is_refused_with_onnx_runtime(tiny_bundle: Path) -> None:
    with pytest.raises(ModelLoadError, match="--precision bf16 needs --engine openvino"):
        Model.load("m", tiny_bundle, runtimes=with_engine("onnxruntime", "bf16"))


@pytest.mark.parametrize(("engine", "precision"), [("openvino", "fp32"), ("auto", "bf16")])
def test_without_the_package_the_error_names_extra_and_flags(
    engine: str, precision: str, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.delitem(sys.modules, "emberpc.server.engine.sessions.openvino", raising=False)
    with pytest.raises(ModelLoadError) as caught:
        Model.load("m", tiny_bundle, runtimes=with_engine(engine, precision))
    assert "--engine openvino and --precision bf16 need the extra `openvino`, which is not installed" in str(
        caught.value
    )
    assert (
        "install 'emberpc[server,openvino]', or serve the model with --engine onnxruntime and --precision fp32"
        in str(caught.value)
    )


def test_a_package_that_cannot_be_imported_is_an_error_of_the_engine(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "emberpc.server.engine.sessions.openvino":
                raise ImportError("libtbb.so.12: cannot open shared object file")

    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    monkeypatch.delitem(sys.modules, "emberpc.server.engine.sessions.openvino", raising=False)
    with pytest.raises(SessionError, match=r"cannot be imported \(libtbb.so.12: .*--engine onnxruntime"):
        OPENVINO.open(tiny_bundle / "onnx" / "model.onnx", Contents())


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x07" * 40])
def test_a_file_that_is_no_model_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(SessionError, match="model.onnx"):
        OPENVINO.open(path, Contents())


def test_external_weights_are_refused_with_the_remedy(tiny_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes((tiny_bundle / "onnx" / "model.onnx").read_bytes())
    save_with_external_weights(path, "model.onnx.data")
    with pytest.raises(SessionError, match="serve the model with --engine onnxruntime"):
        OPENVINO.open(path, Contents())


def test_both_engines_describe_the_same_inputs_and_outputs(tiny_bundle: Path) -> None:
    path = tiny_bundle / "onnx" / "model.onnx"
    first, second = Runtime().open(path, Contents()).graph, OPENVINO.open(path, Contents()).graph
    for one, other in ((first.inputs, second.inputs), (first.outputs, second.outputs)):
        assert [(each.name, each.type, len(each.shape)) for each in one] == [
            (each.name, each.type, len(each.shape)) for each in other
        ]
    names = [node.name for node in onnx.load(path).graph.output]
    assert [each.name for each in second.outputs] == names


def test_a_failed_run_leaves_the_session_usable(tiny_bundle: Path) -> None:
    session = OPENVINO.open(tiny_bundle / "onnx" / "model.onnx", Contents())
    feeds = {each.name: np.ones((1, 3), dtype=np.int64) for each in session.graph.inputs}
    name = session.graph.outputs[0].name
    expected = session.run(feeds, name)
    with pytest.raises(RuntimeError):
        session.run({**feeds, "no_such_input": np.ones((1, 3), dtype=np.int64)}, name)
    np.testing.assert_array_equal(session.run(feeds, name), expected)


@pytest.fixture
def foreign(tiny_bundle: Path, tmp_path: Path) -> Path:
    """The tiny encoder as another exporter writes it, without a manifest."""
    folder = tmp_path / "foreign"
    shutil.copytree(tiny_bundle, folder)
    (folder / "emberpc.json").unlink()
    return folder


def test_a_foreign_folder_is_served_by_both_engines(foreign: Path) -> None:
    first, second = Model.load("m", foreign), Model.load("m", foreign, runtimes=with_engine("openvino"))
    assert first.fingerprint == second.fingerprint
    np.testing.assert_allclose(second.encoder.run(BATCHES[1]), first.encoder.run(BATCHES[1]), atol=2e-5)


def test_openvino_is_refused_for_more_tokens_than_the_model_has_positions(foreign: Path) -> None:
    """ONNX Runtime fails on such a text. OpenVINO may give an arbitrary vector."""
    longer = {"max_tokens": "40"}
    with pytest.raises(ModelLoadError, match="loads but does not run"):
        Model.load("m", foreign, options=longer)
    # OpenVINO fails, or gives a vector; that it is another one alone and in a batch is found, too.
    with pytest.raises(ModelLoadError, match=r"a text of 40 tokens|another vector in a batch|does not run"):
        Model.load("m", foreign, options=longer, runtimes=with_engine("openvino"))
    exact = Model.load("m", foreign).encoder
    tokenizer = TextTokenizer(foreign / "tokenizer.json", 40)
    assert "fails for a text of 40 tokens in ONNX Runtime" in fault_at_the_limits(tokenizer, exact, exact, "fp32")


def test_openvino_is_refused_for_a_tokenizer_with_ids_that_the_model_does_not_know(foreign: Path) -> None:
    path = foreign / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    added = dict(tokenizer["added_tokens"][-1], content="<new>", id=1000)
    path.write_text(json.dumps({**tokenizer, "added_tokens": [*tokenizer["added_tokens"], added]}))
    assert Model.load("m", foreign).tokenizer.highest_id >= 39
    with pytest.raises(ModelLoadError, match=r"fails for the token id \d+ in ONNX Runtime"):
        Model.load("m", foreign, runtimes=with_engine("openvino"))


def test_a_session_can_be_made_after_its_file_is_gone(tiny_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes((tiny_bundle / "onnx" / "model.onnx").read_bytes())
    session = OPENVINO.open(path, Contents())
    path.unlink()
    feeds = {each.name: np.ones((1, 3), dtype=np.int64) for each in session.graph.inputs}
    name = session.graph.outputs[0].name
    np.testing.assert_allclose(session.with_threads(2).run(feeds, name), session.run(feeds, name), atol=1e-6)
    cancelled = LoadCancellation()
    cancelled.cancel()
    with pytest.raises(SessionError, match="cancelled"):
        session.with_threads(2, cancelled)


@pytest.mark.parametrize(("engine", "few"), [("openvino", True), ("onnxruntime", False)])
def test_openvino_gets_few_shapes_of_batches_within_the_length_limit(
    tiny_bundle: Path, engine: str, few: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model.load("m", tiny_bundle, runtimes=with_engine(engine))
    encoder, limit, shapes = model.encoder, model.manifest.max_tokens, set[tuple[int, ...]]()
    run = encoder._session.run

    def watched(feeds: Feeds, output: str) -> Any:
        shapes.add(feeds["input_ids"].shape)
        return run(feeds, output)

    monkeypatch.setattr(encoder._session, "run", watched)
    lengths = range(1, limit + 1)
    for length in lengths:
        alone = encoder.run([np.full(length, 5)])
        np.testing.assert_allclose(alone, encoder.run([np.full(length, 5), np.array([2])])[:1], atol=2e-5)
    assert max(length for _, length in shapes) == limit
    assert len(shapes) <= len(lengths) / 2 if few else len(shapes) == 2 * len(lengths)
    assert {encoder.rows(texts) for texts in range(1, 65)} == {each for each in _ROWS if each <= 64} if few else True


def test_many_threads_get_their_own_outputs(tiny_bundle: Path) -> None:
    model = Model.load("m", tiny_bundle, runtimes=with_engine("openvino"))
    batches = [[np.array([2, 5 + row % 20, 6 + row % 7, 3])] for row in range(60)]
    expected = [model.encoder.run(batch) for batch in batches]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(model.encoder.run, batches))
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_allclose(other, one, atol=1e-6)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has priorities of threads")
def test_the_threads_of_openvino_have_the_priority_of_workers(tiny_bundle: Path) -> None:
    def priorities() -> dict[str, int]:
        return {
            task.name: os.getpriority(os.PRIO_PROCESS, int(task.name)) for task in Path("/proc/self/task").iterdir()
        }

    def low_priority() -> int:
        lower_priority()
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    before = priorities()
    session = OPENVINO.open(tiny_bundle / "onnx" / "model.onnx", Contents())
    new = {priority for task, priority in priorities().items() if task not in before}
    with ThreadPoolExecutor(1) as pool:
        assert new == {pool.submit(low_priority).result()}
    assert session.max_runs


def test_a_run_that_finds_no_free_stream_uses_the_second_session(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A short text beside bulk batches must not wait for their end."""
    encoder = Model.load("m", tiny_bundle, runtimes=with_engine("openvino", streams=1)).encoder
    batch, inside, go_on = [np.array([2, 7, 3])], threading.Event(), threading.Event()
    expected, run = encoder.run(batch), Encoder._run_on
    first = encoder._session

    def slow(self: Encoder, session: Session, texts: list[TokenIds]) -> object:
        if session is first and threading.current_thread().name.startswith("bulk"):
            inside.set()
            assert go_on.wait(300)
        used.append(session)
        return run(self, session, texts)

    used: list[Session] = []
    monkeypatch.setattr(Encoder, "_run_on", slow)
    with ThreadPoolExecutor(1, thread_name_prefix="bulk") as pool:
        bulk = pool.submit(encoder.run, batch)
        assert inside.wait(300)
        encoder.run(batch)  # the second session is loaded now
        assert encoder._widener is not None
        encoder._widener.join(300)
        used.clear()
        np.testing.assert_allclose(encoder.run(batch), expected, atol=1e-6)
        assert used == [encoder._wide]
        go_on.set()
        bulk.result(300)
    used.clear()
    encoder.run(batch)
    assert used == [first]


def test_a_run_in_the_second_session_leaves_the_stream_of_the_first_session_free(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = Model.load("m", tiny_bundle, runtimes=with_engine("openvino", streams=1)).encoder
    encoder.close()  # so that no thread replaces the second session
    encoder._wide, encoder._wide_is_faster = encoder._session.with_threads(2), True
    entered, leave, used = threading.Event(), threading.Event(), []

    def run(session: Session, batch: list[TokenIds]) -> None:
        used.append(session)
        if len(used) == 1:
            entered.set()
            assert leave.wait(300)

    monkeypatch.setattr(encoder, "_run_on", run)
    with ThreadPoolExecutor(1) as pool:
        single = pool.submit(encoder.run, [np.array([2, 3])], 2)
        assert entered.wait(300)
        encoder.run([np.array([2, 4, 3])])
        leave.set()
        single.result()
    assert used == [encoder._wide, encoder._session]


def test_models_with_the_same_engine_share_an_encoder(tiny_bundle: Path, tiny_classifier_bundle: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        registry = Registry(pool, Runtimes({"": "openvino", "c": "onnxruntime"}, {"": "fp32"}, 2))
        for name, folder in (("a", tiny_bundle), ("b", tiny_bundle), ("c", tiny_bundle)):
            registry.load(name, folder)
        encoders = [registry.get(name).encoder for name in "abc"]
        assert encoders[0] is encoders[1]
        assert encoders[0] is not encoders[2]
        registry.close()


def test_a_server_runs_each_model_with_its_engine(tiny_bundle: Path, tmp_path: Path) -> None:
    options = ("--engine", "openvino", "--engine", "b=onnxruntime", "--precision", "fp32")
    with ServerProcess({"a": tiny_bundle, "b": tiny_bundle}, tmp_path, *options) as server:
        client = Client(server.address, timeout=300)
        assert [(m.name, m.engine, m.precision) for m in client.models()] == [
            ("a", "openvino", "fp32"),
            ("b", "onnxruntime", "fp32"),
        ]
        texts = ["a kitten", "a kitten sleeps on the mat", "mat"]
        one, other = (client.embed(texts, model=name) for name in "ab")
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), atol=2e-5)
        client.close()


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_engines_send_no_usage_events(engine: str, tiny_bundle: Path, tmp_path: Path) -> None:
    """By default, both packages send events when they are imported, and keep an id in the home directory."""
    script = f"""
import socket, sys
def refuse(*_): print("CONNECT")
socket.socket.connect = socket.getaddrinfo = refuse
from pathlib import Path
from emberpc.server.engine import Model, Runtimes
model = Model.load("m", Path({str(tiny_bundle)!r}), runtimes=Runtimes({{"": {engine!r}}}, {{"": "fp32"}}))
print(model.plan.runtime.engine)
"""
    assert run_at_home(tmp_path, script) == [engine]
    assert list(tmp_path.iterdir()) == []


def test_the_export_sends_no_usage_events(tmp_path: Path) -> None:
    assert run_at_home(tmp_path, "import emberpc.export.convert.onnx_runner; print('done')") == ["done"]
    assert list(tmp_path.iterdir()) == []


def run_at_home(home: Path, script: str) -> list[str]:
    """Run a Python script in a process with another home directory; return the words that it prints."""
    kept = {
        name: value for name, value in os.environ.items() if name not in ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME")
    }
    environment = {**kept, "HOME": str(home)}
    return subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    ).stdout.split()
