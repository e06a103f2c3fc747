"""Strategies: each learns, gives the same logits exported as in PyTorch, and can be interrupted."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from emberpc.bundle import Manifest, Prompts, probabilities, read_bundle
from emberpc.export.classifier import ClassifierData, export_classifier
from emberpc.export.classify.cached_encoder import CachedEncoder
from emberpc.export.classify.strategies import STRATEGIES, Options, layers
from emberpc.export.classify.strategies.base import accuracy
from emberpc.export.classify.strategies.contrastive import paired, supervised_contrastive
from emberpc.export.convert.onnx_runner import OnnxRunner
from emberpc.export.data.datasets import read_labelled
from emberpc.export.data.examples import Examples, label_names, training_examples
from emberpc.export.errors import ExportError
from emberpc.export.names import EXPORTABLE
from emberpc.export.source.encoder import SourceEncoder, read_encoder
from emberpc.export.timing import Cost
from emberpc.export.tuning.checkpoint import Checkpoint, Checkpoints, TrainingState
from emberpc.export.tuning.loop import Recipe
from emberpc.export.tuning.trainable_encoder import TrainableEncoder
from emberpc.export.verify import verify_bundle
from fixtures_bundles import MODULES, minilm_source

TUNING = [name for name, strategy in STRATEGIES.items() if strategy.tunes]
WORDS = {"fruit": ["apple", "pear", "plum", "cherry", "lemon"], "beast": ["horse", "goat", "sheep", "camel", "mouse"]}


def write(path: Path, rows: Sequence[tuple[str, str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return path


@pytest.fixture
def train(tmp_path: Path) -> Path:
    """Twenty texts of two labels; single words decide the label."""
    rows = [(f"{a} {b}", label) for label, words in WORDS.items() for a in words for b in words[:2]]
    return write(tmp_path / "train.csv", rows)


@pytest.fixture(scope="module")
def cached_encoder(minilm_bundle: Path) -> CachedEncoder:
    """A cached_encoder of a real encoder; the strategies share its vectors, as those of a comparison do."""
    runner = OnnxRunner(minilm_bundle / "onnx" / "model.onnx", minilm_bundle / "tokenizer.json", 256, 0)
    return CachedEncoder(read_encoder(minilm_source()), runner)


@pytest.fixture
def tiny_encoder(tiny_source: Path, tiny_bundle: Path) -> CachedEncoder:
    """A cached_encoder of the tiny encoder."""
    runner = OnnxRunner(tiny_bundle / "onnx" / "model.onnx", tiny_bundle / "tokenizer.json", 32, 0)
    return CachedEncoder(read_encoder(tiny_source), runner)


def of_modules(training_file: Path, per_label: int) -> tuple[Examples, Examples]:
    """Return docstrings to learn from, `per_label` of each module, and the rest to measure on.

    Long docstrings are left out: they test a strategy no better, and take several times as long.
    """
    with training_file.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if len(row["text"]) < 220]
    labels = tuple(sorted(MODULES))
    targets = np.array([[row["label"] == label for label in labels] for row in rows])
    everything = Examples(tuple(row["text"] for row in rows), targets, labels, False, label_names(labels))
    first = np.concatenate([np.flatnonzero(targets[:, label])[:per_label] for label in range(len(labels))])
    return everything.take(first), everything.take(np.setdiff1d(np.arange(len(rows)), first))


#: Strategies that train for the longest time; the fast tests use the others.
_LONG = ("contrastive", "full")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in _LONG else []) for name in STRATEGIES]
)
def test_a_strategy_classifies_texts_that_it_was_not_trained_on(
    cached_encoder: CachedEncoder, training_file: Path, name: str
) -> None:
    known, rest = of_modules(training_file, 8)
    held_out = rest.take(np.arange(0, len(rest.texts), 2))
    fitted = STRATEGIES[name].fit(known, cached_encoder, Options(epochs=1))
    right = fitted.classify(held_out.texts).argmax(axis=1) == held_out.classes
    assert right.mean() > (0.4 if name == "zero-shot" else 0.6)
    assert len(fitted.held_out) > 0
    assert (fitted.head is not None) == STRATEGIES[name].exportable
    assert (fitted.tuned is not None) == STRATEGIES[name].tunes


def test_tuned_weights_are_a_mean_of_trained_and_original_weights(
    tiny_encoder: CachedEncoder, train: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = training_examples(read_labelled(train))

    def weights(share: float) -> Mapping[str, torch.Tensor]:
        monkeypatch.setattr(layers, "_TUNED_SHARE", share)
        tuned = STRATEGIES["full"].fit(examples, tiny_encoder, Options(epochs=1)).tuned
        assert tuned is not None
        return tuned.weights

    original, mean, trained = weights(0.0), weights(0.75), weights(1.0)
    for name, values in mean.items():
        torch.testing.assert_close(values, 0.25 * original[name] + 0.75 * trained[name], atol=1e-6, rtol=1e-5)
    assert any(not torch.equal(original[name], trained[name]) for name in original)


@pytest.mark.parametrize(("have", "tuned"), [(6, 3), (12, 6), (3, 1), (1, 1)])
def test_half_of_the_layers_are_tuned(have: int, tuned: int) -> None:
    assert layers.TopLayers().top(have) == tuned
    assert layers.FullTuning().top(have) == have


def test_a_fitted_classifier_is_not_changed_by_another_fit(tiny_encoder: CachedEncoder, train: Path) -> None:
    known, others = training_examples(read_labelled(train)), ["apple goat", "a mouse", "camel and plum"]
    first = STRATEGIES["top-layers"].fit(known, tiny_encoder, Options(epochs=1))
    before = first.classify(others)
    second = STRATEGIES["full"].fit(known, tiny_encoder, Options(epochs=10))
    assert not np.allclose(before, second.classify(others), atol=1e-3)
    np.testing.assert_array_equal(first.classify(others), before)


@pytest.mark.parametrize("name", EXPORTABLE)
def test_a_bundle_of_each_strategy_gives_the_logits_of_pytorch(
    tiny_source: Path, train: Path, tmp_path: Path, name: str
) -> None:
    manifest = export_classifier(ClassifierData(train), str(tiny_source), tmp_path / "bundle", strategy=name, epochs=2)
    assert manifest.strategy == name
    assert verify_bundle(tmp_path / "bundle").ok
    untouched = read_encoder(tiny_source).weights_sha256
    assert (manifest.weights_sha256 != untouched) == (name in TUNING)
    assert {path.name for path in tmp_path.iterdir()} == {"train.csv", "bundle"}


def test_the_graph_gives_calibrated_probabilities(tiny_source: Path, train: Path, tmp_path: Path) -> None:
    manifest = export_classifier(ClassifierData(train), str(tiny_source), tmp_path / "bundle")
    session = ort.InferenceSession(tmp_path / "bundle" / "onnx" / "model.onnx")
    ids = np.array([[2, 7, 8, 9, 3]])
    feeds = {node.name: ids if node.name == "input_ids" else np.ones_like(ids) for node in session.get_inputs()}
    feeds["token_type_ids"] = np.zeros_like(ids)
    logits, _, found = session.run(["logits", "sentence_embedding", "probabilities"], feeds)
    np.testing.assert_allclose(found, probabilities(logits, manifest.temperature), atol=1e-5)


def test_texts_may_have_several_labels(tiny_source: Path, tmp_path: Path) -> None:
    rows = [("aaa", "a"), ("bbb", "b"), ("aaa bbb", "a|b"), ("ccc", "")] * 6
    train = write(tmp_path / "train.csv", rows)
    for name in ("linear", "top-layers"):
        manifest = export_classifier(
            ClassifierData(train, separator="|"), str(tiny_source), tmp_path / name, strategy=name, label_texts=False
        )
        assert manifest.multi_label
        assert manifest.labels == ("a", "b")
        assert len(manifest.thresholds) == 2
        assert manifest.quality["micro_f1"] > 0.6
        assert verify_bundle(tmp_path / name).ok
        operators = [node.op_type for node in onnx.load(tmp_path / name / "onnx" / "model.onnx").graph.node]
        assert "Sigmoid" in operators


def test_cached_lower_states_give_equal_vectors(minilm_bundle: Path) -> None:
    encoder = TrainableEncoder(read_encoder(minilm_source()))
    tokens = encoder.tokenize(["one", "a text of several words", "and\nanother, longer still, of two lines"])
    whole = encoder.embed(tokens)
    states = encoder.lower_states(tokens, 2)
    encoder.train_top(2)
    np.testing.assert_allclose(encoder.embed(tokens, states), whole, atol=2e-3)  # the states are in half precision
    encoder.reset()
    np.testing.assert_array_equal(encoder.embed(tokens), whole)


# `full` trains as `top-layers` does.
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name == "full" else []) for name in TUNING]
)
def test_an_interrupted_training_resumes(tiny_source: Path, train: Path, tmp_path: Path, name: str) -> None:
    class StopError(Exception):
        pass

    steps: list[int] = []
    stages: set[str] = set()

    def export(folder: str, stop_at: int | None = None, checkpoints: Path | None = None) -> Manifest:
        steps.clear()
        stages.clear()

        def progress(stage: str, done: int, total: int, detail: str = "") -> None:
            stages.add(stage)
            if stage == "comparing with PyTorch" and stop_at == 0:
                raise StopError
            if stage == "training on all texts":
                steps.append(done)
                if done == stop_at:
                    raise StopError

        return export_classifier(
            ClassifierData(train),
            str(tiny_source),
            tmp_path / folder,
            strategy=name,
            epochs=2,
            checkpoints=checkpoints,
            progress=progress,
        )

    kept = tmp_path / "kept"
    plain = export("plain")
    total = steps[-1]
    with pytest.raises(StopError):
        export("resumed", stop_at=total // 2 + 1, checkpoints=kept)
    assert len(list(kept.iterdir())) == 2
    assert not (tmp_path / "resumed").exists()
    with pytest.raises(StopError):
        export("resumed", stop_at=0, checkpoints=kept)
    assert steps[0] > 1
    assert "training without the held-out texts" not in stages
    # Both trainings are finished; their checkpoints are kept until the bundle is written.
    resumed = export("resumed", checkpoints=kept)
    assert steps == []
    assert resumed.weights_sha256 == plain.weights_sha256
    assert list(kept.iterdir()) == []


def test_a_damaged_checkpoint_restarts_the_training(tiny_source: Path, train: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "kept" / "a.safetensors")
    checkpoint.write(TrainingState({"value.a": torch.ones(2)}, 3, [0.5]))
    state = checkpoint.read()
    assert state is not None
    assert (state.epoch, state.scores, state.tensors["value.a"].tolist()) == (3, [0.5], [1, 1])
    (tmp_path / "kept" / "a.safetensors").write_bytes(b"no tensors")
    assert checkpoint.read() is None


def test_uninformative_label_names_are_not_training_texts(tiny_source: Path, tmp_path: Path) -> None:
    train = write(tmp_path / "train.csv", [("aaa", "7"), ("bbb", "9"), ("aab", "7"), ("bba", "9")] * 3)
    assert export_classifier(ClassifierData(train), str(tiny_source), tmp_path / "bundle").quality["label_texts"] == 0


def test_label_descriptions_are_training_texts(tiny_source: Path, tmp_path: Path) -> None:
    train = write(tmp_path / "train.csv", [("aaa", "x"), ("bbb", "y")] * 2)
    (tmp_path / "labels.csv").write_text("label,description\nx,all of a\ny,all of b\n")
    data = ClassifierData(train, descriptions=tmp_path / "labels.csv")
    manifest = export_classifier(data, str(tiny_source), tmp_path / "bundle", strategy="zero-shot")
    assert manifest.quality["label_texts"] == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x,all of a\n", "does not describe 1 label, such as 'y'"),
        ("x,all of a\ny,b\nz,c\n", "line 4: no training text has the label 'z'"),
        ("x,all of a\ny,b\nx,c\n", "line 4: the label 'x' is described twice"),
    ],
)
def test_descriptions_of_other_labels_are_refused(tiny_source: Path, tmp_path: Path, text: str, words: str) -> None:
    train = write(tmp_path / "train.csv", [("aaa", "x"), ("bbb", "y")] * 2)
    (tmp_path / "labels.csv").write_text("label,description\n" + text)
    with pytest.raises(ExportError, match=words):
        export_classifier(
            ClassifierData(train, descriptions=tmp_path / "labels.csv"), str(tiny_source), tmp_path / "bundle"
        )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"strategy": "nearest"}, "no strategy 'nearest' to export; there are: zero-shot, centroids, linear"),
        ({"rejection_rate": 1.0}, "the rejection rate is 1.0"),
        ({"max_false_rejections": -0.1}, "the share of false rejections is -0.1"),
        ({"strategy": "zero-shot", "label_texts": False}, "needs label texts"),
    ],
)
def test_invalid_options_are_refused(
    tiny_source: Path, train: Path, tmp_path: Path, options: dict[str, object], words: str
) -> None:
    with pytest.raises(ExportError, match=words):
        export_classifier(ClassifierData(train), str(tiny_source), tmp_path / "bundle", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "bundle").exists()


def test_out_of_scope_texts_set_the_rejection_threshold(tiny_source: Path, tmp_path: Path) -> None:
    def texts(letters: str, count: int) -> list[str]:
        rows = np.random.default_rng(0).choice(list(letters), (count, 6))
        return [" ".join(row) for row in rows]

    train = write(tmp_path / "train.csv", [(text, name) for name in ("abcd", "pqrs") for text in texts(name, 24)])
    (tmp_path / "outside.csv").write_text("\n".join(["text", *texts("uvwxyz", 15)]))
    data = ClassifierData(train, outside=tmp_path / "outside.csv")
    manifest = export_classifier(data, tiny_source, tmp_path / "bundle")
    assert manifest.quality["out_of_scope_auroc"] > 0.9
    quality, rule = manifest.quality, manifest.decision_rule
    assert quality["false_acceptance_rate"] < 0.2
    assert quality["false_rejection_rate"] <= quality["max_false_rejections"] == 0.05
    assert quality["out_of_scope_auroc"] == quality[f"auroc_{rule.rejection_score.value}"]
    assert rule.rejection_threshold is not None
    assert "rejection_rate" not in quality
    # 48 texts are held out, but there are only 15 out-of-scope texts.
    assert manifest.rejection_measured_on.startswith("the texts that chose")
    assert read_bundle(tmp_path / "bundle").manifest == manifest
    assert rule.rejection_score.value in (tmp_path / "bundle" / "README.md").read_text(encoding="utf-8")
    assert verify_bundle(tmp_path / "bundle").ok


def test_label_names_are_divided_into_words() -> None:
    assert label_names(["card_arrival", "cardArrival", "A/B-test", "7", "__"]) == (
        "card arrival",
        "card arrival",
        "a b test",
        "7",
        "__",
    )


def test_each_text_of_a_contrastive_batch_has_a_positive_pair() -> None:
    targets = np.eye(3, dtype=bool)[[0] * 5 + [1] * 2 + [2]]
    examples = Examples(tuple("abcdefgh"), targets, ("x", "y", "z"))
    seen: set[int] = set()
    for batch in paired(examples, 4, seed=0, epoch=0):
        assert len(batch) == len(set(batch)) <= 4
        seen |= set(batch)
    assert seen == set(range(8))


def test_the_contrastive_loss_is_less_if_positive_pairs_are_near() -> None:
    targets = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]])
    near = torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1]])
    assert supervised_contrastive(near, targets) < supervised_contrastive(near[[0, 2, 1, 3]], targets)
    alone = supervised_contrastive(near[:2], torch.eye(2))
    assert alone.item() == 0


def test_the_cost_of_a_training_includes_the_time_before_an_interruption(tmp_path: Path) -> None:
    Checkpoints(tmp_path).of(seed=0).write(TrainingState({}, 3, [0.5], Cost(20.0, 30.0)))
    checkpoints = Checkpoints(tmp_path)
    state = checkpoints.of(seed=0).read()
    assert state is not None
    assert state.spent == checkpoints.spent == Cost(20.0, 30.0)
    checkpoints.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_depends_on_encoder_settings_and_split(tiny_source: Path, tmp_path: Path) -> None:
    encoder = read_encoder(tiny_source)
    known = Examples(("a", "b"), np.eye(2, dtype=bool), ("x", "y"))
    swapped = replace(known, targets=known.targets[::-1])
    options = Options(checkpoints=Checkpoints(tmp_path))

    def written(of: SourceEncoder, held_out: Examples, trained: tuple[str, ...] = ()) -> None:
        bench = cast("CachedEncoder", SimpleNamespace(encoder=of))
        checkpoint = layers.checkpoint_of("full", known, held_out, Recipe(1), bench, options, trained)
        checkpoint.write(TrainingState({"value.a": torch.ones(1)}))

    written(encoder, known)
    written(encoder, known)
    assert len(list(tmp_path.iterdir())) == 1
    written(replace(encoder, max_tokens=encoder.max_tokens - 1), known)
    written(replace(encoder, prompts=Prompts(passage="passage: ")), known)
    written(encoder, swapped)
    assert len(list(tmp_path.iterdir())) == 4
    written(encoder, known, ("a.weight",))
    assert len(list(tmp_path.iterdir())) == 5


def test_a_score_by_cosines_tells_good_encoders_from_bad_ones_if_texts_have_several_labels() -> None:
    generator = np.random.default_rng(0)
    targets = generator.random((200, 4)) < 0.3
    examples = Examples(tuple(map(str, range(200))), targets, ("a", "b", "c", "d"), multi_label=True)
    # All cosines are above 0, as those of most encoders are.
    good, bad = (10 * (0.4 + gap * targets).astype(np.float32) for gap in (0.3, 0.0))
    good, bad = (logits + generator.normal(0, 0.5, logits.shape).astype(np.float32) for logits in (good, bad))
    assert accuracy(good, examples) == accuracy(bad, examples)
    assert accuracy(good, examples, cosines=True) > 0.95 > accuracy(bad, examples, cosines=True)
