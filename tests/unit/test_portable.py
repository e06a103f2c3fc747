"""An hnswlib that this processor cannot run is reported with the remedy, and a working one is checked once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from emberpc.server import portable
from emberpc.server.portable import hnswlib_problem

FAKE = "import os, signal\nopen(os.environ['TRIED'], 'a').write('x')\n"


@pytest.fixture
def tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with one letter for each import of the fake hnswlib."""
    path = tmp_path / "tried"
    path.write_text("")
    monkeypatch.setenv("TRIED", str(path))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    return path


def fake(folder: Path, last: str) -> None:
    (folder / "hnswlib.py").write_text(FAKE + last)


def test_an_illegal_instruction_is_reported_with_the_remedy_each_time(tmp_path: Path, tried: Path) -> None:
    fake(tmp_path, "os.kill(os.getpid(), signal.SIGILL)\n")
    for _ in range(2):
        assert "HNSWLIB_NO_NATIVE=1" in hnswlib_problem(tmp_path)
    assert tried.read_text() == "xx"
    assert not (tmp_path / "hnswlib-checked").exists()


def test_another_failure_of_hnswlib_is_not_reported_by_the_check(tmp_path: Path, tried: Path) -> None:
    fake(tmp_path, "raise ImportError\n")
    assert hnswlib_problem(tmp_path) == ""
    assert not (tmp_path / "hnswlib-checked").exists()


def test_a_working_hnswlib_is_checked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hnswlib_problem(tmp_path) == ""
    calls: list[object] = []
    start = subprocess.Popen

    def starting(*given: Any, **options: Any) -> subprocess.Popen[bytes]:
        calls.append(given)
        return start(*given, **options)

    monkeypatch.setattr(subprocess, "Popen", starting)
    assert hnswlib_problem(tmp_path) == ""
    assert not calls
    monkeypatch.setattr(portable, "_key", lambda: "another processor")
    assert hnswlib_problem(tmp_path) == ""
    assert calls


def test_an_error_during_the_check_ends_the_check(tmp_path: Path, tried: Path) -> None:
    fake(tmp_path, "import time\ntime.sleep(600)\n")

    def fail() -> None:
        raise ModuleNotFoundError("tokenizers")

    with pytest.raises(ModuleNotFoundError):
        hnswlib_problem(tmp_path, fail)
    assert not (tmp_path / "hnswlib-checked").exists()


def test_the_check_does_not_create_a_missing_data_directory(tmp_path: Path) -> None:
    assert hnswlib_problem(tmp_path / "new") == ""
    assert not (tmp_path / "new").exists()


def test_serve_fails_with_the_remedy_for_an_unusable_hnswlib(tmp_path: Path, tried: Path) -> None:
    fake(tmp_path, "os.kill(os.getpid(), signal.SIGILL)\n")
    command = [sys.executable, "-m", "emberpc.cli.main", "serve", "--data-dir", str(tmp_path / "data")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 2
    assert "compiled for another processor" in ended.stderr
