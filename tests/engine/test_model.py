"""Loading a model: folders that are no model, or differ from the exported one, are refused with the reason."""

from __future__ import annotations

import gc
import shutil
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from emberpc.bundle import Head, Manifest, Reference, finish_bundle, read_bundle
from emberpc.server.deadlines import Deadline
from emberpc.server.engine import Engine, Model, ModelLoadError, Registry
from emberpc.server.engine.models.encoders import Encoder, Encoders
from emberpc.server.engine.sessions import onnx_runtime
from emberpc.server.engine.sessions.onnx_runtime import OnnxSession
from emberpc.server.engine.sessions.session import LoadCancellation, SessionError
from emberpc.server.engine.tokenizing import TextTokenizer, TokenIds
from emberpc.server.errors import invalid


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the tiny bundle that a test may damage."""
    folder = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, folder)
    return folder


def resign(folder: Path) -> None:
    """Write a manifest that matches the changed files, as an attacker would."""
    manifest = Manifest.from_json((folder / "emberpc.json").read_text(encoding="utf-8"))
    finish_bundle(folder, manifest)


def refused(folder: Path) -> str:
    with pytest.raises(ModelLoadError) as error:
        Model.load("m", folder)
    assert str(error.value).startswith("model 'm': ")
    return str(error.value)


def test_a_valid_bundle_is_loaded(bundle: Path) -> None:
    model = Model.load("m", bundle)
    assert model.manifest.dimensions == 32
    assert model.size_bytes == (bundle / "onnx" / "model.onnx").stat().st_size


def test_an_unknown_variant_is_refused_with_a_list_of_the_variants(bundle: Path) -> None:
    with pytest.raises(ModelLoadError, match="the bundle has: fp32"):
        Model.load("m", bundle, "int8")


def test_other_weights_under_a_matching_manifest_are_refused(bundle: Path) -> None:
    path = bundle / "onnx" / "model.onnx"
    graph = onnx.load(str(path))
    embeddings = next(each for each in graph.graph.initializer if "word_embeddings" in each.name)
    values = np.frombuffer(embeddings.raw_data, dtype=np.float32)
    embeddings.raw_data = values[::-1].tobytes()
    onnx.save(graph, str(path))
    resign(bundle)
    assert "does not give the outputs that it gave at export" in refused(bundle)


def test_a_graph_without_the_output_is_refused(bundle: Path) -> None:
    path = bundle / "onnx" / "model.onnx"
    graph = onnx.load(str(path))
    kept = [output for output in graph.graph.output if output.name != "sentence_embedding"]
    del graph.graph.output[:]
    graph.graph.output.extend(kept)
    onnx.save(graph, str(path))
    resign(bundle)
    assert "it must have 'sentence_embedding'" in refused(bundle)


def test_a_graph_with_other_inputs_is_refused(bundle: Path) -> None:
    path = bundle / "onnx" / "model.onnx"
    graph = onnx.load(str(path))
    graph.graph.input[0].name = "pixels"
    for node in graph.graph.node:
        node.input[:] = ["pixels" if name == "input_ids" else name for name in node.input]
    onnx.save(graph, str(path))
    resign(bundle)
    assert "the roles of the inputs pixels are unknown; the server can give" in refused(bundle)


@pytest.mark.parametrize("name", ["onnx/model.onnx", "tokenizer.json", "reference.npz"])
def test_a_model_file_with_invalid_content_is_refused(bundle: Path, name: str) -> None:
    (bundle / name).write_bytes(b"rubbish")
    resign(bundle)
    message = refused(bundle)
    assert Path(name).name in message


def test_a_reference_of_another_shape_is_refused(bundle: Path) -> None:
    reference = read_bundle(bundle).reference()
    Reference(reference.texts, reference.vectors[:, :-1]).write(bundle)
    resign(bundle)
    assert "does not give the outputs" in refused(bundle)


@pytest.mark.parametrize("first", ["embedder", "classifier"])
def test_a_classifier_shares_the_encoder_that_it_was_made_on(
    bundle: Path, tiny_classifier_bundle: Path, first: str
) -> None:
    folders = {"embedder": bundle, "classifier": tiny_classifier_bundle}
    encoders = Encoders()
    models = {
        name: Model.load(name, folders[name], encoders=encoders)
        for name in sorted(folders, key=lambda name: name != first)
    }
    assert models["embedder"].encoder is models["classifier"].encoder
    batch = [np.array([2, 7, 8, 9, 3]), np.array([2, 11, 3])]
    shared = models["classifier"].finish(models["classifier"].encoder.run(batch))
    session = OnnxSession(tiny_classifier_bundle / "onnx" / "model.onnx")
    in_graph = Encoder(session, read_bundle(tiny_classifier_bundle).interface(session.graph), 0).run(batch)
    np.testing.assert_allclose(shared, in_graph, atol=1e-4)


def test_a_classifier_uses_the_reloaded_encoder_of_its_embedding_model(
    bundle: Path, tiny_classifier_bundle: Path
) -> None:
    with ThreadPoolExecutor(1) as pool:
        registry = Registry(pool)
        for name, folder in (("embedder", bundle), ("classifier", tiny_classifier_bundle)):
            registry.load(name, folder)
        old = weakref.ref(registry.get("embedder").encoder)
        reloaded = registry.load("embedder", bundle, fresh=True)
        assert registry.get("classifier").encoder is reloaded.encoder is not old()
        assert registry.get("classifier").head is not None
        pool.submit(gc.collect).result()  # after the tasks that released the old versions
        assert old() is None


@pytest.mark.usefixtures("convert_once")
def test_models_with_different_token_limits_share_no_encoder(tiny_source: Path, tmp_path: Path) -> None:
    from emberpc.export.embedding import export_embedding

    for name, limit in (("long", None), ("short", 8)):
        export_embedding(tiny_source, tmp_path / name, max_tokens=limit)
    encoders = Encoders()
    long, short = (Model.load("m", tmp_path / name, encoders=encoders) for name in ("long", "short"))
    assert long.fingerprint == short.fingerprint
    assert long.encoder is not short.encoder


def widened(encoder: Encoder, batch: list[TokenIds]) -> Encoder:
    """Run one text, and wait for the thread that this starts to load a session with several threads."""
    encoder.run(batch, threads=2)
    for thread in threading.enumerate():
        if thread.name == "widen":
            thread.join(300)
    return encoder


def test_a_run_on_several_threads_gives_equal_vectors(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Encoder, "_is_faster", lambda *_: True)
    encoder = Model.load("m", bundle).encoder
    batch, short = [np.array([2, *range(5, 30), 3])], [np.array([2, 7, 3])]
    one, other = encoder.run(batch), encoder.run(short)
    assert not encoder.wide
    assert widened(encoder, short).wide
    np.testing.assert_allclose(encoder.run(batch, threads=2), one, atol=1e-5)
    np.testing.assert_allclose(encoder.run(short, threads=2), other, atol=1e-5)


def test_several_threads_are_used_only_where_they_are_faster(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Model.load("m", bundle).encoder
    threads = iter((0.2, 0.1, 0.1, 0.3, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2))
    monkeypatch.setattr(encoder, "_seconds", lambda *_: next(threads))
    assert not widened(encoder, [np.array([2, 7, 3])]).wide


def test_a_session_that_fails_on_several_threads_is_not_used(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = Model.load("m", bundle).encoder
    run = encoder._run_on

    def fail(session: OnnxSession, batch: list[TokenIds]) -> object:
        if session is not encoder._session:
            raise RuntimeError("no memory is left")
        return run(session, batch)

    monkeypatch.setattr(encoder, "_run_on", fail)
    assert not widened(encoder, [np.array([2, 7, 3])]).wide
    assert "fails on 2 threads; single texts run on one core" in caplog.text
    assert encoder.run([np.array([2, 7, 3])], threads=2).shape[0] == 1


def test_a_model_with_a_failing_tokenizer_is_refused(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise invalid("texts[0]", "has no token that the model knows; give it some text")

    monkeypatch.setattr(TextTokenizer, "tokenize", fail)
    with pytest.raises(ModelLoadError, match="loads but does not run"):
        Model.load("m", bundle)


def test_no_session_is_made_from_a_model_file_that_was_replaced(bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle, tmp_path / "copy")
    encoder = Model.load("m", tmp_path / "copy").encoder
    path = tmp_path / "copy" / "onnx" / "model.onnx"
    # The same model with an unknown field can be loaded, but its bytes differ.
    path.with_suffix(".new").write_bytes(path.read_bytes() + b"\xfa\x3f\x00")
    path.with_suffix(".new").rename(path)
    assert not widened(encoder, [np.array([2, 7, 3])]).wide
    path.unlink()
    with pytest.raises(SessionError):
        OnnxSession(path)


class SlowLoading:
    """Blocks the loading of the session with several threads until `go_on` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.probed = False
        load, seconds = OnnxSession.with_threads, Encoder._seconds

        def slow(session: OnnxSession, threads: int, cancellation: LoadCancellation | None = None) -> OnnxSession:
            self.begun.set()
            assert self.go_on.wait(300)
            return load(session, threads, None)  # as with an ONNX Runtime that cannot cancel

        def probe(encoder: Encoder, session: OnnxSession, batch: Sequence[TokenIds]) -> float:
            self.probed = True
            return seconds(encoder, session, batch)

        monkeypatch.setattr(OnnxSession, "with_threads", slow)
        monkeypatch.setattr(Encoder, "_seconds", probe)


def test_closing_an_encoder_ends_its_session_loading_thread(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, batch = Model.load("m", bundle).encoder, [np.array([2, 7, 3])]
    loading = SlowLoading(monkeypatch)
    encoder.run(batch, threads=2)
    assert loading.begun.wait(300)
    assert not encoder.close(Deadline(0))
    loading.go_on.set()
    assert encoder.close(Deadline(30))
    assert not loading.probed
    assert not encoder.wide
    assert encoder.run(batch, threads=2).shape == (1, 32)


def test_a_closed_encoder_starts_no_thread(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Model.load("m", bundle).encoder
    loading = SlowLoading(monkeypatch)
    assert encoder.close(Deadline(0))
    encoder.run([np.array([2, 7, 3])], threads=2)
    assert not loading.begun.is_set()


def test_an_engine_closes_encoders_of_replaced_versions(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ThreadPoolExecutor(1) as pool:
        engine = Engine(Registry(pool), pool, workers=1, batch_tokens=64, max_queue_tokens=1000)
        loading = SlowLoading(monkeypatch)
        engine.registry.load("m", bundle).encoder.run([np.array([2, 7, 3])], threads=2)
        assert loading.begun.wait(300)
        engine.registry.load("m", bundle, fresh=True)
        assert not engine.close(Deadline(0))
        loading.go_on.set()
        assert engine.close(Deadline(30))
    assert "widen" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.skipif(
    not hasattr(ort.SessionOptions, "set_load_cancellation_flag"), reason="ONNX Runtime before 1.22 cannot cancel"
)
def test_loading_a_session_can_be_cancelled(bundle: Path) -> None:
    path, cancellation = bundle / "onnx" / "model.onnx", LoadCancellation()
    OnnxSession(path, cancellation=cancellation)
    cancellation.cancel()
    with pytest.raises(SessionError):
        OnnxSession(path, cancellation=cancellation)


def test_a_run_succeeds_if_no_thread_can_be_started(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, batch = Model.load("m", bundle).encoder, [np.array([2, 7, 3])]

    def no_thread(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as full:
        full.setattr(threading.Thread, "start", no_thread)
        assert encoder.run(batch, threads=2).shape == (1, 32)
    monkeypatch.setattr(Encoder, "_is_faster", lambda *_: True)
    assert widened(encoder, batch).wide


def test_a_damaged_head_is_refused(tiny_classifier_bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "classifier"
    shutil.copytree(tiny_classifier_bundle, folder)
    Head(np.zeros((32, 3), dtype=np.float32), np.zeros(3, dtype=np.float32)).write(folder)
    resign(folder)
    assert "has the shape (32, 3), not (32, 2)" in refused(folder)
    Head(np.zeros((32, 2), dtype=np.float32), np.zeros(2, dtype=np.float32)).write(folder)
    resign(folder)
    assert "does not give the outputs that it gave at export" in refused(folder)
    (folder / "head.npz").write_bytes(b"PK no archive")
    resign(folder)
    assert "cannot be read as a head" in refused(folder)


def test_no_layer_normalization_is_fused_with_an_addition(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime's fused operator takes four times the CPU time of the two operators."""
    options = onnx_runtime._options

    def writing(threads: int) -> ort.SessionOptions:
        found = options(threads)
        found.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        return found

    monkeypatch.setattr(onnx_runtime, "_options", writing)
    OnnxSession(bundle / "onnx" / "model.onnx", 1)
    operators = {node.op_type for node in onnx.load(str(tmp_path / "optimized.onnx")).graph.node}
    assert "LayerNormalization" in operators
    assert "BiasGelu" in operators  # other fusions are made
    assert not any("SkipLayerNormalization" in operator for operator in operators)
