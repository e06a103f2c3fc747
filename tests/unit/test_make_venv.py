"""`make venv` keeps an environment whose emberpc is the editable install of this checkout, and repairs any other."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tools import make_venv

EDITABLE = {"editable": True}


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty checkout with a blank and a non-ASCII letter in its path, whose `make venv` is called by main."""
    root = tmp_path / "a chéckout"
    root.mkdir()
    monkeypatch.setattr(make_venv, "ROOT", root)
    monkeypatch.setattr(sys, "argv", ["make_venv.py"])
    return root


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Return a list that gets the commands that make_venv would run."""
    run: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: run.append(command))
    return run


def installed(checkout: Path, folder: str, origin: dict[str, Any] | None) -> None:
    """Write the files of an environment after a complete installation; `origin` is what pip records about emberpc."""
    information = checkout / folder / "lib" / "python3.11" / "site-packages" / "emberpc-0.1.0.dist-info"
    information.mkdir(parents=True)
    if origin is not None:
        (information / "direct_url.json").write_text(json.dumps(origin))
    python = checkout / folder / "bin" / "python"
    python.parent.mkdir()
    python.touch()
    (checkout / folder / make_venv.STAMP).write_text(make_venv.fingerprint())


def test_an_editable_install_of_this_checkout_is_kept(checkout: Path, commands: list[list[str]]) -> None:
    installed(checkout, ".venv", {"dir_info": EDITABLE, "url": checkout.as_uri()})
    assert make_venv.main() == 0
    assert commands == []


@pytest.mark.parametrize(
    "origin",
    [
        {"dir_info": {}, "url": "file:///{checkout}"},
        {"dir_info": EDITABLE, "url": "file:///another/checkout"},
        {"archive_info": {}, "url": "file:///dist/emberpc-0.1.0-py3-none-any.whl"},
        None,
    ],
    ids=["copy", "another checkout", "wheel", "from an index"],
)
def test_any_other_install_is_repaired(
    checkout: Path, commands: list[list[str]], origin: dict[str, Any] | None
) -> None:
    if origin is not None:
        origin = origin | {"url": origin["url"].replace("file:///{checkout}", checkout.as_uri())}
    installed(checkout, ".venv", origin)
    assert make_venv.main() == 0
    assert commands[-1][-2:] == ["-e", ".[dev]"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"dir_info": {"editable": true}}', "{"])
def test_an_install_with_a_damaged_origin_is_repaired(checkout: Path, commands: list[list[str]], text: str) -> None:
    installed(checkout, ".venv", {"dir_info": EDITABLE, "url": checkout.as_uri()})
    (origin,) = checkout.glob(".venv/lib/*/site-packages/emberpc-*/direct_url.json")
    origin.write_text(text)
    assert make_venv.main() == 0
    assert commands[-1][-2:] == ["-e", ".[dev]"]


def test_a_removed_install_is_repaired(checkout: Path, commands: list[list[str]]) -> None:
    installed(checkout, ".venv", {"dir_info": EDITABLE, "url": checkout.as_uri()})
    (record,) = checkout.rglob("direct_url.json")
    record.unlink()
    record.parent.rmdir()
    assert make_venv.main() == 0
    assert commands[-1][-2:] == ["-e", ".[dev]"]


def test_an_incomplete_installation_is_completed(checkout: Path, commands: list[list[str]]) -> None:
    installed(checkout, ".venv", {"dir_info": EDITABLE, "url": checkout.as_uri()})
    (checkout / ".venv" / make_venv.STAMP).unlink()
    assert make_venv.main() == 0
    assert len(commands) == len(make_venv.ENVIRONMENTS["all"].steps)
    assert (checkout / ".venv" / make_venv.STAMP).read_text() == make_venv.fingerprint()


def test_the_environment_of_the_matrix_needs_no_emberpc(
    checkout: Path, commands: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(checkout, ".venv-matrix", None)
    monkeypatch.setattr(sys, "argv", ["make_venv.py", "matrix"])
    assert make_venv.main() == 0
    assert commands == []
