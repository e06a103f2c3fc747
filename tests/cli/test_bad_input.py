"""Invalid input to commands: the message, the exit code, and that no file is left."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from emberpc.bundle import read_bundle
from emberpc.cli import progress
from fixtures_bundles import MakeSource

Emberpc = Any

TEXTS = "text,label\n" + "".join(f"{'ab'[i % 2] * (i // 2 + 1)},{'xy'[i % 2]}\n" for i in range(16))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An empty folder for the bundle. Files in it after a command were left by the command."""
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def refused(outcome: Any, out: Path, *words: str) -> None:
    """Check that the command failed for its input with one line that contains the words, and left no file."""
    assert outcome.code == 2, outcome.err
    assert outcome.out == ""
    message = outcome.err.splitlines()[-1]
    assert message.startswith("error: ")
    for word in words:
        assert word in message
    assert "Traceback" not in outcome.err
    assert list(out.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'text,label\na,x\n"b,y\nc,x\nd,y\n', ["line 3: ", "correct the quotes"]),
        (b"text,label\na,x\nb, c,y\n", ["line 3: ", "2 columns", "in quotes"]),
        (b"text,label\na,x\ncaf\xe9,y\n", ["line 3", "not UTF-8", "save the file as UTF-8"]),
        (b"text,label\na,x\nb\0c,y\n", ["line 3: ", "NUL", "remove"]),
        (b"text,label\na,x\n ,y\n", ["line 3: text is empty", "fill it in or remove the row"]),
        (b"text,label\na,x\nb,y\nc,x\n", ["'y' (line 3)", "check their spelling", "--min-examples 1"]),
    ],
    ids=["open quote", "columns", "encoding", "NUL", "empty text", "one example"],
)
def test_the_error_for_an_invalid_row_names_line_and_remedy(
    emberpc: Emberpc, tiny_source: Path, tmp_path: Path, out: Path, content: bytes, words: list[str]
) -> None:
    train = tmp_path / "train.csv"
    train.write_bytes(content)
    outcome = emberpc("export", "classifier", "--train", train, "--base", tiny_source, "-o", out / "bundle")
    refused(outcome, out, str(train), *words)


def test_the_error_for_a_validation_label_without_training_texts_names_its_line(
    emberpc: Emberpc, tiny_source: Path, tmp_path: Path, out: Path
) -> None:
    (train := tmp_path / "train.csv").write_text(TEXTS)
    (validation := tmp_path / "validation.csv").write_text("text,label\naa,x\nbb,z\n")
    outcome = emberpc(
        *("export", "classifier", "--train", train, "--validation", validation),
        *("--base", tiny_source, "-o", out / "bundle"),
    )
    refused(outcome, out, f"{validation}, line 3: no training text has the label 'z'", "remove the row")


@pytest.mark.usefixtures("convert_once")
def test_duplicate_texts_with_different_labels_give_a_warning(
    emberpc: Emberpc, tiny_source: Path, tmp_path: Path, out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (train := tmp_path / "train.csv").write_text(TEXTS + "a,y\n")
    outcome = emberpc("export", "classifier", "--train", train, "--base", tiny_source, "-o", out / "bundle")
    assert outcome.code == 0, outcome.err
    (warning,) = [message for message in caplog.messages if "different labels" in message]
    assert f"{train}: 1 text occurs" in warning
    assert "'a' (line 2: x, line 18: y)" in warning
    assert "correct them" in warning
    assert read_bundle(out / "bundle").manifest.quality["conflicting_texts"] == 1


@pytest.fixture
def full_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of its own, too small for a bundle."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={request.param}k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mount, check=False, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("no small disk can be mounted here; that needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


# The disk is full when the converted graph is written, or later, when the graph with the pooling is written.
@pytest.mark.parametrize("full_disk", [64, 120], indirect=True)
@pytest.mark.parametrize("kind", ["embedding", "classifier"])
@pytest.mark.usefixtures("convert_once")
def test_an_export_on_a_full_disk_is_an_input_error_and_leaves_nothing(
    emberpc: Emberpc, tiny_source: Path, tmp_path: Path, full_disk: Path, kind: str
) -> None:
    (train := tmp_path / "train.csv").write_text(TEXTS)
    arguments = [tiny_source] if kind == "embedding" else ["--base", tiny_source, "--train", train]
    outcome = emberpc("export", kind, *arguments, "-o", full_disk / "bundle")
    refused(outcome, full_disk, "free space on the disk")


@pytest.mark.parametrize("full_disk", [64, 120], indirect=True)
def test_a_full_disk_after_fine_tuning_an_embedding_model_leaves_nothing(
    emberpc: Emberpc, tiny_source: Path, tmp_path: Path, full_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emberpc.export.finetune._no_gain", lambda _quality: "")
    (train := tmp_path / "train.csv").write_text("query,passage\n" + "".join(f"{a},{a} b\n" for a in "cdefghijklmn"))
    arguments = ["--train", train, "--base", tiny_source, "--epochs", 1]
    outcome = emberpc("export", "finetune-embedding", *arguments, "-o", full_disk / "bundle")
    refused(outcome, full_disk, "free space on the disk")


# The disk is full when a checkpoint is written, or when the report and its pictures are written.
@pytest.mark.parametrize(("full_disk", "strategy"), [(16, "top-layers"), (64, "linear")], indirect=["full_disk"])
@pytest.mark.usefixtures("convert_once")
def test_a_full_disk_ends_a_comparison_and_its_measurements_are_kept(
    emberpc: Emberpc, tiny_source: Path, tmp_path: Path, full_disk: Path, strategy: str
) -> None:
    (train := tmp_path / "train.csv").write_text(TEXTS)
    data = ["--train", train, "--test", train, "--base", tiny_source, "--seeds", 1]
    outcome = emberpc("compare", *data, "--strategy", strategy, "--budget", "2,all", "-o", full_disk / "report")
    assert outcome.code == 2, outcome.err
    assert outcome.out == ""
    message = outcome.err.splitlines()[-1]
    assert message.startswith("error: ")
    assert "free space on the disk" in message
    assert "nothing was written" not in message
    assert "Traceback" not in outcome.err
    assert not (full_disk / "report" / "report.html").exists()
    assert not list((full_disk / "report").rglob("*.new"))
    if strategy == "linear":
        assert f"all measurements are kept in {full_disk / 'report'}" in message
        assert len(list((full_disk / "report" / "cells").iterdir())) == 2


@pytest.mark.parametrize("full_disk", [16], indirect=True)
@pytest.mark.usefixtures("convert_once")
def test_a_full_disk_for_checkpoints_of_a_training_is_an_input_error(
    emberpc: Emberpc, tiny_source: Path, tmp_path: Path, full_disk: Path, out: Path
) -> None:
    (train := tmp_path / "train.csv").write_text(TEXTS)
    data = ["--train", train, "--base", tiny_source, "--strategy", "top-layers", "--checkpoints", full_disk]
    outcome = emberpc("export", "classifier", *data, "-o", out / "bundle")
    refused(outcome, out, "the checkpoint", "free space on the disk")


def test_an_export_beyond_the_file_size_limit_is_an_input_error_and_leaves_nothing(
    emberpc: Emberpc, tiny_source: Path, out: Path
) -> None:
    """As with a full disk, without root: a write that makes a file larger than the limit fails, with EFBIG."""
    _, maximum = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16_000, maximum))
    try:
        outcome = emberpc("export", "embedding", tiny_source, "-o", out / "bundle")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    refused(outcome, out, "free space on the disk")


def unknown(source: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    changed = {**config, "model_type": "never-heard-of", "architectures": ["NeverModel"]}
    (source / "config.json").write_text(json.dumps(changed))


def missing(source: Path) -> None:
    (source / "model.safetensors").unlink()


def corrupt(source: Path) -> None:
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


@pytest.mark.parametrize("kind", ["embedding", "classifier"])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (unknown, ["'never-heard-of'", "architecture"]),
        (missing, ["has no *.safetensors"]),
        (corrupt, ["model.safetensors", "get it again"]),
    ],
)
def test_a_base_that_cannot_be_exported_is_an_input_error(
    emberpc: Emberpc, make_source: MakeSource, tmp_path: Path, out: Path, kind: str, damage: Any, words: list[str]
) -> None:
    damage(source := make_source())
    (train := tmp_path / "train.csv").write_text(TEXTS)
    arguments = [source] if kind == "embedding" else ["--base", source, "--train", train]
    outcome = emberpc("export", kind, *arguments, "-o", out / "deep" / "bundle")
    refused(outcome, out, str(source), *words)


@pytest.mark.usefixtures("interruptible", "convert_once")
def test_ctrl_c_during_a_training_leaves_nothing(
    emberpc: Emberpc, tiny_source: Path, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (train := tmp_path / "train.csv").write_text(TEXTS)
    (scratch := tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    training, over = threading.Event(), threading.Event()
    left: list[Path] = []

    def note(message: str) -> None:
        if message.startswith("training"):
            left.extend(out.iterdir())
            training.set()

    def interrupt() -> None:
        training.wait()
        if not over.is_set():
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    monkeypatch.setattr(progress, "note", note)
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        outcome = emberpc(
            *("export", "classifier", "--train", train, "--base", tiny_source, "-o", out / "bundle"),
            *("--strategy", "full", "--epochs", 100_000),
        )
    finally:
        over.set()
        training.set()
        thread.join()
    assert outcome.code == 130, outcome.err
    assert len(left) == 1  # there was a file to remove
    assert "Traceback" not in outcome.err
    assert list(out.iterdir()) == []
    assert [path for path in scratch.iterdir() if path.is_dir()] == []
