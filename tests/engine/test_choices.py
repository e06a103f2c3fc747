"""What was measured is kept in a file: damaged entries are not used, and nothing that was measured is lost."""

from __future__ import annotations

import errno
import json
import os
import time
from pathlib import Path

import pytest

from emberpc.server.engine import Choices, Runtimes, choices
from emberpc.server.engine.choices import Choice
from emberpc.server.engine.sessions.runtime import Runtime

pytest.importorskip("emberpc.server.engine.sessions.openvino", reason="the extra openvino is not installed")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "engines.json"


def runtimes(file: Path | None, engine: str = "auto", precision: str = "auto", batch_tokens: int = 0) -> Runtimes:
    return Runtimes({"": engine}, {"": precision}, 2, batch_tokens, Choices(file))


@pytest.mark.parametrize("age", [31 * 24 * 3600.0, -3600.0])
def test_an_old_choice_is_used_until_it_is_measured_again(age: float, file: Path) -> None:
    found = runtimes(file)
    among = found.candidates("m", "sha").text
    found.choices.keep("sha", among, Choice("openvino", "fp32", 128, time.time() - age, "old"))
    assert found.is_due("m", "sha")
    assert found.plan("m", "sha").runtime.engine == "openvino"


def test_nothing_is_due_if_the_settings_leave_nothing_open(file: Path) -> None:
    fixed = runtimes(file, "openvino", "fp32", 256)
    assert not fixed.is_due("m", "sha")
    plan = fixed.plan("m", "sha")
    assert (plan.runtime.engine, plan.batch_tokens, plan.reason) == ("openvino", 256, "set by the settings")


@pytest.mark.parametrize(
    ("engine", "precision", "expected"),
    [
        ("auto", "auto", "onnxruntime fp32, openvino fp32, openvino bf16"),
        ("auto", "fp32", "onnxruntime fp32, openvino fp32"),
        ("auto", "bf16", "openvino bf16"),
        ("onnxruntime", "auto", "onnxruntime fp32"),
        ("openvino", "auto", "openvino fp32, openvino bf16"),
        ("onnxruntime", "bf16", "onnxruntime bf16"),
    ],
)
def test_the_settings_decide_what_is_compared(engine: str, precision: str, expected: str) -> None:
    assert runtimes(None, engine, precision).candidates("m", "sha").text == expected


def test_without_openvino_only_onnx_runtime_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "version_of", lambda engine: "" if engine == "openvino" else "1")
    assert runtimes(None).candidates("m", "sha").text == "onnxruntime fp32"


@pytest.mark.parametrize("agreement", [None, 0.98])
def test_a_choice_of_bf16_without_an_agreement_is_not_used(agreement: float | None, file: Path) -> None:
    """A damaged file must not give a model another fingerprint."""
    found = runtimes(file)
    choice = Choice("openvino", "bf16", 128, time.time(), "measured")
    found.choices.keep("sha", found.candidates("m", "sha").text, choice)
    if agreement is not None:
        found.choices.keep_agreement("sha", "openvino", "bf16", agreement)
    assert found.plan("m", "sha").runtime == Runtime("onnxruntime", "fp32", 2)
    assert found.is_due("m", "sha")
    stated = runtimes(file, "openvino", "bf16")
    stated.choices.keep("sha", stated.candidates("m", "sha").text, choice)
    plan = stated.plan("m", "sha")
    assert (plan.runtime.precision, plan.runtime.same_model, plan.batch_tokens) == ("bf16", False, 128)
    assert not stated.is_due("m", "sha")


def test_a_file_that_cannot_be_written_is_logged_and_its_content_is_kept_in_memory(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    stored, now = Choices(file), time.time()
    stored.keep("a", "b", Choice("onnxruntime", "fp32", 128, now, "first"))
    stored.keep("c", "d", Choice("onnxruntime", "fp32", 128, now - 10**8, "old"))
    old = json.loads(file.read_text())
    with monkeypatch.context() as full:
        full.setattr(os, "fsync", fail)
        stored.keep("c", "d", Choice("onnxruntime", "fp32", 256, now, "second"))
        stored.keep_agreement("c", "openvino", "bf16", 0.995)
    assert "cannot be written" in caplog.text
    assert json.loads(file.read_text()) == old
    assert stored.choice("c", "d") == Choice("onnxruntime", "fp32", 256, now, "second")
    assert stored.agreement("c", "openvino", "bf16") == 0.995
    stored.keep("e", "f", Choice("onnxruntime", "fp32", 512, now, "third"))
    again = Choices(file)
    assert [choice and choice.reason for choice in (again.choice("a", "b"), again.choice("c", "d"))] == [
        "first",
        "second",
    ]
    assert again.agreement("c", "openvino", "bf16") == 0.995


@pytest.mark.parametrize(
    "change",
    [
        {"engine": ["openvino"]},
        {"engine": "other"},
        {"precision": None},
        {"batch_tokens": True},
        {"batch_tokens": 10**12},
        {"batch_tokens": 0},
        {"measured": "now"},
        {"reason": 7},
        {"reason": "\ud800"},
        {"reason": "x" * 10**5},
        {"more": 1},
    ],
)
def test_a_damaged_choice_is_not_used(change: dict[str, object], file: Path) -> None:
    for key in "ab":
        Choices(file).keep(key, "m", Choice("openvino", "fp32", 256, time.time(), "x"))
    entries = json.loads(file.read_text())
    next(iter(entries["choices"].values())).update(change)
    file.write_text(json.dumps(entries))
    stored = Choices(file)
    assert stored.choice("a", "m") is None
    assert stored.choice("b", "m") is not None


@pytest.mark.parametrize("value", ["NaN", "true", "-0.1", "1.1", '"1"', "[1]", "1e400"])
def test_a_damaged_agreement_is_not_used(value: str, file: Path) -> None:
    Choices(file).keep_agreement("a", "openvino", "bf16", 0.75)
    file.write_text(file.read_text().replace("0.75", value))
    assert Choices(file).agreement("a", "openvino", "bf16") is None


def test_a_file_that_is_too_large_is_not_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Choices(file).keep_agreement("a", "openvino", "bf16", 0.75)
    monkeypatch.setattr(choices, "_MAX_BYTES", file.stat().st_size - 1)
    assert Choices(file).agreement("a", "openvino", "bf16") is None


def test_what_another_process_stored_is_kept(file: Path) -> None:
    one, other = Choices(file), Choices(file)
    one.keep("a", "m", Choice("openvino", "fp32", 256, time.time(), "one"))
    one.keep_agreement("a", "openvino", "bf16", 0.75)
    assert other.choice("a", "m") == one.choice("a", "m")
    other.keep("b", "m", Choice("openvino", "fp32", 512, time.time(), "other"))
    assert Choices(file).choice("a", "m") is not None
    assert Choices(file).choice("b", "m") is not None
    assert Choices(file).agreement("a", "openvino", "bf16") == 0.75
