"""Exports that Ctrl-C or SIGKILL ends while the process converts or trains a model."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

Emberpc = Any


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """An empty folder that only bundles are written to."""
    folder = tmp_path / "bundles"
    folder.mkdir()
    return folder


#: Where the tests run in the background, SIGINT is ignored, and a child inherits that.
_MAIN = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from emberpc.cli.main import main; sys.exit(main(sys.argv[1:]))"
)


def stopped(arguments: list[object], stage: str, number: int) -> tuple[int, str]:
    """Run a command until it prints a stage, and send it a signal; return its exit code and its stderr."""
    command = [sys.executable, "-c", _MAIN, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = ""
        for line in process.stderr:
            said += line
            if stage in line:
                process.send_signal(number)
                break
        else:
            pytest.fail(f"{stage!r} was never done: {said}")
        said += process.communicate(timeout=300)[1]
    return process.returncode, said


@pytest.mark.parametrize("stage", ["converting to ONNX", "comparing with PyTorch"])
def test_ctrl_c_during_the_conversion_of_a_model_leaves_no_file(tiny_source: Path, place: Path, stage: str) -> None:
    code, said = stopped(["export", "embedding", tiny_source, "-o", place / "bundle"], stage, signal.SIGINT)
    assert code == 130, said
    assert "Traceback" not in said
    assert list(place.iterdir()) == []


def test_files_of_a_killed_export_are_removed_by_the_next(emberpc: Emberpc, tiny_source: Path, place: Path) -> None:
    arguments = ["export", "embedding", tiny_source, "-o", place / "bundle"]
    code, said = stopped([*arguments], "comparing with PyTorch", signal.SIGKILL)
    assert code == -signal.SIGKILL, said
    (left,) = place.iterdir()
    assert left.name.startswith(".bundle-new-")
    assert emberpc(*arguments).code == 0
    assert [path.name for path in place.iterdir()] == ["bundle"]
    assert emberpc("verify", place / "bundle").code == 0


def test_a_killed_training_resumes_and_gives_an_equal_model(
    emberpc: Emberpc, training_file: Path, tiny_source: Path, tmp_path: Path
) -> None:
    def command(name: str) -> list[object]:
        place = tmp_path / name
        place.mkdir(exist_ok=True)
        return [
            *("export", "classifier", "--train", training_file, "--base", tiny_source, "-o", place / "bundle"),
            *("--strategy", "top-layers", "--epochs", "4", "--checkpoints", tmp_path / f"{name}-checkpoints"),
        ]

    code, said = stopped(command("killed"), "training on all texts", signal.SIGKILL)
    assert code == -signal.SIGKILL, said
    assert not (tmp_path / "killed" / "bundle").exists()
    assert emberpc(*command("killed")).code == 0
    assert [path.name for path in (tmp_path / "killed").iterdir()] == ["bundle"]
    assert list((tmp_path / "killed-checkpoints").iterdir()) == []
    assert emberpc(*command("whole")).code == 0
    ours, theirs = (tmp_path / name / "bundle" / "onnx" / "model.onnx" for name in ("killed", "whole"))
    assert ours.read_bytes() == theirs.read_bytes()
    assert emberpc("verify", tmp_path / "killed" / "bundle").code == 0
