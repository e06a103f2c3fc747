"""`benchmarks/models/classifiers.py` reports claims that it has not measured."""

from __future__ import annotations

from benchmarks.models.classifiers import Claim


def point(strategy: str, seeds: int, accuracy: float) -> dict[str, object]:
    return {"budget": "16 a label", "profile": "full", "strategy": strategy, "seeds": seeds, "accuracy": accuracy}


def test_a_floor_is_compared_with_points_of_three_seeds_only() -> None:
    claim = Claim("accuracy", 0.89, "16 a label", ("linear", "full"))
    assert claim.check([point("linear", 3, 0.9), point("full", 1, 0.95)])[0]
    kept, said = claim.check([point("linear", 3, 0.88), point("full", 1, 0.95)])
    assert not kept
    assert said == "MISSED: linear, 16 a label: accuracy 0.8800 >= 0.89 (mean of 3 seeds)"
    assert claim.check([point("full", 2, 0.95)]) == (
        False,
        "not measured: linear or full, 16 a label: accuracy >= 0.89 (2 seeds)",
    )
    assert claim.check([])[1].startswith("not measured: ")
