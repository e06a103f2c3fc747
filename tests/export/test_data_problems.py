"""Confused labels, and labels that are probably wrong."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comparison_helpers import TEXTS, outcome, summary
from emberpc.export.compare import uncertainty
from emberpc.export.compare.data_problems import confusions, suspects
from emberpc.export.compare.outcomes import Decisions, Outcome
from emberpc.export.compare.plots import draw_plots
from emberpc.export.compare.recommendation import Recommendation
from emberpc.export.compare.summary import Summary


@pytest.fixture(autouse=True, scope="module")
def few_samples() -> Iterator[None]:
    """Draw few samples of the bootstrap, since no test of this module checks an interval."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_SAMPLES", "_MIN_SAMPLES"):
            patch.setattr(uncertainty, name, 20)
        yield


def test_confusions_name_the_texts_that_cause_them() -> None:
    found = summary([outcome("linear", 4, 0.99)])
    first, second = confusions(found, found.points[0])
    assert {(first.label, first.given), (second.label, second.given)} == {
        ("label 0", "label 1"),
        ("label 1", "label 0"),
    }
    assert first.count == 2
    assert first.share == pytest.approx(2 / (TEXTS / 2))
    assert set(first.texts) | set(second.texts) == {f"text {row}" for row in range(4)}


@pytest.mark.whole_exports
def test_plots_are_drawn_even_if_labels_have_signs_of_formulas(tmp_path: Path) -> None:
    found = summary([outcome("linear", 4, 0.9)]).result
    test = replace(found.test, labels=("price_$10", "price_$20"))
    recommended = Recommendation(Summary(replace(found, test=test)))
    plots = draw_plots(recommended, confusions(recommended.summary, recommended.taken.point), tmp_path)
    assert set(plots) == {"learning-curves", "confusions", "accuracy-cost", "reliability"}
    for path in plots.values():
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 1000


def voting(strategy: str, given_labels: Iterable[int], confidence: Iterable[float]) -> Outcome:
    """Return an outcome with a label and a confidence for each test text."""
    labels = [[label] for label in given_labels]
    found = outcome(strategy, 4, 0.9)
    return replace(found, test=Decisions(list(range(len(labels))), labels, list(confidence)))


def data(wrong: float, shared: float, seed: int = 0, texts: int = 4000) -> tuple[Summary, set[int]]:
    """Return a comparison on labels of which a share is wrong, and the rows of the wrong labels.

    The encoder errs on a fifth of the texts, less often if it is confident. The words are right on 85 % of the texts on
    which the encoder is right. Where it errs, they make the same error with the probability `shared`.
    """
    generator = np.random.default_rng(seed)
    truth = generator.integers(0, 2, texts)
    confidence = generator.uniform(0.5, 1, texts)
    encoder = np.where(generator.random(texts) < confidence, truth, 1 - truth)
    right = generator.random(texts) < np.where(encoder == truth, 0.85, 1 - shared)
    words = np.where(right, truth, 1 - truth)
    flipped = generator.random(texts) < wrong
    labels = np.where(flipped, 1 - truth, truth)
    found = summary([voting("linear", encoder, confidence), voting("tf-idf", words, confidence)]).result
    test = replace(found.test, texts=tuple(f"text {i}" for i in range(texts)), targets=np.eye(2, dtype=bool)[labels])
    return Summary(replace(found, test=test)), set(np.flatnonzero(flipped).tolist())


@settings(max_examples=10, deadline=None)
@given(st.floats(0.2, 0.7), st.integers(0, 100))
def test_errors_that_encoder_and_words_share_are_not_listed_as_wrong_labels(shared: float, seed: int) -> None:
    """As in the data set of sentiments: all labels are right, and the classifiers make the same confident errors."""
    found, _ = data(0.0, shared, seed)
    # Some 40 to 140 errors are shared with a confidence of at least 0.9. By chance, a few of them may be listed.
    assert len(suspects(found)) <= 8


@pytest.mark.parametrize("wrong", [0.05, 0.1])
def test_wrong_labels_are_listed_with_about_the_stated_precision(wrong: float) -> None:
    listed, right, stated = 0, 0, 0.0
    for seed in range(5):
        found, rows = data(wrong, 0.5, seed)
        for suspect in suspects(found):
            listed += 1
            right += suspect.row in rows
            stated += suspect.probability
            assert suspect.probability >= 0.5
            assert suspect.confidence >= 0.9
            assert suspect.label != suspect.suggested
    assert listed >= 20
    assert right / listed >= stated / listed - 0.1


def test_one_kind_of_evidence_alone_lists_no_wrong_labels() -> None:
    strategies = ("linear", "centroids", "full")
    outcomes = [voting(name, [1 - row % 2 if row < 9 else row % 2 for row in range(TEXTS)], [0.99] * TEXTS)
                for name in strategies]  # fmt: skip
    assert suspects(summary(outcomes)) == []
    assert suspects(summary([voting("tf-idf", [0] * TEXTS, [0.99] * TEXTS)])) == []
