"""The real weights of all-mpnet-base-v2, an architecture with a relative bias and no token types."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from emberpc.client import Client
from emberpc.export.classifier import ClassifierData, export_classifier
from emberpc.export.data.stdlib_texts import sample_texts
from emberpc.export.embedding import export_embedding
from emberpc.export.verify import verify_bundle
from examples.server_process import ServerProcess

pytestmark = pytest.mark.slow


@pytest.fixture
def source() -> Path:
    """The folder of all-mpnet-base-v2."""
    folder = os.environ.get("EMBERPC_TEST_MPNET")
    if not folder:
        pytest.skip("EMBERPC_TEST_MPNET does not name the folder of all-mpnet-base-v2")
    return Path(folder)


def test_exported_mpnet_gives_the_vectors_of_sentence_transformers(source: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    manifest = export_embedding(source, tmp_path / "bundle")
    parity = manifest.variant().parity
    print(parity)  # noqa: T201 - with -s, the figures
    assert parity.cosine_min >= 0.9999
    assert (manifest.dimensions, manifest.max_tokens, manifest.pooling, manifest.normalize) == (768, 384, "mean", True)
    report = verify_bundle(tmp_path / "bundle")
    assert report.ok, report
    texts = sample_texts(40)[-16:]
    original = SentenceTransformer(str(source), device="cpu", local_files_only=True).encode(texts)
    with ServerProcess({"mpnet": tmp_path / "bundle"}, tmp_path / "data") as server, Client(server.address) as client:
        served = client.embed(texts, model="mpnet", truncation="end")
    np.testing.assert_allclose(served, original, atol=1e-4)


@pytest.mark.parametrize("strategy", ["linear", "top-layers"])
def test_a_classifier_based_on_mpnet_is_exported(
    source: Path, training_file: Path, tmp_path: Path, strategy: str
) -> None:
    manifest = export_classifier(ClassifierData(training_file), source, tmp_path / "bundle", strategy=strategy)
    assert manifest.variant().parity.label_agreement == 1
    assert manifest.quality["accuracy"] > 0.8
    assert verify_bundle(tmp_path / "bundle").ok
