"""A bundle of a few bytes. The tests of this folder check names, sizes and hashes, and load no model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from emberpc.bundle import Manifest, Parity, Reference, Task, Variant, finish_bundle


@pytest.fixture
def manifest() -> Manifest:
    return Manifest(
        task=Task.EMBEDDING,
        base_model="some/model",
        revision="abc",
        weights_sha256="00",
        dimensions=3,
        pooling="mean",
        normalize=True,
        max_tokens=16,
        pad_token_id=0,
        variants=(Variant("fp32", "onnx/model.onnx", Parity(2, 1e-6, 0.99999)),),
    )


@pytest.fixture
def folder(tmp_path: Path, manifest: Manifest) -> Path:
    folder = tmp_path / "bundle"
    (folder / "onnx").mkdir(parents=True)
    (folder / "onnx" / "model.onnx").write_bytes(b"a graph")
    (folder / "tokenizer.json").write_text("{}")
    Reference(("one", "two"), np.eye(2, 3, dtype=np.float32)).write(folder)
    finish_bundle(folder, manifest)
    return folder
