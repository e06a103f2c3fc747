"""The bundles of tests/data/bundles, which tests of the server use, are what the export writes today."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from fixtures_bundles import BUNDLES

TOOL = Path(__file__).resolve().parent.parent.parent / "tools" / "make_test_bundles.py"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    # Rounds of timing give a steadier median of the speed, which is not compared.
    monkeypatch.setattr("emberpc.export.variants.measurement.ROUNDS", 1)
    spec = importlib.util.spec_from_file_location("make_test_bundles", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# The two others would show the same kind of difference, and the classifier's export takes long.
@pytest.mark.parametrize(
    "name", ["tiny", *(pytest.param(name, marks=pytest.mark.slow) for name in ("other-tiny", "tiny-classifier"))]
)
@pytest.mark.whole_exports
def test_committed_bundles_equal_those_that_the_export_writes(tool: ModuleType, tmp_path: Path, name: str) -> None:
    tool.make(tmp_path, [name])
    assert tool.differences(BUNDLES / name, tmp_path / name) == []


def test_the_comparison_of_bundles_finds_each_kind_of_difference(tool: ModuleType, tmp_path: Path) -> None:
    import shutil

    import numpy as np

    fresh = Path(shutil.copytree(BUNDLES / "tiny", tmp_path / "tiny"))
    assert tool.differences(BUNDLES / "tiny", fresh) == []
    (fresh / "new").touch()
    manifest = fresh / "emberpc.json"
    manifest.write_text(manifest.read_text().replace('"max_tokens": 32', '"max_tokens": 31'))
    with np.load(fresh / "reference.npz") as arrays:
        changed = {name: array + 1 if array.dtype.kind == "f" else array for name, array in arrays.items()}
    np.savez(fresh / "reference.npz", **changed)
    assert [line.partition(":")[0] for line in tool.differences(BUNDLES / "tiny", fresh)] == [
        "tiny/new",
        "tiny/emberpc.json",
        "tiny/reference.npz",
    ]
