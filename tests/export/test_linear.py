"""Linear heads: logistic regression, and the choice of its C."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emberpc.bundle import probabilities, unit
from emberpc.export.classify.linear import GRID, balanced_weights, cross_validate, fit_head, stratify


def one_hot(classes: np.ndarray) -> np.ndarray:
    return np.asarray(np.eye(int(classes.max()) + 1, dtype=bool)[classes])


def blobs(labels: int, texts: int = 200, noise: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    classes = random.integers(0, labels, texts)
    vectors = random.normal(size=(labels, 16))[classes] + noise * random.normal(size=(texts, 16))
    return vectors.astype(np.float32), classes


@pytest.mark.parametrize("c", [1.0, 100.0])
def test_a_linear_head_gives_the_probabilities_of_scikit_learn(c: float) -> None:
    from sklearn.linear_model import LogisticRegression  # here, since it takes 0.5 CPU-seconds and 50 MB

    vectors, classes = blobs(3, noise=1.5)
    found = probabilities(fit_head(vectors, one_hot(classes), c).logits(vectors))
    expected = LogisticRegression(C=c, max_iter=5000, tol=1e-8).fit(unit(vectors), classes).predict_proba(unit(vectors))
    np.testing.assert_allclose(found, expected, atol=5e-3)


def test_multi_label_heads_fit_each_label_separately() -> None:
    from sklearn.linear_model import LogisticRegression

    vectors, classes = blobs(4, noise=1.0)
    targets = one_hot(classes)[:, :3] | one_hot(classes)[:, 1:]  # 0: a, 1: a b, 2: b c, 3: c
    head = fit_head(vectors, targets, 10.0, multi_label=True)
    for label in range(3):
        alone = LogisticRegression(C=10.0, max_iter=5000, tol=1e-8).fit(unit(vectors), targets[:, label])
        expected = alone.predict_proba(unit(vectors))[:, 1]
        found = probabilities(head.logits(vectors), multi_label=True)[:, label]
        np.testing.assert_allclose(found, expected, atol=1e-2)


@pytest.mark.parametrize("labels", [2, 5])
def test_a_linear_head_learns_separable_labels(labels: int) -> None:
    vectors, classes = blobs(labels)
    found = cross_validate(vectors, one_hot(classes))
    assert found.head.weights.shape == (16, labels)
    assert found.c in GRID
    assert (found.head.logits(vectors).argmax(axis=1) == classes).mean() > 0.95
    assert (found.logits.argmax(axis=1) == classes[found.rows]).mean() > 0.9


def test_the_length_of_vectors_does_not_change_a_linear_head() -> None:
    vectors, classes = blobs(3)
    short, long = cross_validate(vectors, one_hot(classes)), cross_validate(vectors * 1000, one_hot(classes))
    assert short.c == long.c
    np.testing.assert_allclose(short.head.logits(vectors), long.head.logits(vectors * 1000), atol=1e-2)


def test_descriptions_are_used_to_train_and_never_held_out() -> None:
    vectors, classes = blobs(3, texts=60)
    found = cross_validate(vectors, one_hot(classes), always=10)
    assert found.rows.max() < 50


def test_balanced_weights_give_rare_and_frequent_labels_equal_weight() -> None:
    targets = one_hot(np.array([0] * 90 + [1] * 10))
    weights = balanced_weights(targets)
    assert weights.mean() == pytest.approx(1)
    assert weights[:90].sum() == pytest.approx(weights[90:].sum())


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(0, 3))
def test_folds_have_equal_sizes_and_no_single_text_of_a_label(drawn: list[int], seed: int) -> None:
    classes = np.unique(drawn, return_inverse=True)[1]
    folds = stratify(one_hot(classes), seed)
    for label in range(classes.max() + 1):
        own = folds[classes == label]
        if len(own) == 1:
            assert own.tolist() == [-1]
        else:
            counts = np.bincount(own, minlength=5)
            assert counts.max() - counts.min() <= 1
