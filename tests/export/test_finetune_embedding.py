"""Fine-tuning an embedding model: the data, the training, and that only improved models are written."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emberpc.bundle import read_bundle
from emberpc.export import finetune
from emberpc.export.classify.linear import Matrix
from emberpc.export.data.stdlib_texts import read_stdlib
from emberpc.export.errors import ExportError
from emberpc.export.finetune import finetune_embedding
from emberpc.export.retrieval.embedder import Embedder
from emberpc.export.retrieval.metrics import measure
from emberpc.export.retrieval.mining import PassageGraph, mine
from emberpc.export.retrieval.queries import Files, Judged, Queries, RetrievalData, read_data
from emberpc.export.retrieval.ranking import TrainingOptions, TrainingOutcome, multiple_negatives_ranking, tune
from emberpc.export.source.encoder import SourceEncoder, read_encoder
from emberpc.export.tuning.checkpoint import Checkpoints
from emberpc.export.tuning.trainable_encoder import TrainableEncoder
from emberpc.export.verify import verify_bundle
from fixtures_bundles import minilm_source

Rows = Sequence[Mapping[str, object]]


def write(path: Path, rows: Rows) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
    return path


def queries(relevant: Sequence[set[int]], own: Sequence[int] = ()) -> Queries:
    count = len(relevant)
    names = tuple(f"q{i}" for i in range(count))
    none = tuple(frozenset[int]() for _ in range(count))
    return Queries(names, tuple(frozenset(known) for known in relevant), none, tuple(own) or (-1,) * count)


def pairs(count: int) -> Rows:
    return [{"query": f"query {i}", "passage": f"passage {i}"} for i in range(count)]


@pytest.fixture(scope="module")
def functions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The names of functions of the standard library, in words, with their docstrings."""
    docs = [doc for doc in read_stdlib() if 60 < len(doc.text) < 400 and doc.kind == "function"]
    docs = docs[:: len(docs) // 150][:150]
    rows = [{"query": re.sub(r"[._]+", " ", doc.name), "passage": doc.text} for doc in docs]
    return write(tmp_path_factory.mktemp("functions") / "train.jsonl", rows)


# --- reading


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_pairs_with_equal_queries_become_one_query(tmp_path: Path, suffix: str) -> None:
    rows = [*pairs(12), {"query": "query 3", "passage": "another"}, {"query": "query 4", "passage": "passage 3"}]
    data = read_data(Files(write(tmp_path / f"train{suffix}", rows)), 0)
    assert len(data.passages) == 13
    known = {
        text: relevant
        for queries in (data.train, data.held_out)
        for text, relevant in zip(queries.texts, queries.relevant, strict=True)
    }
    assert {data.passages[i] for i in known["query 3"]} == {"passage 3", "another"}
    assert {data.passages[i] for i in known["query 4"]} == {"passage 4", "passage 3"}
    assert len(known) == 12
    assert len(data.held_out) == 2
    assert not set(data.train.texts) & set(data.held_out.texts)


def test_training_pairs_are_read_from_parquet(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.Table.from_pylist(list(pairs(10))), tmp_path / "train.parquet")
    assert len(read_data(Files(tmp_path / "train.parquet"), 0).passages) == 10


def test_equal_seeds_give_equal_splits(tmp_path: Path) -> None:
    path = write(tmp_path / "train.csv", pairs(40))
    first, again, other = (read_data(Files(path), seed).held_out.texts for seed in (0, 0, 1))
    assert first == again != other


def test_negatives_of_triplets_are_read(tmp_path: Path) -> None:
    rows = [{**row, "negative": f"passage {i + 1}"} for i, row in enumerate(pairs(12))]
    data = read_data(Files(write(tmp_path / "train.csv", rows)), 0)
    for text, stated in zip(data.train.texts, data.train.negatives, strict=True):
        assert [data.passages[i] for i in stated] == [f"passage {int(text.split()[1]) + 1}"]


def test_texts_of_a_label_are_answers_of_each_other_except_held_out_texts(tmp_path: Path) -> None:
    rows = [{"text": f"{label}{i}", "label": label} for label in "abc" for i in range(8)]
    data = read_data(Files(write(tmp_path / "train.csv", rows)), 0)
    assert len(data.passages) == 24
    hidden = set(data.held_out.texts)
    assert hidden
    for text, known in zip(data.train.texts, data.train.relevant, strict=True):
        found = {data.passages[i] for i in known}
        assert found == {f"{text[0]}{i}" for i in range(8)} - {text} - hidden
    for text, known in zip(data.held_out.texts, data.held_out.relevant, strict=True):
        assert {data.passages[i] for i in known} == {f"{text[0]}{i}" for i in range(8)} - {text}


def test_texts_of_a_label_are_answers_of_validation_and_test_texts(tmp_path: Path) -> None:
    train = write(tmp_path / "t.csv", [{"text": f"{label}{i}", "label": label} for label in "ab" for i in range(3)])
    validation = write(tmp_path / "v.csv", [{"text": "a7", "label": "a"}, {"text": "b7", "label": "b"}])
    test = write(tmp_path / "e.csv", [{"text": "a9", "label": "a"}])
    data = read_data(Files(train, validation, test), 0)
    assert data.test is not None
    assert {data.passages[i] for i in data.held_out.relevant[0]} == {"a0", "a1", "a2", "a9"}
    assert {data.passages[i] for i in data.test.relevant[0]} == {"a0", "a1", "a2", "a7"}
    # No text of the validation or test file is trained on.
    assert {data.passages[i] for known in data.train.relevant for i in known} == {
        f"{a}{i}" for a in "ab" for i in range(3)
    }
    with pytest.raises(ExportError, match=r"v\.csv, line 2: the query is also in .*v\.csv"):
        read_data(Files(train, validation, validation), 0)


def test_padded_labels_are_merged_and_labels_of_another_case_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train = write(tmp_path / "t.csv", [{"text": f"a{i}", "label": f"{' ' * i}io"} for i in range(4)])
    validation = write(tmp_path / "v.csv", [{"text": "a7", "label": "io "}])
    data = read_data(Files(train, validation), 0)
    assert {data.passages[i] for i in data.held_out.relevant[0]} == {"a0", "a1", "a2", "a3"}
    assert not caplog.text
    other = write(tmp_path / "o.csv", [{"text": f"b{i}", "label": "IO"} for i in range(2)])
    read_data(Files(train, other), 0)
    assert f"{other}: labels that differ from another one only in case, " in caplog.text
    assert "written: 1, such as 'IO' and 'io'" in caplog.text
    assert "such as 'IO' and 'io'" in caplog.text


def test_a_corpus_adds_passages_with_their_titles(tmp_path: Path) -> None:
    train = write(tmp_path / "train.csv", pairs(10))
    rows: Rows = [{"_id": 7, "title": "A title", "text": "and text"}, {"text": "passage 3"}]
    data = read_data(Files(train, corpus=write(tmp_path / "corpus.jsonl", rows)), 0)
    assert data.passages[10:] == ("A title and text",)


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([{"query": "a", "passage": "b"}, {"query": "c", "passage": " "}], "line 3: passage is empty"),
        ([{"query": "a", "passage": "a"}], "line 2: query and passage are the same text"),
        ([{"question": "a", "answer": "b"}], "line 2: the columns are question, answer"),
        ([{"query": "a", "passage": "b", "negative": ""}], "line 2: negative is empty"),
        (
            [{"query": "a", "passage": "b", "negative": "c"}, {"query": "a", "passage": "c", "negative": "d"}],
            "line 2: the negative is also a passage of the same query",
        ),
        (
            [{"text": "a", "label": "x"}, {"text": "b", "label": "x"}, {"text": "c", "label": "y"}],
            "line 4: no other text has the label 'y'",
        ),
        (pairs(9), "has 9 queries; give at least 10"),
    ],
)
def test_invalid_training_data_is_refused_with_its_line(tmp_path: Path, rows: Rows, problem: str) -> None:
    with pytest.raises(ExportError, match=re.escape(problem)):
        read_data(Files(write(tmp_path / "train.csv", rows)), 0)


def test_a_validation_query_that_is_a_training_query_is_refused(tmp_path: Path) -> None:
    train, validation = write(tmp_path / "t.csv", pairs(10)), write(tmp_path / "v.csv", [*pairs(11)[9:]])
    with pytest.raises(
        ExportError, match=r"v\.csv, line 2: the query is also in .*t\.csv \(line 11\); both files share 1 queries"
    ):
        read_data(Files(train, validation), 0)


# --- measuring and mining


def test_ndcg_and_recall_equal_hand_computed_values() -> None:
    found = np.eye(12, dtype=np.float32)
    asked = np.array([[12 - i for i in range(12)]], dtype=np.float32)  # passage 0 is the nearest, 11 the farthest
    figures = measure(asked, found, queries([{1, 11}]))
    ideal = 1 + 1 / math.log2(3)
    assert figures["ndcg_at_10"] == pytest.approx((1 / math.log2(3)) / ideal)
    assert figures["recall_at_10"] == 0.5
    assert figures["recall_at_100"] == 1
    # The passage of the query itself is left out, so the second hit becomes the first.
    assert measure(asked, found, queries([{1}], own=[0]))["ndcg_at_10"] == pytest.approx(1)
    # Among some of the passages, which have their names.
    some = np.array([3, 1, 5])
    assert measure(asked, found[some], queries([{3}]), some)["ndcg_at_10"] == pytest.approx(1 / math.log2(3))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 260), st.integers(1, 8))
def test_positives_and_passages_above_the_margin_are_never_mined(seed: int, passages: int, maximum: int) -> None:
    generator = np.random.default_rng(seed)
    found = generator.normal(size=(passages, 6)).astype(np.float32)
    asked = generator.normal(size=(5, 6)).astype(np.float32)
    known = [set(generator.choice(passages, min(maximum, passages), replace=False).tolist()) for _ in range(5)]
    own = generator.integers(-1, passages, 5).tolist()
    wanted = queries(known, own)
    cosines = (asked / np.linalg.norm(asked, axis=1, keepdims=True)) @ (
        found / np.linalg.norm(found, axis=1, keepdims=True)
    ).T
    for row, negatives in enumerate(mine(asked, found, wanted, 4)):
        assert len(negatives) == len(set(negatives)) <= 4
        assert not set(negatives) & (known[row] | {own[row]})
        answer = max(cosines[row, i] for i in known[row])
        assert all(cosines[row, i] < answer for i in negatives)
        assert all(cosines[row, i] < answer - 0.049 * abs(answer) for i in negatives)


def test_the_index_refuses_input_that_would_crash_hnswlib() -> None:
    vectors = np.random.default_rng(0).normal(size=(300, 8)).astype(np.float32)
    index = PassageGraph(vectors)
    best, scores = index.nearest(vectors[:5], 3)
    assert best[:, 0].tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(scores[:, 0], 1, atol=1e-5)
    assert index.nearest(vectors[:2], 1000)[0].shape == (2, 300)
    with pytest.raises(ValueError, match="queries"):
        index.nearest(vectors[:2, :4], 3)
    for wrong in (vectors[:0], np.full((3, 8), np.nan, dtype=np.float32)):
        with pytest.raises(ExportError):
            PassageGraph(wrong)


def test_other_answers_of_a_query_are_no_negatives_in_the_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    asked, found = torch.randn(3, 5, generator=generator), torch.randn(5, 5, generator=generator)
    known = torch.zeros(3, 5, dtype=torch.bool)
    known[0, 0] = known[1, 1] = known[2, 2] = True
    plain = multiple_negatives_ranking(asked, found, known)
    known[0, 4] = True
    assert multiple_negatives_ranking(asked, found, known) < plain
    moved = found.clone()
    moved[4] = asked[0] * 9
    only_first = known.clone()
    only_first[1:, 4] = True
    unmoved = multiple_negatives_ranking(asked, found, only_first)
    torch.testing.assert_close(multiple_negatives_ranking(asked, moved, only_first), unmoved)


# --- training


def tiny_data(tmp_path: Path) -> RetrievalData:
    """Texts whose first letter is their label."""
    generator = np.random.default_rng(0)
    letters = list("uvwxyz")
    rows = [
        {"text": " ".join([label, *generator.choice(letters, 4)]), "label": label}
        for label in "abcd"
        for _ in range(12)
    ]
    return read_data(Files(write(tmp_path / "tiny.csv", rows)), 0)


QUICK = TrainingOptions(epochs=4, encoder_rate=5e-3, layers=1, hard_negatives=1, batch=8)


def same(one: TrainingOutcome, other: TrainingOutcome) -> bool:
    return all(torch.equal(tensor, other.weights[name]) for name, tensor in one.weights.items())


@pytest.fixture
def tiny(tiny_source: Path) -> SourceEncoder:
    return read_encoder(tiny_source)


def test_equal_seeds_give_equal_weights(tiny: SourceEncoder, tmp_path: Path) -> None:
    data = tiny_data(tmp_path)
    first, again = tune(data, tiny, QUICK), tune(data, tiny, QUICK)
    assert first.figures["share"] > 0
    assert first.figures == again.figures
    assert same(first, again)
    assert not same(first, tune(data, tiny, replace(QUICK, seed=1)))


def test_an_interrupted_training_resumes(tiny: SourceEncoder, tmp_path: Path) -> None:
    class StopError(Exception):
        pass

    steps: list[int] = []

    def run(stop_at: int | None, checkpoints: Checkpoints) -> TrainingOutcome:
        steps.clear()

        def progress(stage: str, done: int, total: int, detail: str = "") -> None:
            if stage == "training":
                steps.append(done)
                if done == stop_at:
                    raise StopError

        return tune(data, tiny, replace(QUICK, checkpoints=checkpoints, progress=progress))

    data, kept = tiny_data(tmp_path), tmp_path / "kept"
    plain = run(None, Checkpoints())
    with pytest.raises(StopError):
        run(len(steps) // 2 + 1, Checkpoints(kept))
    assert len(list(kept.iterdir())) == 1
    resumed = run(None, checkpoints := Checkpoints(kept))
    assert steps[0] > 1
    assert resumed.figures == plain.figures
    assert same(resumed, plain)
    # A finished training is kept until its result is stored.
    again = run(None, Checkpoints(kept))
    assert steps == []
    assert again.figures == plain.figures
    assert same(again, plain)
    checkpoints.remove()
    assert list(kept.iterdir()) == []


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 2**32 - 1))
def test_a_sample_of_judged_queries_keeps_their_answers(max_queries: int, maximum: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    relevant = [set(generator.choice(20, generator.integers(1, 4), replace=False).tolist()) for _ in range(12)]
    judged = Judged(tuple(f"passage {i}" for i in range(20)), queries(relevant))
    few = judged.few(max_queries, maximum)
    assert len(few.passages) == len(set(few.passages)) == min(maximum, 20)
    assert len(few.queries) <= min(max_queries, 12)
    for text, found in zip(few.queries.texts, few.queries.relevant, strict=True):
        known = relevant[judged.queries.texts.index(text)]
        assert found
        assert {few.passages[i] for i in found} == {f"passage {i}" for i in known} & set(few.passages)
    if maximum == 20:
        assert len(few.queries) == min(max_queries, 12)


@pytest.mark.parametrize("space", [0, 2000, 10**9])
def test_vectors_do_not_depend_on_the_number_of_stored_states(tiny: SourceEncoder, space: int) -> None:
    texts = ["abc def", "a", "xyz", "hello there you"] * 80 + [f"text {c}" for c in "abcdefgh"]
    texts = [f"{text} {'abcdefghij'[i % 10]} {'klmnopqrst'[i // 10 % 10]}" for i, text in enumerate(texts)]

    def embed(encoder: TrainableEncoder, embedder: Embedder) -> Matrix:
        embedder.keep(texts)
        with torch.no_grad():
            for parameter in encoder.train_top(1).values():
                parameter.mul_(1.1)
        return embedder.embed(texts)

    whole = TrainableEncoder(tiny)
    some = TrainableEncoder(tiny)
    expected = embed(whole, Embedder(whole, 1, space=0))
    np.testing.assert_allclose(embed(some, Embedder(some, 1, space=space)), expected, atol=5e-3)


def test_a_model_that_training_did_not_improve_is_not_written(tiny_source: Path, tmp_path: Path) -> None:
    # Each passage has the letter of its query, so the model finds all passages before the training.
    rows = [{"query": letter, "passage": f"{letter} {letter}"} for letter in "abcdefghijkl"]
    train = write(tmp_path / "train.csv", rows)
    with pytest.raises(ExportError, match=r"fine-tuning did not help: nDCG@10 of 2 held-out queries was 1\.0000"):
        finetune_embedding(Files(train), str(tiny_source), tmp_path / "bundle", epochs=1)
    assert {path.name for path in tmp_path.iterdir()} == {"train.csv"}


def test_an_interruption_leaves_no_files(tiny_source: Path, tmp_path: Path) -> None:
    def progress(stage: str, done: int, total: int, detail: str = "") -> None:
        if stage == "training":
            raise KeyboardInterrupt

    train = write(tmp_path / "train.csv", pairs(12))
    with pytest.raises(KeyboardInterrupt):
        finetune_embedding(Files(train), str(tiny_source), tmp_path / "bundle", progress=progress)
    assert {path.name for path in tmp_path.iterdir()} == {"train.csv"}


def test_the_next_export_removes_all_files_of_a_killed_one(
    tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside: set[str] = set()

    def progress(stage: str, done: int, total: int, detail: str = "") -> None:
        if stage == "converting to ONNX":
            beside.update(path.name for path in (tmp_path / "bundles").iterdir())

    monkeypatch.setattr(finetune, "_no_gain", lambda _quality: "")
    train = write(tmp_path / "train.csv", pairs(12))
    target = tmp_path / "bundles" / "bundle"
    finetune_embedding(Files(train), str(tiny_source), target, epochs=1, checkpoints=tmp_path / "c", progress=progress)
    (name,) = beside
    assert name.startswith(".bundle-new-")
    assert verify_bundle(target).ok
    assert [path.name for path in target.parent.iterdir()] == ["bundle"]
    assert list((tmp_path / "c").iterdir()) == []


@pytest.mark.slow
def test_fine_tuned_minilm_finds_more_docstrings_by_their_names(functions: Path, tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    manifest = finetune_embedding(Files(functions), minilm_source(), target, epochs=1, max_tokens=64)
    quality = manifest.quality
    assert quality["held_out_queries"] == 30
    assert quality["train_queries"] == 120
    assert 0.5 < quality["held_out_ndcg_at_10_before"] < quality["held_out_ndcg_at_10_after"] <= 1
    assert quality["held_out_recall_at_10_after"] >= quality["held_out_recall_at_10_before"]
    assert quality["mined_negatives"] > 0
    assert manifest.strategy == "multiple-negatives-ranking"
    assert manifest.weights_sha256 != read_encoder(minilm_source()).weights_sha256
    assert verify_bundle(target).ok
    assert read_bundle(target).manifest == manifest
    assert "held_out_ndcg_at_10_after" in (target / "README.md").read_text(encoding="utf-8")
    assert {path.name for path in tmp_path.iterdir()} == {"bundle"}
