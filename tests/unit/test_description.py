"""The README as the page of a package shows it has no links to files that the page lacks."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
RELATIVE = re.compile(r"\]\((?![a-z]+:|#)")


@pytest.fixture
def build() -> ModuleType:
    pytest.importorskip("hatchling", reason="hatchling is only in the environment of a build")
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("address", ["", "https://host/owner/emberpc/blob/v1"])
def test_the_description_of_the_package_has_no_relative_links(build: ModuleType, address: str) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert RELATIVE.search(readme)
    found = build.absolute(readme, address)
    assert not RELATIVE.search(found)
    if address:
        assert f"]({address}/docs/images/flow.svg?raw=true)" in found
        assert f"]({address}/docs/api.md)" in found
        assert "](#your-own-model)" in found
