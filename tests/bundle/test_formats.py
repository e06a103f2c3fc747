"""Bundles that earlier versions of emberpc wrote are read, and give the outputs that they gave at export."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from emberpc.bundle import BundleError, RejectionScore, read_bundle
from emberpc.bundle.manifest import FORMAT_VERSIONS
from format_fixtures import description, missing, names, unpack, versions

FIXTURES = names("bundle")


@pytest.fixture
def bundle(name: str, tmp_path: Path) -> Path:
    return unpack(name, "bundle.zip", tmp_path / "bundle")


def test_each_format_of_bundles_has_a_fixture() -> None:
    assert missing({"bundle": range(1, max(FORMAT_VERSIONS) + 1)}) == [], "run tools/make_format_fixtures.py"


@pytest.mark.parametrize("name", FIXTURES)
def test_a_bundle_of_each_earlier_export_is_read(name: str, bundle: Path) -> None:
    expected = description(name)["expected"]
    found = read_bundle(bundle)
    manifest = found.manifest
    assert manifest.format_version == versions(name)["bundle"]
    assert expected["fingerprint"] in (found.fingerprint(), found.legacy_fingerprint())
    rule = expected["rule"]
    assert manifest.temperature == rule["temperature"]
    assert manifest.rejection_score == rule.get("rejection_score", RejectionScore.MAX_LOGIT)
    assert manifest.rejection_logit == rule.get("rejection_logit")
    # Format 1 wrote 0.0 for no rejection.
    assert manifest.rejection_threshold == (rule.get("rejection_threshold") or None)


@pytest.mark.server
@pytest.mark.parametrize("name", FIXTURES)
def test_a_served_model_gives_the_outputs_of_its_export(name: str, bundle: Path) -> None:
    from emberpc.server.engine import Model, Truncation
    from emberpc.server.errors import items_of

    expected = description(name)["expected"]
    model = Model.load("m", bundle)
    tokens = model.tokenizer.tokenize(expected["texts"], "", Truncation.END, items_of("texts"))
    outputs = model.encoder.run([each.ids for each in tokens])
    assert len(outputs) == len(expected["texts"])
    if model.head is not None:
        np.testing.assert_allclose(outputs, np.array(expected["embeddings"]), atol=1e-4)
    wanted = expected["logits"] if model.manifest.labels else expected["embeddings"]
    np.testing.assert_allclose(model.finish(outputs), np.array(wanted), atol=1e-3)
    assert (model.scope_vectors is not None) == model.manifest.rejection_score.needs_vectors


@pytest.mark.parametrize(
    ("threshold", "message"), [(0.5, "not rejection_threshold"), (False, "rejection_threshold is False")]
)
def test_a_threshold_of_the_first_exports_other_than_0_is_refused(
    tmp_path: Path, threshold: object, message: str
) -> None:
    folder = unpack("bundle-1", "bundle.zip", tmp_path / "bundle")
    path = folder / "emberpc.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    assert data["rejection_threshold"] == 0
    path.write_text(json.dumps({**data, "rejection_threshold": threshold}), encoding="utf-8")
    with pytest.raises(BundleError, match=message):
        read_bundle(folder)


def test_a_bundle_of_a_newer_format_is_refused(tmp_path: Path) -> None:
    folder = unpack(FIXTURES[-1], "bundle.zip", tmp_path / "bundle")
    path, newer = folder / "emberpc.json", max(FORMAT_VERSIONS) + 1
    data = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**data, "format_version": newer}), encoding="utf-8")
    with pytest.raises(BundleError, match=f"format_version is {newer}, this emberpc reads .*install the emberpc that"):
        read_bundle(folder)
