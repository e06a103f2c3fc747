"""Reading bundles that are whole, damaged or malicious."""

from __future__ import annotations

import dataclasses
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from emberpc.bundle import BundleError, DecisionRule, FileEntry, Manifest, Reference, RejectionScore, read_bundle
from emberpc.bundle.reading import MAX_MANIFEST_BYTES


def test_a_whole_bundle_is_read(folder: Path) -> None:
    bundle = read_bundle(folder)
    assert set(bundle.manifest.files) == {"onnx/model.onnx", "tokenizer.json", "reference.npz"}
    assert bundle.model_path(bundle.manifest.variant()).read_bytes() == b"a graph"
    assert bundle.reference().texts == ("one", "two")


def test_a_bundle_may_be_reached_by_a_link(folder: Path, tmp_path: Path) -> None:
    link = tmp_path / "current"
    link.symlink_to(folder)
    assert read_bundle(link).manifest == read_bundle(folder).manifest


def remove_manifest(folder: Path) -> None:
    (folder / "emberpc.json").unlink()


def remove_file(folder: Path) -> None:
    (folder / "onnx" / "model.onnx").unlink()


def shorten(folder: Path) -> None:
    (folder / "onnx" / "model.onnx").write_bytes(b"a grap")


def flip_a_bit(folder: Path) -> None:
    (folder / "onnx" / "model.onnx").write_bytes(b"a grapi")


def replace_by_link(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.rename(folder.parent / "elsewhere.json")
    path.symlink_to(folder.parent / "elsewhere.json")


def replace_folder_by_link(folder: Path) -> None:
    (folder / "onnx").rename(folder.parent / "elsewhere")
    (folder / "onnx").symlink_to(folder.parent / "elsewhere", target_is_directory=True)


def replace_manifest_by_link(folder: Path) -> None:
    path = folder / "emberpc.json"
    path.rename(folder.parent / "elsewhere.json")
    path.symlink_to(folder.parent / "elsewhere.json")


def truncate_manifest(folder: Path) -> None:
    os.truncate(folder / "emberpc.json", 100)


def spoil_the_encoding(folder: Path) -> None:
    (folder / "emberpc.json").write_bytes(b'{"base_model": "\xff"}')


def make_manifest_huge(folder: Path) -> None:
    os.truncate(folder / "emberpc.json", MAX_MANIFEST_BYTES + 1)


def forget_the_tokenizer(folder: Path) -> None:
    data = json.loads((folder / "emberpc.json").read_text())
    del data["files"]["tokenizer.json"]
    (folder / "emberpc.json").write_text(json.dumps(data))


def reject_without_vectors(folder: Path) -> None:
    rule = DecisionRule(rejection_threshold=0.5, rejection_score=RejectionScore.CLASS_COSINE)
    data = json.loads((folder / "emberpc.json").read_text())
    (folder / "emberpc.json").write_text(json.dumps(data | rule.manifest_fields()))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (remove_manifest, "has no emberpc.json, so it is no bundle"),
        (remove_file, "model.onnx is missing"),
        (shorten, "has 6 bytes, the manifest says 7"),
        (flip_a_bit, "its SHA-256 differs"),
        (replace_by_link, "symbolic link"),
        (replace_folder_by_link, "symbolic link"),
        (replace_manifest_by_link, "symbolic link"),
        (truncate_manifest, "is not JSON"),
        (spoil_the_encoding, "cannot be read as UTF-8"),
        (make_manifest_huge, "a manifest has at most"),
        (forget_the_tokenizer, "tokenizer.json is not among its files"),
        (reject_without_vectors, "head.npz is not among its files"),
    ],
)
def test_a_damaged_bundle_is_refused_with_the_reason(folder: Path, damage: Callable[[Path], None], words: str) -> None:
    damage(folder)
    with pytest.raises(BundleError, match=words):
        read_bundle(folder)


@pytest.mark.parametrize("name", ["../outside", "onnx/../../outside", "/etc/hostname", "onnx\\..\\outside"])
def test_an_existing_path_outside_the_bundle_is_refused(folder: Path, name: str) -> None:
    (folder.parent / "outside").write_bytes(b"1")
    manifest = read_bundle(folder).manifest
    files = {**manifest.files, name: FileEntry("00", 1)}
    (folder / "emberpc.json").write_text(dataclasses.replace(manifest, files=files).to_json())
    with pytest.raises(BundleError, match="leads out of the bundle"):
        read_bundle(folder)


def test_reading_without_hashes_finds_a_missing_byte_but_no_flipped_bit(folder: Path) -> None:
    flip_a_bit(folder)
    read_bundle(folder, check_hashes=False)
    shorten(folder)
    with pytest.raises(BundleError, match="has 6 bytes"):
        read_bundle(folder, check_hashes=False)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="there is no such folder"):
        read_bundle(tmp_path / "nothing")


def test_a_reference_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = Reference(("a", "emoji 🙂\n"), np.eye(2, 3, dtype=np.float32), np.ones((2, 4), dtype=np.float32))
    written.write(tmp_path)
    read = Reference.read(tmp_path)
    assert read.texts == written.texts
    assert read.logits is not None
    np.testing.assert_array_equal(read.vectors, written.vectors)
    np.testing.assert_array_equal(read.logits, np.ones((2, 4)))


def test_a_reference_with_pickles_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "reference.npz", texts=np.array([{"a": 1}]), embeddings=np.eye(1))
    with pytest.raises(BundleError, match="cannot be read"):
        Reference.read(tmp_path)


def test_a_reference_with_a_large_unpacked_size_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "reference.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("texts.npy", bytes(1000))
        archive.infolist()[0].file_size = 300 * 2**20  # the size that the directory of the archive states
    with pytest.raises(BundleError, match="unpacks to"):
        Reference.read(tmp_path)


@pytest.mark.parametrize(
    "arrays",
    [
        {"texts": np.array(["a"])},
        {"texts": np.array(["a", "b"]), "embeddings": np.eye(1)},
        {"texts": np.array(["a"]), "embeddings": np.ones(1)},
        {"texts": np.array(["a"]), "embeddings": np.eye(1), "logits": np.ones((2, 2))},
        {"texts": np.array([], dtype=str), "embeddings": np.ones((0, 3))},
    ],
)
def test_a_reference_with_missing_or_inconsistent_arrays_is_refused(
    tmp_path: Path, arrays: dict[str, np.ndarray]
) -> None:
    np.savez(tmp_path / "reference.npz", **arrays)  # type: ignore[arg-type]  # its stub takes the names for its own flag
    with pytest.raises(BundleError, match=r"reference\.npz"):
        Reference.read(tmp_path)


def test_a_missing_or_broken_reference_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="cannot be read"):
        Reference.read(tmp_path)
    (tmp_path / "reference.npz").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(BundleError, match="cannot be read"):
        Reference.read(tmp_path)


def test_a_manifest_of_another_bundle_is_refused(folder: Path, manifest: Manifest) -> None:
    other = dataclasses.replace(manifest, files={"tokenizer.json": FileEntry("00", 2)})
    (folder / "emberpc.json").write_text(other.to_json())
    with pytest.raises(BundleError, match=r"model\.onnx is not among its files"):
        read_bundle(folder)
