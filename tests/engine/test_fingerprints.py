"""Models share an encoder only if the bytes of their files give equal vectors; manifests alone do not decide that."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper

from emberpc.bundle import (
    Bundle,
    FileEntry,
    Head,
    Manifest,
    RejectionScore,
    ScopeVectors,
    finish_bundle,
    read_bundle,
)
from emberpc.bundle.contents import Contents
from emberpc.bundle.reading import sha256_of
from emberpc.server.engine import Model, ModelLoadError, Registry
from emberpc.server.engine.sessions import runtime, shared_tables
from emberpc.server.engine.sessions.onnx_runtime import OnnxSession
from emberpc.server.engine.sessions.session import SessionError
from fixtures_bundles import save_with_external_weights

MODEL = Path("onnx") / "model.onnx"
#: Fingerprint of the committed classifier, if the fingerprint of its encoder is "e".
FINGERPRINT = "355302c21e45689b630859f5f243377ddadc31a636f15878513752cf3dd3d075"


@pytest.fixture
def registry() -> Iterator[Registry]:
    with ThreadPoolExecutor(1) as pool:
        yield Registry(pool)


def forged(folder: Path, tiny_bundle: Path) -> None:
    """Write a manifest with the hashes of the files, but with the weights hash of the tiny bundle."""
    claimed = read_bundle(tiny_bundle).manifest.weights_sha256
    manifest = Manifest.from_json((folder / "emberpc.json").read_text(encoding="utf-8"))
    finish_bundle(folder, replace(manifest, weights_sha256=claimed))


@pytest.fixture
def copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    shutil.copytree(tiny_bundle, folder)
    return folder


def test_a_copy_shares_the_encoder(registry: Registry, tiny_bundle: Path, copy: Path) -> None:
    first, second = registry.load("first", tiny_bundle), registry.load("second", copy)
    assert first.encoder is second.encoder
    assert first.fingerprint == second.fingerprint == read_bundle(copy).fingerprint()


def test_weights_under_a_forged_manifest_get_their_own_encoder(
    registry: Registry, tiny_bundle: Path, other_tiny_bundle: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "forged"
    shutil.copytree(other_tiny_bundle, folder)
    forged(folder, tiny_bundle)
    served, other = registry.load("served", tiny_bundle), registry.load("other", folder)
    assert served.legacy_fingerprint == other.legacy_fingerprint  # the old scheme gave both the same value
    assert served.fingerprint != other.fingerprint
    assert served.encoder is not other.encoder


def rubbish(path: Path) -> None:
    path.write_bytes(b"rubbish")


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def an_unknown_operator(path: Path) -> None:
    """Add an operator that does not affect the vectors and that ONNX Runtime does not support."""
    model = onnx.load(str(path))
    model.graph.node.append(helper.make_node("NoSuchOperator", ["sentence_embedding"], ["more"]))
    path.write_bytes(model.SerializeToString())


@pytest.mark.parametrize("spoil", [rubbish, cut_off, an_unknown_operator])
def test_a_model_that_cannot_be_loaded_is_refused_despite_a_served_fingerprint(
    registry: Registry, tiny_bundle: Path, copy: Path, spoil: object
) -> None:
    registry.load("served", tiny_bundle)
    assert callable(spoil)
    spoil(copy / MODEL)
    forged(copy, tiny_bundle)
    with pytest.raises(ModelLoadError, match=r"model\.onnx cannot be (loaded|read)"):
        registry.load("copy", copy)
    assert [model.name for model in registry.models()] == ["served"]


def test_weights_that_the_manifest_does_not_list_are_refused(copy: Path) -> None:
    save_with_external_weights(copy / MODEL, "w")
    manifest = Manifest.from_json((copy / "emberpc.json").read_text(encoding="utf-8"))
    finish_bundle(copy, manifest)
    assert Model.load("m", copy).fingerprint
    data = json.loads((copy / "emberpc.json").read_text(encoding="utf-8"))
    del data["files"]["onnx/w"]
    (copy / "emberpc.json").write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ModelLoadError, match=r"onnx/w holds weights and is not in the manifest"):
        Model.load("m", copy)


@pytest.fixture
def foreign(tiny_bundle: Path, tmp_path: Path) -> Path:
    """The tiny encoder as another exporter writes it: no manifest, and the weights in `model.onnx.data`."""
    folder = tmp_path / "foreign"
    shutil.copytree(tiny_bundle, folder)
    (folder / "emberpc.json").unlink()
    save_with_external_weights(folder / MODEL, "model.onnx.data")
    return folder


def test_foreign_folders_with_one_graph_and_different_data_files_are_two_models(
    registry: Registry, foreign: Path, tmp_path: Path
) -> None:
    second = tmp_path / "second"
    shutil.copytree(foreign, second)
    data = second / "onnx" / "model.onnx.data"
    weights = np.frombuffer(data.read_bytes(), dtype=np.float32).copy()
    tensors = onnx.load(str(second / MODEL), load_external_data=False).graph.initializer
    words = next(each for each in tensors if "word_embeddings" in each.name)
    place = {entry.key: entry.value for entry in words.external_data}
    start, length = int(place.get("offset", 0)) // 4, int(place["length"]) // 4
    weights[start : start + length] *= -1
    data.write_bytes(weights.tobytes())
    one, other = registry.load("one", foreign), registry.load("other", second)
    assert one.fingerprint != other.fingerprint
    assert one.encoder is not other.encoder
    assert set(one.manifest.files) == {"tokenizer.json", "onnx/model.onnx", "onnx/model.onnx.data"}
    assert one.manifest.revision != other.manifest.revision
    tokens = [np.array([2, 7, 8, 9, 3])]
    assert not np.allclose(one.encoder.run(tokens), other.encoder.run(tokens), atol=1e-3)
    assert not one.legacy_fingerprint  # it did not cover model.onnx.data, so it is not used


def test_external_weights_are_refused_where_onnx_runtime_cannot_take_them_from_memory(
    foreign: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "SessionOptions", object)
    with pytest.raises(SessionError, match="upgrade onnxruntime, or save the model as one ONNX file"):
        OnnxSession(foreign / MODEL)


def test_a_session_with_more_threads_is_refused_if_the_weights_changed(foreign: Path) -> None:
    session = OnnxSession(foreign / MODEL)
    assert session.with_threads(2)
    data = foreign / "onnx" / "model.onnx.data"
    content = data.read_bytes()
    data.unlink()
    data.write_bytes(content)
    assert session.with_threads(2)
    data.write_bytes(content[:-4] + b"\0\0\x80?")
    with pytest.raises(SessionError, match="changed since it was loaded"):
        session.with_threads(2)
    data.unlink()
    with pytest.raises(SessionError, match="cannot be read"):
        session.with_threads(2)


def scratch(path: Path) -> None:
    """Write other bytes into a file in place, with its times as before, as a copy with `rsync --inplace` does."""
    times = path.stat()
    with path.open("r+b") as file:
        file.write(b"\x3f" * times.st_size)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def empty(path: Path) -> None:
    """Cut a file off in place, as the beginning of a copy onto it does."""
    os.truncate(path, 0)


@pytest.mark.parametrize("spoil", [scratch, empty])
@pytest.mark.parametrize("file", ["onnx/model.onnx.data", "onnx/model.onnx", "tokenizer.json"])
def test_a_served_model_does_not_depend_on_its_files(
    spoil: Callable[[Path], None], file: str, foreign: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_tables, "_MIN_BYTES", 1024)
    served, tokens = Model.load("m", foreign), [np.array([2, 7, 8, 9, 3]), np.array([2, 11, 3])]
    before = served.encoder.run(tokens)
    wide = served.encoder._session.with_threads(2)
    assert isinstance(served.encoder._session, OnnxSession)
    assert served.encoder._session._tables
    spoil(foreign / file)
    others = [np.array([2, token, 3]) for token in range(4, 39)]
    assert np.isfinite(served.encoder.run(others)).all()
    np.testing.assert_array_equal(served.encoder.run(tokens), before)
    np.testing.assert_allclose(served.encoder._run_on(wide, tokens), before, atol=1e-6)
    assert served.tokenizer.count(["hello world"], "") == [4]


def test_a_session_keeps_no_second_copy_of_the_weights(foreign: Path) -> None:
    session = Model.load("m", foreign).encoder._session
    assert isinstance(session, OnnxSession)
    assert not [name for name, value in vars(session._session).items() if isinstance(value, bytes)]


@pytest.mark.parametrize("file", ["onnx/model.onnx.data", "onnx/model.onnx", "tokenizer.json"])
def test_the_fingerprint_covers_the_bytes_that_are_served(
    file: str, foreign: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The session and the fingerprint must be made from the same bytes, also if a file changes in between."""
    fingerprint = Model.load("m", foreign).fingerprint
    make = OnnxSession

    def load(path: Path, contents: Contents) -> OnnxSession:
        session = make(path, contents=contents)
        scratch(foreign / file)
        return session

    monkeypatch.setattr(runtime, "OnnxSession", load)
    if file == "tokenizer.json":  # it is read after the change
        with pytest.raises(ModelLoadError, match="tokenizer"):
            Model.load("m", foreign)
    else:
        assert Model.load("m", foreign).fingerprint == fingerprint


def test_a_bundle_that_changes_while_it_is_loaded_is_refused(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_with_external_weights(copy / MODEL, "w")
    finish_bundle(copy, Manifest.from_json((copy / "emberpc.json").read_text(encoding="utf-8")))
    check = Bundle.check_hashes

    def changed(bundle: Bundle, contents: Contents | None = None) -> None:
        check(bundle)
        # In place, so that a thread that reads the file meanwhile does not find a shorter file.
        with (copy / "onnx" / "w").open("r+b") as weights:
            weights.seek(-4, os.SEEK_END)
            weights.write(b"\0\0\x80?")
        checked.set()

    checked, read = threading.Event(), Contents.read

    def read_later(contents: Contents, path: Path) -> bytes:
        """Read the weights only after they were changed, in any thread."""
        assert path.name != "w" or checked.wait(300)
        return read(contents, path)

    monkeypatch.setattr(Bundle, "check_hashes", changed)
    monkeypatch.setattr(Contents, "read", read_later)
    with pytest.raises(ModelLoadError, match="onnx/w was written while it was loaded; load it again"):
        Model.load("m", copy)


def test_external_weights_of_a_subgraph_are_refused(tmp_path: Path) -> None:
    weights = onnx.numpy_helper.from_array(np.ones(4, dtype=np.float32), "w")
    value = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [4])
    branch = helper.make_graph([helper.make_node("Identity", ["w"], ["y"])], "b", [], [value], [weights])
    condition = helper.make_tensor_value_info("c", onnx.TensorProto.BOOL, [])
    node = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    made = helper.make_model(helper.make_graph([node], "g", [condition], [value]), ir_version=9)
    path = tmp_path / "model.onnx"
    onnx.save(made, str(path), save_as_external_data=True, location="w", size_threshold=0)
    with pytest.raises(SessionError, match="save the model as one ONNX file"):
        OnnxSession(path)


class Loading:
    """Notes when the making of a session begins."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.begun = threading.Event()

        def load(path: Path, contents: Contents) -> OnnxSession:
            self.begun.set()
            return OnnxSession(path, contents=contents)

        patch.setattr(runtime, "OnnxSession", load)


def test_the_weights_are_hashed_while_the_session_is_made(
    tiny_bundle: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    loading = Loading(monkeypatch)
    fingerprint = Bundle.fingerprint

    def delayed(bundle: Bundle, variant: str = "", *, headless: bool = False, contents: Contents | None = None) -> str:
        assert loading.begun.wait(300), "the session waits for the hash"
        return fingerprint(bundle, variant, headless=headless, contents=contents)

    monkeypatch.setattr(Bundle, "fingerprint", delayed)
    assert registry.load("m", tiny_bundle).fingerprint == fingerprint(read_bundle(tiny_bundle))


def test_no_session_is_made_if_one_in_use_can_be_shared(
    tiny_bundle: Path, copy: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.load("first", tiny_bundle)
    loading = Loading(monkeypatch)
    registry.load("second", copy)
    assert not loading.begun.is_set()


def test_weights_outside_the_folder_are_not_loaded(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loading = Loading(monkeypatch)
    save_with_external_weights(copy / MODEL, "w")
    (copy / "onnx" / "w").rename(copy.parent / "w")
    (copy / "onnx" / "w").symlink_to(copy.parent / "w")
    manifest = Manifest.from_json((copy / "emberpc.json").read_text(encoding="utf-8"))
    path = copy / MODEL
    entry = FileEntry(sha256_of(path), path.stat().st_size)
    manifest = replace(manifest, files={**manifest.files, str(MODEL): entry})
    (copy / "emberpc.json").write_text(manifest.to_json(), encoding="utf-8")
    with pytest.raises(ModelLoadError, match="leads out of the model's folder"):
        Model.load("m", copy)
    assert not loading.begun.is_set()


def test_classifiers_of_one_encoder_share_its_fingerprint_and_have_their_own(
    registry: Registry, tiny_classifier_bundle: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "retrained"
    shutil.copytree(tiny_classifier_bundle, folder)
    manifest = read_bundle(folder).manifest
    finish_bundle(folder, replace(manifest, rejection_logit=-1e9))
    first, same = registry.load("first", tiny_classifier_bundle), registry.load("same", tiny_classifier_bundle)
    retrained = registry.load("retrained", folder)
    assert first.fingerprint == retrained.fingerprint
    assert first.encoder is retrained.encoder
    assert first.classifier_fingerprint == same.classifier_fingerprint != retrained.classifier_fingerprint
    assert {len(model.classifier_fingerprint) for model in (first, retrained)} == {64}


def test_the_fingerprint_of_a_classifier_covers_everything_that_decides_labels(tiny_classifier_bundle: Path) -> None:
    bundle = read_bundle(tiny_classifier_bundle)
    manifest, head = bundle.manifest, bundle.head()
    assert head is not None
    weights, bias = head.weights.copy(), head.bias.copy()
    weights[0, 0] += 1
    bias[0] += 1
    cases: list[tuple[str, Head | None, dict[str, Any]]] = [
        ("e", head, {}),
        ("e", None, {}),
        ("f", head, {}),
        ("e", replace(head, weights=weights), {}),
        ("e", replace(head, bias=bias), {}),
        ("e", head, {"labels": manifest.labels[::-1]}),
        ("e", head, {"temperature": manifest.temperature * 2}),
        ("e", head, {"rejection_logit": 7.5}),
        ("e", head, {"multi_label": True}),
        ("e", head, {"multi_label": True, "thresholds": (0.1, 0.9)}),
        ("e", head, {"max_tokens": manifest.max_tokens - 1}),
    ]
    found = [
        replace(bundle, manifest=replace(manifest, **changes)).classifier_fingerprint(encoder, with_head)
        for encoder, with_head, changes in cases
    ]
    cosine: dict[str, Any] = {
        "rejection_score": RejectionScore.CLASS_COSINE,
        "rejection_threshold": 0.5,
        "format_version": 2,
    }
    for changes in (
        cosine,
        {**cosine, "rejection_threshold": 0.25},
        {**cosine, "rejection_score": RejectionScore.NEAREST_PROTOTYPE},
    ):
        changed = replace(bundle, manifest=replace(manifest, rejection_logit=None, **changes))
        for row in range(2):
            scope = ScopeVectors(np.eye(manifest.dimensions, dtype=np.float32)[row : row + 1])
            found.append(changed.classifier_fingerprint("e", head, scope))
    assert len(set(found)) == len(found)
    # A bundle without these fields keeps the fingerprint that servers before these fields returned.
    assert found[0] == FINGERPRINT
    renamed = replace(bundle, manifest=replace(manifest, base_model="x", quality={}, created=""))
    assert renamed.classifier_fingerprint("e", head) == found[0]


def test_an_embedding_model_has_no_classifier_fingerprint(registry: Registry, tiny_bundle: Path) -> None:
    assert registry.load("tiny", tiny_bundle).classifier_fingerprint == ""
