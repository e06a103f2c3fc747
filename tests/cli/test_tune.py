"""`emberpc tune` measures models without a server, and a server uses the results."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

from cli.conftest import Emberpc
from emberpc.server.engine import measuring, tuning
from emberpc.server.engine.measuring import Speeds
from emberpc.server.engine.models.encoders import Encoder
from emberpc.server.engine.sessions.runtime import Runtime

pytest.importorskip("emberpc.server.engine.sessions.openvino", reason="the extra openvino is not installed")


@pytest.fixture
def idle_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A measurement finds OpenVINO in fp32 1.5 times as fast as the others, and 256 tokens the best size."""

    def compare(encoders: Mapping[Runtime, Encoder], *_: object) -> Speeds[Runtime]:
        fast = Runtime("openvino", "fp32")
        return Speeds([{each: 1.0 if each.engine == fast.engine else 1.5 for each in encoders}])

    def sizes(*_: object) -> Speeds[int]:
        return Speeds([{128: 2.0, 256: 1.0, 512: 1.0}])

    monkeypatch.setattr(tuning, "compare_encoders", compare)
    monkeypatch.setattr(tuning, "compare_sizes", sizes)


@pytest.mark.usefixtures("idle_host")
def test_the_models_of_flags_and_folder_are_measured(tiny_bundle: Path, tmp_path: Path, emberpc: Emberpc) -> None:
    shutil.copytree(tiny_bundle, tmp_path / "models" / "b")
    (tmp_path / "models" / "no model").mkdir()
    data = tmp_path / "new" / "data"
    flags = ("--model", f"a={tiny_bundle}", "--models-dir", tmp_path / "models", "--data-dir", data)
    outcome = emberpc("tune", *flags, "--precision", "fp32")
    assert outcome.code == 0
    assert outcome.rows == [
        ["model", "engine", "precision", "batch_tokens"],
        ["b", "openvino", "fp32", "256"],
        ["a", "openvino", "fp32", "256"],
    ]
    assert "b: measured on one thread: onnxruntime fp32" in outcome.err
    assert (data / "engines.json").is_file()
    (found, _) = emberpc("tune", *flags, "--precision", "fp32", "--json").objects
    assert (found["model"], found["engine"], found["batch_tokens"]) == ("b", "openvino", 256)


def test_without_a_model_the_error_names_the_flags(tmp_path: Path, emberpc: Emberpc) -> None:
    outcome = emberpc("tune", "--data-dir", tmp_path)
    assert outcome.code == 2
    assert "give --model NAME=DIR or --models-dir DIR" in outcome.err


def test_a_busy_host_is_an_error_after_all_models_were_tried(
    tiny_bundle: Path, other_tiny_bundle: Path, tmp_path: Path, emberpc: Emberpc, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "_IDLE_SHARE", 2.0)
    models = ("--model", f"a={tiny_bundle}", "--model", f"b={other_tiny_bundle}")
    outcome = emberpc("tune", *models, "--data-dir", tmp_path)
    assert outcome.code == 2
    reason = "was not measured: the host was busy"
    assert f"model 'a' {reason}; model 'b' {reason}; try again when the host has more free processor" in outcome.err


def test_nothing_is_measured_if_the_settings_state_everything(
    tiny_bundle: Path, tmp_path: Path, emberpc: Emberpc
) -> None:
    flags = ("--engine", "onnxruntime", "--precision", "fp32", "--batch-tokens", "256", "--data-dir", tmp_path)
    outcome = emberpc("tune", "--model", f"a={tiny_bundle}", *flags)
    assert outcome.code == 0
    assert outcome.out == ""
    assert "nothing was measured" in outcome.err


@pytest.mark.parametrize("fault", ["no model", "no folder"])
def test_a_model_or_folder_that_cannot_be_used_is_an_error(
    fault: str, tiny_bundle: Path, tmp_path: Path, emberpc: Emberpc
) -> None:
    model = tmp_path if fault == "no model" else tiny_bundle
    data = tmp_path / "data"
    if fault == "no folder":
        data.write_text("a file")
    outcome = emberpc("tune", "--model", f"a={model}", "--data-dir", data)
    assert outcome.code == 2
    assert ("model 'a'" if fault == "no model" else f"{data} cannot be used") in outcome.err
