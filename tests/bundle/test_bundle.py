"""The bundle's format: what is written is read, and what is wrong is refused by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emberpc.bundle import (
    BundleError,
    FileEntry,
    Manifest,
    Parity,
    Prompts,
    Reference,
    Task,
    Variant,
    finish_bundle,
    read_bundle,
    staged_folder,
)

words = st.text(st.characters(blacklist_categories=["Cs"]), max_size=8)
numbers = st.floats(allow_nan=False, allow_infinity=False)
parities = st.builds(Parity, st.integers(1, 99), numbers, numbers, numbers)
manifests = st.builds(
    Manifest,
    task=st.just(Task.EMBEDDING),
    base_model=words,
    revision=words,
    weights_sha256=words,
    dimensions=st.integers(8, 4096),
    pooling=words,
    normalize=st.booleans(),
    max_tokens=st.integers(1, 8192),
    pad_token_id=st.integers(0, 10),
    variants=st.lists(st.builds(Variant, words, words, parities), min_size=1, max_size=3).map(tuple),
    prompts=st.builds(Prompts, words, words),
    matryoshka_dimensions=st.lists(st.integers(1, 8), max_size=3).map(tuple),
    quality=st.dictionaries(words, numbers, max_size=3),
    tools=st.dictionaries(words, words, max_size=3),
    files=st.dictionaries(words, st.builds(FileEntry, words, st.integers(0, 2**60)), max_size=3),
)
PLAIN = Manifest(
    task=Task.CLASSIFICATION,
    base_model="m",
    revision="r",
    weights_sha256="0",
    dimensions=4,
    pooling="mean",
    normalize=True,
    max_tokens=8,
    pad_token_id=0,
    variants=(Variant("fp32", "onnx/model.onnx", Parity(1, 0.0, 1.0)),),
    labels=("a", "b"),
)


@given(manifest=manifests)
def test_a_manifest_survives_json(manifest: Manifest) -> None:
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_an_unknown_field_is_left_for_a_newer_reader() -> None:
    data = json.loads(PLAIN.to_json())
    assert Manifest.from_json(json.dumps({**data, "new": 1})) == PLAIN


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("dimensions", "384", "dimensions is '384'"),
        ("dimensions", 0, "dimensions is 0"),
        ("normalize", 1, "normalize is 1"),
        ("task", "poetry", "task is 'poetry'"),
        ("variants", [], "variants is empty"),
        ("variants", [{"name": "fp32"}], r"variants\[0\].path is missing"),
        ("labels", ["a"], "at least two labels"),
        ("labels", ["a", 2], r"labels\[1\] is 2"),
        ("thresholds", [0.5], "1 thresholds for 2 labels"),
        ("temperature", 0, "temperature is 0"),
        ("files", {"a": {"sha256": "x", "size": "big"}}, "size is 'big'"),
        ("prompts", "query: ", "prompts is 'query: '"),
        ("format_version", 99, "format_version is 99"),
    ],
)
def test_a_wrong_field_is_named(field: str, value: object, says: str) -> None:
    with pytest.raises(BundleError, match=says):
        Manifest.from_json(json.dumps({**json.loads(PLAIN.to_json()), field: value}))


@given(text=st.text(max_size=40))
def test_rubbish_is_refused_never_more(text: str) -> None:
    with pytest.raises(BundleError):
        Manifest.from_json(text)


def test_the_fingerprint_tells_what_shapes_a_vector() -> None:
    first = PLAIN.fingerprint()
    assert dataclasses.replace(PLAIN, labels=("c", "d"), revision="other", quality={"x": 1.0}).fingerprint() == first
    changes: list[dict[str, object]] = [
        {"weights_sha256": "1"},
        {"pooling": "cls"},
        {"normalize": False},
        {"dimensions": 5},
        {"prompts": Prompts(query="q: ")},
        {"files": {"tokenizer.json": FileEntry("abc", 1)}},
    ]
    others = {dataclasses.replace(PLAIN, **change).fingerprint() for change in changes}  # type: ignore[arg-type]  # of several types
    assert len(others | {first}) == 7


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small bundle that is whole, though its model is none."""
    with staged_folder(tmp_path / "bundle") as staging:
        (staging / "onnx").mkdir()
        (staging / "onnx" / "model.onnx").write_bytes(b"model")
        (staging / "tokenizer.json").write_text("{}", encoding="utf-8")
        Reference(("a", "ü"), np.ones((2, 4), np.float32), np.zeros((2, 2), np.float32)).write(staging)
        finish_bundle(staging, PLAIN)
    return tmp_path / "bundle"


def test_what_is_written_is_read(folder: Path) -> None:
    bundle = read_bundle(folder)
    assert set(bundle.manifest.files) == {"onnx/model.onnx", "tokenizer.json", "reference.npz"}
    reference = bundle.reference()
    assert reference.texts == ("a", "ü")
    assert reference.logits is not None
    assert reference.logits.shape == (2, 2)


def test_a_changed_file_is_found_by_size_or_hash(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("[]", encoding="utf-8")
    with pytest.raises(BundleError, match="SHA-256 differs"):
        read_bundle(folder)
    read_bundle(folder, check_hashes=False)
    (folder / "tokenizer.json").write_text("[ ]", encoding="utf-8")
    with pytest.raises(BundleError, match="has 3 bytes"):
        read_bundle(folder, check_hashes=False)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret", "..\\secret"])
def test_a_path_that_leads_out_is_refused(folder: Path, name: str) -> None:
    manifest = read_bundle(folder).manifest
    bad = dataclasses.replace(manifest, files={**manifest.files, name: FileEntry("0", 0)})
    (folder / "emberpc.json").write_text(bad.to_json(), encoding="utf-8")
    with pytest.raises(BundleError, match="leads out"):
        read_bundle(folder)


def test_a_symbolic_link_is_refused(folder: Path, tmp_path: Path) -> None:
    model = folder / "onnx" / "model.onnx"
    model.rename(tmp_path / "elsewhere.onnx")
    model.symlink_to(tmp_path / "elsewhere.onnx")
    with pytest.raises(BundleError, match="symbolic link"):
        read_bundle(folder)


def test_a_damaged_reference_is_refused(folder: Path) -> None:
    for content in (b"", b"rubbish", (folder / "reference.npz").read_bytes()[:-30]):
        (folder / "reference.npz").write_bytes(content)
        with pytest.raises(BundleError, match=r"reference\.npz"):
            Reference.read(folder)


def test_a_failure_while_staging_leaves_the_old_one(folder: Path) -> None:
    before = read_bundle(folder).manifest

    def fail() -> None:
        with staged_folder(folder, overwrite=True) as staging:
            (staging / "half").write_bytes(b"half")
            raise InterruptedError

    with pytest.raises(InterruptedError):
        fail()
    assert read_bundle(folder).manifest == before
    assert [path.name for path in folder.parent.iterdir()] == ["bundle"]
