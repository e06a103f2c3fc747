"""`benchmarks/classifiers.py` says what it has not measured."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parent.parent.parent / "benchmarks" / "classifiers.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("classifiers_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def point(strategy: str, seeds: int, accuracy: float) -> dict[str, object]:
    return {"budget": "16 a label", "strategy": strategy, "seeds": seeds, "accuracy": accuracy}


def test_a_floor_is_held_by_points_of_three_seeds_alone(script: Any) -> None:
    claim = script.Claim("accuracy", 0.89, "16 a label", ("linear", "full"))
    assert claim.check([point("linear", 3, 0.9), point("full", 1, 0.95)])[0]
    kept, said = claim.check([point("linear", 3, 0.88), point("full", 1, 0.95)])
    assert not kept
    assert said == "MISSED: linear, 16 a label: accuracy 0.8800 >= 0.89 (mean of 3 seeds)"
    assert claim.check([point("full", 2, 0.95)]) == (
        False,
        "not measured: linear or full, 16 a label: accuracy >= 0.89 (2 seeds)",
    )
    assert claim.check([])[1].startswith("not measured: ")
