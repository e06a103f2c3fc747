"""The choice of a rejection score at export, with classifiers on generated vectors and without an encoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from emberpc.bundle import Head, RejectionScore, rejection_scores, unit
from emberpc.bundle.evaluation import HeldOut
from emberpc.export.classify import rejection
from emberpc.export.classify.linear import Matrix
from emberpc.export.classify.rejection import reject_outside
from emberpc.export.classify.strategies import Fitted
from emberpc.export.data.examples import Examples
from emberpc.export.errors import ExportError

LABELS, DIMENSIONS, TEXTS = 3, 16, 180


def vectors_of(texts: Sequence[str], shift: float = 0.0) -> np.ndarray:
    """Return vectors near one of 4 centres of each text's label; the text `1.17` has label 1. Label 9 is out of scope.

    A text of label 9 has the logit of a label, but is near to no centre of a label.
    """
    found = []
    for text in texts:
        label, number = text.split(".")
        random = np.random.default_rng([int(label), int(number)])
        vector = 0.12 * random.normal(size=DIMENSIONS)
        if label == "9":
            vector[: LABELS * 4] += np.eye(LABELS * 4)[random.permutation(LABELS * 4)[:3]].sum(axis=0)
            vector[13] += 0.3
        else:
            vector[int(label) * 4 + int(number) % 4] += 1
        found.append(vector + shift * np.eye(DIMENSIONS)[15])
    return unit(np.array(found, dtype=np.float32))


def head() -> Head:
    weights = np.zeros((DIMENSIONS, LABELS), dtype=np.float32)
    for label in range(LABELS):
        weights[label * 4 : label * 4 + 4, label] = 5
    return Head(weights, np.zeros(LABELS, dtype=np.float32))


def examples_of(numbers: range) -> Examples:
    texts = tuple(f"{number % LABELS}.{number}" for number in numbers)
    return Examples(texts, np.eye(LABELS, dtype=bool)[[number % LABELS for number in numbers]], ("a", "b", "c"))


def fitted_of(examples: Examples, held_out: Examples, rows: Sequence[int], **fields: object) -> Fitted:
    logits = head().logits(vectors_of(held_out.texts))
    return Fitted(
        lambda texts: head().logits(vectors_of(texts)),
        HeldOut(logits, held_out.targets, np.array(rows, dtype=np.int64)),
        head(),
        embed=vectors_of,
        **fields,  # type: ignore[arg-type]
    )


Case = Callable[[], tuple[Fitted, Examples, Examples | None]]
OUTSIDE = [f"9.{number}" for number in range(120)]


def cross_validated() -> tuple[Fitted, Examples, Examples | None]:
    examples = examples_of(range(TEXTS))
    return fitted_of(examples, examples, range(TEXTS)), examples, None


def validated() -> tuple[Fitted, Examples, Examples | None]:
    examples, validation = examples_of(range(TEXTS)), examples_of(range(TEXTS, 2 * TEXTS))
    return fitted_of(examples, validation, ()), examples, validation


def tuned() -> tuple[Fitted, Examples, Examples | None]:
    """Return a classifier whose encoder was trained a second time on all texts and gives other vectors since then."""
    examples, rows = examples_of(range(TEXTS)), range(60)
    first = fitted_of(examples, examples.take(rows), (), tuned=object())
    second = fitted_of(examples, examples.take(rows), rows, tuned=object(), held_out_by=first)
    object.__setattr__(second, "embed", lambda texts: vectors_of(texts, shift=3.0))
    return second, examples, None


@pytest.mark.parametrize("case", [cross_validated, validated, tuned])
def test_the_best_rejection_score_is_chosen_and_stores_vectors_of_the_final_encoder(case: Case) -> None:
    fitted, examples, validation = case()
    found, scope = reject_outside(fitted, examples, validation, OUTSIDE, 0.05)
    assert found.score is RejectionScore.NEAREST_PROTOTYPE
    assert found.separate_texts
    assert found.figures["auroc_nearest_prototype"] > found.figures["auroc_max_logit"] + 0.02
    assert scope is not None
    assert len(scope.vectors) <= 8 * LABELS
    # The vectors in the bundle are those of the final encoder.
    shift = 3.0 if fitted.held_out_by else 0.0
    assert scope.nearest_cosines(vectors_of(examples.texts, shift)).min() > 0.6
    if shift:
        assert scope.vectors[:, 15].min() > 0.8
        return
    new = examples_of(range(4 * TEXTS, 6 * TEXTS)).texts
    inside = rejection_scores(found.score, head().logits(vectors_of(new)), vectors_of(new), scope)
    beyond = [f"9.{number}" for number in range(500, 900)]
    outside = rejection_scores(found.score, head().logits(vectors_of(beyond)), vectors_of(beyond), scope)
    assert (inside < found.threshold).mean() < 0.1
    assert (outside >= found.threshold).mean() == pytest.approx(found.figures["false_acceptance_rate"], abs=0.1)


def test_rejection_scores_of_held_out_texts_use_vectors_of_other_texts_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Class means and prototypes are made only from other texts, whose vectors all differ from that of the text."""
    fitted, examples, _ = cross_validated()
    nearest: list[float] = []
    original = rejection._scores

    def spy(names: Any, seed: int, known: Matrix, targets: Any, logits: Matrix, vectors: Matrix) -> object:
        nearest.append(float((unit(vectors) @ unit(known).T).max()))
        return original(names, seed, known, targets, logits, vectors)

    monkeypatch.setattr(rejection, "_scores", spy)
    reject_outside(fitted, examples, None, OUTSIDE, 0.05)
    assert len(nearest) == 6  # five folds, and the texts outside all labels
    assert max(nearest[:5]) < 1 - 1e-5


def test_a_classifier_without_a_head_is_refused() -> None:
    fitted, examples, _ = cross_validated()
    object.__setattr__(fitted, "embed", None)
    with pytest.raises(ExportError, match="linear head"):
        reject_outside(fitted, examples, None, OUTSIDE, 0.05)


def test_a_score_of_logits_is_chosen_if_there_are_too_many_labels_for_stored_vectors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("emberpc.bundle.prototypes.MAX_SCOPE_NUMBERS", LABELS * DIMENSIONS - 1)
    fitted, examples, _ = cross_validated()
    found, scope = reject_outside(fitted, examples, None, OUTSIDE, 0.05)
    assert found.score in (RejectionScore.MAX_LOGIT, RejectionScore.ENERGY)
    assert scope is None
    assert "auroc_class_cosine" not in found.figures
