"""The recipe of strategies that train the encoder: epochs, held-out texts, trained parameters and their cost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.models import tuning_recipes
from emberpc.export.classify.strategies import STRATEGIES
from emberpc.export.classify.strategies.base import (
    Fitted,
    Options,
    default_epochs,
    fit_and_hold_out,
    no_texts,
    quick_epochs,
    split,
)
from emberpc.export.classify.strategies.contrastive import scored
from emberpc.export.classify.strategies.layers import FullTuning
from emberpc.export.data.examples import Examples
from emberpc.export.source.encoder import read_encoder
from emberpc.export.tuning.trainable_encoder import TrainableEncoder

TUNING = [name for name, strategy in STRATEGIES.items() if strategy.tunes]


def examples_of(texts: int, labels: int = 2) -> Examples:
    """Return distinct texts, with the labels in turns."""
    targets = np.eye(labels, dtype=bool)[np.arange(texts) % labels]
    return Examples(tuple(map(str, range(texts))), targets, tuple(f"label {number}" for number in range(labels)))


@pytest.mark.parametrize(
    ("texts", "labels", "epochs"),
    [
        (77, 77, 8),
        (308, 77, 7),
        (1232, 77, 6),
        (10_010, 77, 5),
        (600, 2, 4),
        (2000, 6, 4),
        (2000, 2, 3),
        (99_000, 2, 2),
    ],
)
def test_many_texts_of_a_label_need_few_epochs(texts: int, labels: int, epochs: int) -> None:
    assert default_epochs(examples_of(texts, labels)) == epochs


@pytest.mark.parametrize(("texts", "labels", "epochs"), [(2, 2, 8), (32, 2, 8), (100, 6, 8), (130, 2, 7), (200, 2, 5)])
def test_up_to_100_texts_get_8_epochs(texts: int, labels: int, epochs: int) -> None:
    assert default_epochs(examples_of(texts, labels)) == epochs


@pytest.mark.parametrize(("texts", "epochs"), [(8, 8), (32, 8), (400, 4), (1000, 2), (1600, 1), (100_000, 1)])
def test_a_quick_training_has_no_more_epochs_than_a_full_one(texts: int, epochs: int) -> None:
    examples = examples_of(texts)
    assert quick_epochs(examples) == epochs <= default_epochs(examples)


@pytest.mark.parametrize(
    ("texts", "trainings", "held_out"), [(100, 2, 20), (1999, 2, 400), (2000, 1, 200), (10_000, 1, 500)]
)
def test_many_texts_are_trained_once_with_fewer_held_out_texts(texts: int, trainings: int, held_out: int) -> None:
    examples = examples_of(texts)
    trained: list[int] = []
    stopped: list[int | None] = []

    def fit(known: Examples, held_out: Examples | None, _epochs: int | None, _stage: str) -> tuple[Fitted, int]:
        trained.append(len(known.texts))
        stopped.append(None if held_out is None else len(held_out.texts))
        return Fitted(lambda asked: np.zeros((len(asked), 2), dtype=np.float32), no_texts(known)), 1

    fitted = fit_and_hold_out(fit, examples, Options())
    assert stopped == [held_out if held_out >= 50 else None, None][:trainings]
    assert trained == [texts - held_out, texts][:trainings]
    assert len(fitted.held_out) == held_out
    assert fitted.held_out.from_final_classifier == (trainings == 1)


def test_each_label_has_held_out_texts() -> None:
    examples = examples_of(2400, labels=150)
    trained, held_out = split(examples, seed=0)
    assert sorted([*trained, *held_out]) == list(range(2400))
    assert set(examples.classes[held_out]) == set(range(150))


@pytest.mark.parametrize("name", TUNING)
@pytest.mark.parametrize("texts", [16, 600, 2000, 10_000])
def test_a_quick_training_is_estimated_to_take_less_work(name: str, texts: int) -> None:
    examples, strategy = examples_of(texts), STRATEGIES[name]
    quick, full = strategy.passes(examples, 6, quick=True), strategy.passes(examples, 6)
    assert 0 < quick < full
    assert full <= STRATEGIES["full"].passes(examples, 6)


def test_one_training_of_full_is_three_passes_for_each_text_and_epoch() -> None:
    assert FullTuning().passes(examples_of(2000), 6) == 3 * (3 * 1800 + 200)
    assert FullTuning().passes(examples_of(2000), 6, quick=True) == 3 * 1800 + 200


def test_embeddings_are_trained_on_request_only(tiny_source: Path) -> None:
    encoder = TrainableEncoder(read_encoder(tiny_source))
    embeddings = {name for name, _ in encoder.model.named_parameters() if "embeddings" in name.split(".")}
    assert embeddings
    assert embeddings <= set(encoder.train_top(encoder.layers))
    layers = set(encoder.train_top(encoder.layers, embeddings=False))
    assert layers
    assert not layers & embeddings


def test_trained_weights_replace_the_original_ones(tiny_source: Path) -> None:
    encoder = TrainableEncoder(read_encoder(tiny_source))
    tokens = encoder.tokenize(["one", "two words"])
    original = encoder.embed(tokens)
    trained = {
        name: parameter.detach() + 0.01
        for name, parameter in encoder.train_top(encoder.layers, embeddings=False).items()
    }
    encoder.use(trained, encoder.layers)
    assert encoder.weights().keys() == trained.keys()
    for name, values in encoder.weights().items():
        assert torch.equal(values, trained[name])
    assert not np.allclose(encoder.embed(tokens), original, atol=1e-4)
    encoder.reset()
    np.testing.assert_array_equal(encoder.embed(tokens), original)


def test_a_score_of_contrastive_embeds_some_texts_of_each_label() -> None:
    assert len(scored(examples_of(40))) == 40
    assert len(scored(examples_of(10_000))) == 500
    many = examples_of(6000, labels=60)
    assert np.bincount(many.classes[scored(many)]).tolist() == [16] * 60


def test_a_recipe_of_the_benchmark_changes_a_copy_of_its_strategy() -> None:
    strategy, options = tuning_recipes.parse("full:encoder_rate=2e-4,quick=1,epochs=3")
    assert (vars(strategy)["encoder_rate"], options) == (2e-4, {"quick": 1, "epochs": 3})
    assert vars(STRATEGIES["full"])["encoder_rate"] == 1e-4
    for wrong, words in (("none", "no strategy 'none'"), ("full:rate=1", "no field 'rate'")):
        with pytest.raises(SystemExit, match=words):
            tuning_recipes.parse(wrong)
