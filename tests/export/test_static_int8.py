"""The variant `int8-static`: made by NNCF, measured with OpenVINO, and served by OpenVINO only."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from emberpc.bundle import BundleError, Manifest, read_bundle
from emberpc.bundle.bounds import cosines
from emberpc.bundle.cores import multiplies_int8
from emberpc.bundle.manifest import MANIFEST_NAME
from emberpc.export.classifier import ClassifierData, export_classifier
from emberpc.export.convert import sessions
from emberpc.export.convert.sessions import open_session
from emberpc.export.embedding import export_embedding
from emberpc.export.errors import ExportError
from emberpc.export.variants import CANDIDATES, selection
from emberpc.export.variants.measurement import Trial
from emberpc.export.verify import VerifyReport, verify_bundle
from emberpc.server.engine import Model, ModelLoadError
from emberpc.server.engine.choices import Runtimes
from emberpc.server.engine.models import model as model_module
from fixtures_bundles import minilm_source

pytest.importorskip("nncf", reason="the extra int8-static is not installed")
NAME = "int8-static"
pytestmark = pytest.mark.skipif(not multiplies_int8(), reason="this processor has no int8 dot products")


@pytest.fixture(scope="module")
def bundle(tiny_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder with the variant. The texts have letters that are in its vocabulary."""
    folder = tmp_path_factory.mktemp("static")
    texts = folder / "texts.jsonl"
    letters = "abcdefghijklmnopqrst"
    rows = [" ".join(letters[(i * j) % 20] for j in range(1, 3 + i % 9)) for i in range(120)]
    texts.write_text("".join(json.dumps({"text": row}) + "\n" for row in dict.fromkeys(rows)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "_CALIBRATION_TEXTS", 64)
        export_embedding(str(tiny_source), folder / "bundle", variants=[NAME], validation=texts)
    return folder / "bundle"


def loaded(folder: Path, engine: str = "") -> Model:
    return Model.load("m", folder, NAME, runtimes=Runtimes({"": engine} if engine else {}))


def failed(report: VerifyReport) -> list[str]:
    return [f"{check.name}: {check.detail}" for check in report.checks if not check.ok]


def test_the_manifest_names_the_engine_and_the_figures_meet_the_bound(bundle: Path) -> None:
    variant = read_bundle(bundle).manifest.variant(NAME)
    assert variant.engine == "openvino"
    assert variant.measured is not None
    assert variant.bound is not None
    assert variant.measured.cosine_min >= variant.bound.cosine_min
    first, second = (open_session(bundle / variant.path, engine, 1).graph for engine in ("openvino", "onnxruntime"))
    for got, expected in ((first.inputs, second.inputs), (first.outputs, second.outputs)):
        assert [(each.name, each.type) for each in got] == [(each.name, each.type) for each in expected]
    assert verify_bundle(bundle).ok, failed(verify_bundle(bundle))


@pytest.mark.slow
@pytest.mark.whole_exports
def test_the_export_prints_nothing(tiny_source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    export_embedding(str(tiny_source), tmp_path / "b", variants=[NAME])
    assert tuple(capfd.readouterr()) == ("", "")


@pytest.mark.parametrize("given", [10, 250, 2000])
def test_no_text_both_calibrates_and_is_measured(bundle: Path, given: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "_CALIBRATION_TEXTS", 256)
    monkeypatch.setattr(selection, "_ENOUGH_TEXTS", 128)
    texts = [f"text number {i}" for i in range(given)]
    measured = texts[:: max(1, given // 100)]
    trial = Trial(bundle, read_bundle(bundle).manifest, measured)
    found = selection._calibration(texts, trial)
    assert set(found).isdisjoint(measured)
    own = set(found) & set(texts)
    # With few texts of the user, docstrings are added.
    assert len(own) == min(256, given - len(measured))
    assert len(found) == (256 if len(own) < 128 else len(own))


def test_training_texts_calibrate_a_classifier_that_is_measured_on_others(
    few_labelled: Path, tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrated: list[str] = []
    usual = selection._calibration

    def watched(given: Sequence[str], trial: Trial) -> list[str]:
        calibrated.extend(usual(given, trial))
        return calibrated

    monkeypatch.setattr(selection, "_calibration", watched)
    (static,) = (replace(each, make=lambda given: given.model) for each in CANDIDATES if each.name == NAME)
    monkeypatch.setattr(selection, "CANDIDATES", (static,))
    validation = tmp_path / "validation.csv"
    with few_labelled.open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    others = [[f"a new text about {label}", label] for label in sorted({label for _, label in rows})]
    with validation.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *others])
    manifest = export_classifier(
        ClassifierData(few_labelled, validation=validation), tiny_source, tmp_path / "b", variants=[NAME]
    )
    assert manifest.measured_on == "the texts of the validation file"
    assert set(calibrated) >= {text for text, _ in rows}
    assert not set(calibrated) & {text for text, _ in others}


def test_without_nncf_the_error_names_the_extra(
    tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(ExportError, match="the variant int8-static needs nncf; install the extra `int8-static`"):
        export_embedding(str(tiny_source), tmp_path / "b", variants=[NAME])
    manifest = export_embedding(str(tiny_source), tmp_path / "c", variants=["auto"])
    assert "install the extra `int8-static`" in manifest.dropped[NAME]


def test_without_openvino_verify_names_the_extra(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    (fault,) = failed(verify_bundle(bundle))
    assert "was made for OpenVINO, which is not installed; install the extra `openvino`" in fault


def test_a_server_runs_the_variant_with_openvino_and_says_why(bundle: Path) -> None:
    model, exact = loaded(bundle), Model.load("m", bundle)
    assert (model.plan.runtime.engine, model.plan.runtime.precision) == ("openvino", "fp32")
    assert model.fingerprint not in ("", exact.fingerprint)
    assert loaded(bundle, "openvino").fingerprint == model.fingerprint
    stated = Runtimes(batch_tokens=512).plan("m", model.encoder.sha256, model.variant.engine)
    assert stated.reason == "the variant was made for openvino"


def test_another_engine_than_that_of_the_variant_is_refused(bundle: Path) -> None:
    with pytest.raises(ModelLoadError, match="runs in openvino only; state --engine m=openvino, or serve"):
        loaded(bundle, "onnxruntime")


def test_a_processor_without_int8_products_is_refused(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_module, "multiplies_int8", lambda: False)
    with pytest.raises(
        ModelLoadError,
        match=r"needs a processor with int8 dot products, .*; serve another .* --variant m=",
    ):
        loaded(bundle)


def test_export_and_verify_refuse_a_processor_without_int8_products(
    bundle: Path, tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "multiplies_int8", lambda: False)
    (fault,) = failed(verify_bundle(bundle))
    assert "needs a processor with int8 dot products" in fault
    with pytest.raises(ExportError, match="int8-static needs a processor with int8 dot products"):
        export_embedding(str(tiny_source), tmp_path / "b", variants=[NAME])


def test_a_server_without_openvino_names_the_extra_and_no_option(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_module, "version_of", lambda engine: "")
    with pytest.raises(ModelLoadError, match=r"needs the extra `openvino`; install .*, or serve another variant"):
        loaded(bundle)


def test_earlier_readers_refuse_the_bundle(bundle: Path) -> None:
    text = (bundle / MANIFEST_NAME).read_text(encoding="utf-8")
    assert json.loads(text)["format_version"] == 3
    with pytest.raises(BundleError, match="the engine of the variant int8-static needs the format_version 3"):
        Manifest.from_json(text.replace('"format_version": 3', '"format_version": 1'))


def test_an_engine_of_a_newer_emberpc_is_refused(bundle: Path) -> None:
    path = bundle / MANIFEST_NAME
    before = path.read_text(encoding="utf-8")
    manifest = Manifest.from_json(before)
    newer = tuple(replace(each, engine="other" if each.name == NAME else "") for each in manifest.variants)
    path.write_text(replace(manifest, variants=newer).to_json(), encoding="utf-8")
    try:
        with pytest.raises(ModelLoadError, match="was made for 'other', which this emberpc does not have"):
            loaded(bundle)
        (fault,) = failed(verify_bundle(bundle))
        assert "was made for 'other', which this emberpc does not have" in fault
        assert Model.load("m", bundle).variant.name == "fp32"
    finally:
        path.write_text(before, encoding="utf-8")


@pytest.mark.slow
@pytest.mark.whole_exports
def test_minilm_keeps_the_nearest_texts(tmp_path: Path) -> None:
    manifest = export_embedding(minilm_source(), tmp_path / "b", variants=["int8", NAME])
    dynamic, static = manifest.variant("int8").measured, manifest.variant(NAME).measured
    assert dynamic is not None
    assert static is not None
    assert static.neighbour_agreement > dynamic.neighbour_agreement
    assert static.size_bytes < 0.3 * (manifest.variant().measured or static).size_bytes
    tokens = [np.arange(1000, 1000 + length) for length in (3, 17, 60)]
    served, exact = loaded(tmp_path / "b"), Model.load("m", tmp_path / "b")
    assert cosines(exact.encoder.run(tokens), served.encoder.run(tokens)).min() > 0.95
