"""Variants: only those within their bounds are written, and the written ones can be served."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, numpy_helper

from bundle_cache import shared_export
from emberpc.bundle import Bound, Manifest, Measured, Variant, finish_bundle, read_bundle
from emberpc.bundle.agreement import neighbour_agreement
from emberpc.client import Client
from emberpc.export.classifier import ClassifierData, export_classifier
from emberpc.export.classify.strategies import base as strategies
from emberpc.export.convert.onnx_runner import OnnxRunner
from emberpc.export.data.stdlib_texts import sample_texts
from emberpc.export.embedding import export_embedding
from emberpc.export.errors import ExportError
from emberpc.export.variants import CANDIDATES, Candidate, selection, surgery
from emberpc.export.variants.candidates import Material
from emberpc.export.variants.outliers import COLUMNS, find_outliers
from emberpc.export.variants.surgery import split_outliers
from emberpc.export.verify import VerifyReport, verify_bundle
from emberpc.server.engine import Model, ModelLoadError
from examples.server_process import ServerProcess
from fixtures_bundles import minilm_source

#: Variants of MiniLM.
NAMES = ("int8", "int8-fast", "fp16")
ALL = {"fp32", "int8-static", *NAMES}


@pytest.fixture(scope="module")
def bundle(short_minilm_source: Path, measured_texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The short MiniLM with variants, measured on fewer and shorter texts than by default."""
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in measured_texts))
    return shared_export(
        "minilm-variants",
        lambda folder: export_embedding(short_minilm_source, folder, variants=NAMES, validation=path),
        tmp_path_factory,
        measured_texts,
    )


@pytest.fixture(scope="module")
def manifest(bundle: Path) -> Manifest:
    """The manifest of `bundle`, read once, since reading it checks 170 MB."""
    return read_bundle(bundle).manifest


@pytest.fixture(scope="module")
def others(bundle: Path, manifest: Manifest, measured_texts: list[str]) -> tuple[list[str], np.ndarray]:
    """Short texts that `bundle` was not measured on, with the vectors that fp32 gives them."""
    texts = [text for text in sample_texts(150) if len(text) < 200 and text not in measured_texts][:16]
    assert len(texts) == 16
    return texts, vectors(bundle, manifest.variant(), texts)


def failed(report: VerifyReport) -> list[str]:
    return [check.name for check in report.checks if not check.ok]


def vectors(folder: Path, variant: Variant, texts: list[str]) -> np.ndarray:
    manifest = read_bundle(folder, check_hashes=False).manifest
    runner = OnnxRunner(folder / variant.path, folder / "tokenizer.json", manifest.max_tokens, manifest.pad_token_id)
    return runner.run(texts, "sentence_embedding")


def test_fp32_is_first_and_requested_variants_meet_their_bounds(bundle: Path, manifest: Manifest) -> None:
    assert [variant.name for variant in manifest.variants] == ["fp32", *NAMES]
    assert manifest.variant().bound is None
    for variant in manifest.variants[1:]:
        found, bound = variant.measured, variant.bound
        assert found is not None
        assert bound is not None
        assert found.cosine_min >= bound.cosine_min
        assert found.cosine_mean >= bound.cosine_mean
        assert found.neighbour_agreement >= bound.neighbour_agreement
        assert found.size_bytes == (bundle / variant.path).stat().st_size
        assert found.texts_per_cpu_second > 0
        assert found.load_seconds > 0
    sizes = {variant.name: variant.measured.size_bytes for variant in manifest.variants if variant.measured}
    assert sizes["int8"] < 0.3 * sizes["fp32"]
    assert sizes["fp16"] < 0.51 * sizes["fp32"]


def test_variant_files_have_the_names_that_other_libraries_use() -> None:
    paths = {candidate.name: candidate.path for candidate in CANDIDATES}
    assert paths["int8"] == "onnx/model_qint8_avx2.onnx"
    assert paths["fp16"] == "onnx/model_fp16.onnx"


def test_each_variant_has_a_fingerprint_of_its_own(bundle: Path) -> None:
    read = read_bundle(bundle)
    variants = read.manifest.variants
    assert len({read.fingerprint(variant.name) for variant in variants}) == len(variants)


@pytest.mark.parametrize(("name", "minimum"), [("fp16", 0.9999), ("int8", 0.97), ("int8-fast", 0.95)])
def test_each_variant_gives_nearly_the_vectors_of_fp32(
    bundle: Path, manifest: Manifest, others: tuple[list[str], np.ndarray], name: str, minimum: float
) -> None:
    texts, expected = others
    cosines = (expected * vectors(bundle, manifest.variant(name), texts)).sum(axis=1)
    assert cosines.min() >= minimum


def test_splitting_outliers_is_exact_and_brings_int8_nearer_to_fp32(bundle: Path, manifest: Manifest) -> None:
    model = onnx.load(str(bundle / "onnx" / "model.onnx"))
    runner = OnnxRunner(bundle / "onnx" / "model.onnx", bundle / "tokenizer.json", 64, manifest.pad_token_id)
    texts = sample_texts(12)
    columns = find_outliers(model, [batch for text in texts for batch in runner.prepare([text])])
    assert len(columns) >= 4
    assert all(len(each) == COLUMNS and (np.diff(each) > 0).all() for each in columns.values())
    split_outliers(model, columns)
    onnx.checker.check_model(model)
    feeds = runner.prepare(texts)[0]
    whole = runner.infer(feeds, "sentence_embedding")
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(["sentence_embedding"], feeds)[0], whole, atol=1e-5)
    near, fast = manifest.variant("int8").measured, manifest.variant("int8-fast").measured
    assert near is not None
    assert fast is not None
    assert near.cosine_mean > fast.cosine_mean


def test_weights_have_the_type_of_the_variant(bundle: Path, manifest: Manifest) -> None:
    graphs = {v.name: onnx.load(str(bundle / v.path)).graph for v in manifest.variants}
    bytes_of: dict[str, dict[int, int]] = {}
    for name, graph in graphs.items():
        kinds = bytes_of.setdefault(name, {})
        for tensor in graph.initializer:
            kinds[tensor.data_type] = kinds.get(tensor.data_type, 0) + numpy_helper.to_array(tensor).nbytes
    assert bytes_of["fp16"][TensorProto.FLOAT16] > 20 * bytes_of["fp16"][TensorProto.FLOAT]
    assert bytes_of["int8"][TensorProto.INT8] > 10 * bytes_of["int8"][TensorProto.FLOAT]
    # Weights of 7 bits: the sum of two products fits into 16 bits, on every processor.
    for tensor in graphs["int8"].initializer:
        if tensor.data_type == TensorProto.INT8 and tensor.name.endswith("_quantized"):
            assert np.abs(numpy_helper.to_array(tensor).astype(int)).max() <= 64


def test_the_bundle_is_verified_and_its_card_names_the_variants(bundle: Path) -> None:
    report = verify_bundle(bundle)
    assert failed(report) == []
    card = (bundle / "README.md").read_text(encoding="utf-8")
    assert all(f"| {name} |" in card for name in ("fp32", *NAMES))


def scale_a_table(graph: onnx.GraphProto) -> None:
    """Exchange the scales of the rows of the word table, so that all vectors are wrong."""
    scales = next(tensor for tensor in graph.initializer if tensor.name.endswith("word_embeddings.weight_int8"))
    values = numpy_helper.to_array(scales)[::-1].copy()
    scales.CopyFrom(numpy_helper.from_array(values, scales.name))


def forget_a_layer(graph: onnx.GraphProto) -> None:
    """Set the weights of some products to zero."""
    for tensor in [tensor for tensor in graph.initializer if tensor.name.endswith("_quantized")][:6]:
        values = np.zeros_like(numpy_helper.to_array(tensor))
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


@pytest.mark.parametrize("damage", [pytest.param(scale_a_table, marks=pytest.mark.slow), forget_a_layer])
def test_a_broken_int8_is_found_by_verify_and_refused_by_the_server(
    bundle: Path, manifest: Manifest, tmp_path: Path, damage: Callable[[onnx.GraphProto], None]
) -> None:
    folder = Path(shutil.copytree(bundle, tmp_path / "bundle", ignore=shutil.ignore_patterns("model_fp16.onnx")))
    without_fp16 = tuple(variant for variant in manifest.variants if variant.name != "fp16")
    path = folder / manifest.variant("int8").path
    model = onnx.load(str(path))
    damage(model.graph)
    onnx.save(model, str(path))
    finish_bundle(folder, dataclasses.replace(manifest, variants=without_fp16))
    assert failed(verify_bundle(folder)) == ["int8 one by one", "int8 in one batch"]
    with pytest.raises(ModelLoadError, match="does not give the outputs"):
        Model.load("m", folder, "int8")
    assert Model.load("m", folder, "int8-fast").variant.name == "int8-fast"


def test_a_server_serves_the_chosen_variant(bundle: Path, tmp_path: Path) -> None:
    manifest = read_bundle(bundle).manifest
    texts = ["merge two dictionaries", "read a file line by line"]
    flags = ("--variant", "small=int8")
    with (
        ServerProcess({"small": bundle, "full": bundle}, tmp_path / "data", *flags) as server,
        Client(server.address) as client,
    ):
        small = client.embed(texts, model="small")
        full = client.embed(texts, model="full")
        assert {model.name: model.fingerprint for model in client.models()} == {
            "small": read_bundle(bundle).fingerprint("int8"),
            "full": read_bundle(bundle).fingerprint("fp32"),
        }
    np.testing.assert_allclose(full, vectors(bundle, manifest.variant("fp32"), texts), atol=1e-5)
    # Activations have one scale for a whole batch, so a comparison of int8 with int8 needs equal batches.
    assert (np.asarray(small) * np.asarray(full)).sum(axis=1).min() > 0.95
    assert np.abs(np.asarray(small) - np.asarray(full)).max() > 1e-4


def test_auto_keeps_variants_with_a_gain_and_gives_reasons_for_the_others(
    tiny_source: Path, some_texts: Path, tmp_path: Path
) -> None:
    manifest = export_embedding(str(tiny_source), tmp_path / "bundle", variants=["auto"], validation=some_texts)
    kept = {variant.name for variant in manifest.variants}
    assert "fp32" in kept
    assert kept | set(manifest.dropped) == ALL
    assert not kept & set(manifest.dropped)
    # Quantization changes little of this model and makes no variant faster.
    assert manifest.dropped
    assert all(len(reason) > 10 for reason in manifest.dropped.values())
    files = {path.name for path in (tmp_path / "bundle" / "onnx").iterdir()}
    assert files == {Path(variant.path).name for variant in manifest.variants}
    card = (tmp_path / "bundle" / "README.md").read_text(encoding="utf-8")
    assert all(f"Tried and not kept: {name}: {reason}" in card for name, reason in manifest.dropped.items())
    assert verify_bundle(tmp_path / "bundle").ok


def test_a_variant_that_misses_its_bound_is_not_written(
    tiny_source: Path, some_texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strict = Bound(cosine_min=1.0, difference_max=0.0, cosine_mean=1.0)
    candidates = tuple(dataclasses.replace(each, bound=strict) for each in CANDIDATES if each.name == "int8")
    monkeypatch.setattr(selection, "CANDIDATES", candidates)
    with pytest.raises(ExportError, match=r"the variant int8: a cosine of [01]\.\d+, its bound is 1\.0.*nothing was"):
        export_embedding(str(tiny_source), tmp_path / "asked", variants=["int8"], validation=some_texts)
    assert not (tmp_path / "asked").exists()
    manifest = export_embedding(str(tiny_source), tmp_path / "auto", variants=["auto"], validation=some_texts)
    assert "its bound is" in manifest.dropped["int8"]
    assert not (tmp_path / "auto" / "onnx" / "model_qint8_avx2.onnx").exists()


def test_a_variant_that_cannot_be_made_is_reported(
    tiny_source: Path, some_texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_model: onnx.ModelProto) -> None:
        raise ExportError("its tables cannot be stored")

    monkeypatch.setattr(surgery, "store_as_fp16", refuse)
    monkeypatch.setattr(selection, "CANDIDATES", [each for each in CANDIDATES if each.name == "fp16"])
    with pytest.raises(ExportError, match="the variant fp16: its tables cannot be stored; nothing was written"):
        export_embedding(tiny_source, tmp_path / "bundle", variants=["fp16"], validation=some_texts)
    manifest = export_embedding(tiny_source, tmp_path / "bundle", variants=["auto"], validation=some_texts)
    assert manifest.dropped["fp16"] == "its tables cannot be stored"


@pytest.mark.parametrize(
    ("names", "message"), [(["int4"], "no variant 'int4'; there are: fp32, int8"), (["auto", "int8"], "alone")]
)
def test_unknown_variant_names_are_refused(tmp_path: Path, names: list[str], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        export_embedding("./nothing", tmp_path / "bundle", variants=names)


def test_variants_of_an_embedding_model_are_measured_on_validation_texts(tiny_source: Path, tmp_path: Path) -> None:
    path = tmp_path / "texts.csv"
    path.write_text("text\n" + "".join(f"text number {i}\n" for i in range(20)))
    manifest = export_embedding(str(tiny_source), tmp_path / "b", variants=["fp16"], validation=path)
    found = manifest.variant("fp16").measured
    assert found is not None
    assert found.texts == 20
    path.write_text("text\nonly one\n")
    with pytest.raises(ExportError, match="at least 2"):
        export_embedding(str(tiny_source), tmp_path / "c", variants=["fp16"], validation=path)


def test_variants_of_an_embedding_model_are_measured_by_retrieval(
    tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries, corpus = tmp_path / "queries.csv", tmp_path / "corpus.csv"
    letters = "abcdefghijklmnopqrst"  # each letter is in the vocabulary of the tiny model
    queries.write_text("query,passage\n" + "".join(f"{x} {x} {x},{x} {x} {x} {x}\n" for x in letters))
    corpus.write_text("text\n" + "".join(f"{x} {y}\n" for x, y in pairwise(letters)))

    def export(name: str) -> Measured | None:
        manifest = export_embedding(
            str(tiny_source), tmp_path / name, variants=["fp16"], validation=queries, corpus=corpus
        )
        assert "| nDCG@10 |" in (tmp_path / name / "README.md").read_text()
        return manifest.variant("fp16").measured

    found = export("b")
    assert found is not None
    assert found.texts == 39
    assert found.ndcg_at_10 is not None
    assert 0.5 < found.ndcg_at_10 <= 1

    def broken(material: Material) -> onnx.ModelProto:
        """Return a graph in which all words have equal vectors."""
        table = next(t for t in material.model.graph.initializer if t.name.endswith("word_embeddings.weight"))
        table.CopyFrom(numpy_helper.from_array(np.zeros_like(numpy_helper.to_array(table)), table.name))
        return material.model

    loose = Bound(cosine_min=0, difference_max=1, ndcg_share=0.99)
    monkeypatch.setattr(selection, "CANDIDATES", (Candidate("fp16", "onnx/model_fp16.onnx", loose, broken),))
    with pytest.raises(ExportError, match="nDCG@10 as a share of fp32's"):
        export("c")
    assert not (tmp_path / "c").exists()


def test_a_corpus_without_queries_is_refused(tiny_source: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.csv"
    corpus.write_text("text\na passage\n")
    with pytest.raises(ExportError, match="columns query and passage"):
        export_embedding(str(tiny_source), tmp_path / "b", corpus=corpus)


def test_variants_of_a_classifier_must_keep_the_bound_of_vectors(
    few_labelled: Path, tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(material: Material) -> onnx.ModelProto:
        """Double the vectors but not the logits; the head uses only the direction of vectors."""
        graph = material.model.graph
        for node in graph.node:
            node.input[:] = ["inner" if name == "sentence_embedding" else name for name in node.input]
            node.output[:] = ["inner" if name == "sentence_embedding" else name for name in node.output]
        graph.initializer.append(numpy_helper.from_array(np.float32(2), "two"))
        graph.node.append(onnx.helper.make_node("Mul", ["inner", "two"], ["sentence_embedding"]))
        return material.model

    bound = Bound(cosine_min=0.99, difference_max=0.01)
    monkeypatch.setattr(selection, "CANDIDATES", (Candidate("fp16", "onnx/model_fp16.onnx", bound, broken),))
    with pytest.raises(ExportError, match="sentence_embedding of the reference texts one by one: a difference"):
        export_classifier(ClassifierData(few_labelled), tiny_source, tmp_path / "b", variants=["fp16"])
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("strategy", "refit_below", "words"),
    [
        ("linear", 0, "training texts that the classifier was fitted to"),
        ("top-layers", 10_000, "training texts that the classifier was fitted to"),
        ("top-layers", 0, "training texts that were held out"),
    ],
)
def test_the_manifest_says_whether_variants_were_measured_on_training_texts(
    few_labelled: Path, tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    strategy: str, refit_below: int, words: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(strategies, "_REFIT_BELOW", refit_below)
    manifest = export_classifier(
        ClassifierData(few_labelled), tiny_source, tmp_path / "b", strategy=strategy, epochs=1, variants=["fp16"]
    )
    assert manifest.measured_on.startswith(words)
    found = manifest.variant("fp16").measured
    assert found is not None
    held_out = words == "training texts that were held out"
    assert found.texts == manifest.quality["held_out_texts" if held_out else "train_texts"]
    assert f"Measured on {found.texts} texts: {words}" in (tmp_path / "b" / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_variants_of_a_classifier_are_measured_by_its_labels(
    training_file: Path, tiny_source: Path, tmp_path: Path
) -> None:
    source = str(minilm_source())
    folder = tmp_path / "bundle"
    manifest = export_classifier(ClassifierData(training_file), source, folder, variants=["int8", "fp16"])
    assert [variant.name for variant in manifest.variants] == ["fp32", "int8", "fp16"]
    for variant in manifest.variants:
        assert variant.measured is not None
        assert variant.measured.accuracy is not None
        assert variant.measured.accuracy > 0.8
        assert variant.measured.label_agreement > 0.95
    assert verify_bundle(folder).ok
    assert Model.load("m", folder, "int8").variant.name == "int8"
    outputs = [node.name for node in ort.InferenceSession(str(folder / "onnx" / "model_qint8_avx2.onnx")).get_outputs()]
    assert outputs == ["logits", "sentence_embedding", "probabilities"]


def test_the_manifest_stores_measurements_and_is_read_without_them(manifest: Manifest) -> None:
    assert Manifest.from_json(manifest.to_json()) == manifest
    older = json.loads(manifest.to_json())
    del older["dropped"]
    for variant in older["variants"]:
        del variant["bound"], variant["measured"]
    read = Manifest.from_json(json.dumps(older))
    assert read.variant("int8").bound is None
    assert read.variant().measured is None


def test_neighbour_agreement_depends_on_the_order_of_scores() -> None:
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(60, 16)).astype(np.float32)
    assert neighbour_agreement(rows, rows * 3) == 1.0
    other = generator.normal(size=(60, 16)).astype(np.float32)
    assert neighbour_agreement(rows, other) < 0.5
