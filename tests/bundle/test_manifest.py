"""The manifest: a written manifest is read again, and an invalid one is refused with the reason."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emberpc.bundle import (
    Bound,
    BundleError,
    DecisionRule,
    FileEntry,
    Manifest,
    Measured,
    Parity,
    Prompts,
    RejectionScore,
    Task,
    Variant,
)
from emberpc.bundle import manifest as manifest_module

TEXT = st.text(max_size=20)
SHARE = st.floats(0, 1)
COUNT = st.integers(1, 2**40)
PARITY = st.builds(Parity, texts=COUNT, max_abs_diff=SHARE, cosine_min=SHARE, label_agreement=SHARE)
BOUND = st.builds(Bound, SHARE, SHARE, SHARE, SHARE, SHARE, SHARE)
MEASURED = st.builds(
    Measured,
    texts=COUNT,
    cosine_min=SHARE,
    cosine_mean=SHARE,
    neighbour_agreement=SHARE,
    texts_per_cpu_second=SHARE,
    speedup=SHARE,
    load_seconds=SHARE,
    size_bytes=COUNT,
    label_agreement=SHARE,
    accuracy=st.none() | SHARE,
)
VARIANT = st.builds(
    Variant, name=TEXT, path=TEXT, parity=PARITY, bound=st.none() | BOUND, measured=st.none() | MEASURED
)
COMMON = {
    "base_model": TEXT,
    "revision": TEXT,
    "weights_sha256": TEXT,
    "dimensions": st.integers(4096, 8192),
    "pooling": st.sampled_from(["mean", "cls", "max"]),
    "normalize": st.booleans(),
    "max_tokens": st.integers(1, 2**20),
    "pad_token_id": st.integers(0, 2**31 - 1),
    "variants": st.lists(VARIANT, min_size=1, max_size=3, unique_by=lambda variant: variant.name).map(tuple),
    "dropped": st.dictionaries(TEXT, TEXT, max_size=3),
    "prompts": st.builds(Prompts, query=TEXT, passage=TEXT),
    "matryoshka_dimensions": st.lists(st.integers(1, 4096), max_size=3).map(tuple),
    "temperature": st.floats(1e-6, 1e6),
    "rejection_logit": st.none() | st.floats(-1e3, 1e3),
    "quality": st.dictionaries(TEXT, st.floats(allow_nan=False, allow_infinity=False), max_size=3),
    "tools": st.dictionaries(TEXT, TEXT, max_size=3),
    "created": TEXT,
    "files": st.dictionaries(TEXT, st.builds(FileEntry, sha256=TEXT, size=st.integers(0, 2**40)), max_size=3),
}
LABELS = st.lists(TEXT, min_size=2, max_size=5, unique=True).map(tuple)
MANIFESTS = st.one_of(
    st.builds(Manifest, task=st.just(Task.EMBEDDING), **COMMON),
    st.builds(Manifest, task=st.just(Task.CLASSIFICATION), labels=LABELS, multi_label=st.booleans(), **COMMON),
)
PARITY_JSON = {"texts": 1, "max_abs_diff": 0.0, "cosine_min": 1.0}
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just("\ud800")),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=5,
)


@given(MANIFESTS)
def test_a_written_manifest_is_read(manifest: Manifest) -> None:
    assert Manifest.from_json(manifest.to_json()) == manifest


@given(st.sampled_from([field.name for field in dataclasses.fields(Manifest)]), JSON)
def test_any_json_in_any_field_is_read_or_refused_with_a_bundle_error(field: str, value: object) -> None:
    data = json.loads(_manifest().to_json()) | {field: value}
    refusal = ""
    try:
        read = Manifest.from_json(json.dumps(data))
    except BundleError as error:
        refusal = str(error)
    if refusal:
        assert "emberpc.json" in refusal
    else:
        # An accepted manifest can be written, hashed and read again.
        assert read.legacy_fingerprint()
        assert Manifest.from_json(read.to_json()) == read


@pytest.mark.parametrize("change", [{"base_model": "\ud800"}, {"labels": ("\ud800", "b")}])
def test_texts_of_invalid_unicode_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(BundleError, match="no valid Unicode"):
        dataclasses.replace(_manifest(), **change)


@given(JSON)
def test_any_json_in_place_of_a_manifest_is_refused_with_a_bundle_error(value: object) -> None:
    with pytest.raises(BundleError, match=r"emberpc\.json"):
        Manifest.from_json(json.dumps(value))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"task": "translation"}, "task is 'translation'"),
        ({"task": ["embedding"]}, "task is"),
        ({"dimensions": "384"}, "dimensions is '384', which is not of type int"),
        ({"dimensions": True}, "not of type int"),
        ({"dimensions": 384.0}, "not of type int"),
        ({"dimensions": 0}, "dimensions is 0; it must be a whole number from 1 to 65536"),
        ({"dimensions": 65_537}, "whole number from 1 to 65536"),
        ({"max_tokens": -1}, "whole number from 1 to 1048576"),
        ({"max_tokens": 10**12}, "max_tokens is 1000000000000; it must be a whole number from 1 to 1048576"),
        ({"pad_token_id": -1}, "whole number from 0 to"),
        ({"pad_token_id": 2**31}, "whole number from 0 to 2147483647"),
        ({"files": {"a": {"sha256": "0", "size": 2**63}}}, "size.* is 9223372036854775808; it must be"),
        ({"base_model": "x" * 1025}, "base_model has 1025 characters; it may have at most 1024"),
        (
            {"variants": [{"name": "x" * 1025, "path": "x", "parity": PARITY_JSON}]},
            "variant's name, path or engine has 1025",
        ),
        ({"prompts": {"query": "x" * 16_385}}, "query has 16385 characters"),
        ({"quality": {"x" * 1025: 1}}, "key of quality has 1025"),
        ({"labels": ["x" * 1025, "b"]}, r"labels\[0\] has 1025 characters"),
        ({"labels": [str(i) for i in range(30_001)]}, "labels has 30001 entries; it may have at most 30000"),
        ({"labels": [f"{i}{'x' * 1000}" for i in range(1100)]}, "characters in all; it may have at most 1048576"),
        ({"matryoshka_dimensions": [1] * 1001}, "matryoshka_dimensions has 1001 entries"),
        ({"normalize": 1}, "not of type bool"),
        ({"variants": []}, "at least one ONNX file"),
        ({"variants": [{"name": "fp32", "path": "x"}]}, r"variants\[0\]\.parity is missing"),
        ({"labels": "ab"}, "labels is 'ab'"),
        ({"labels": ["a", 1]}, r"labels\[1\] is 1"),
        ({"labels": ["a", "a"]}, "the same label twice"),
        ({"task": "classification", "labels": ["a"]}, "at least two labels"),
        ({"task": "classification", "labels": ["a", "b"], "thresholds": [0.5]}, "1 thresholds for 2 labels"),
        ({"temperature": 0}, "must be above 0"),
        ({"temperature": float("nan")}, "not of type float"),
        ({"temperature": 10**400}, "not of type float"),
        ({"matryoshka_dimensions": [99]}, "from 1 to 3"),
        ({"quality": {"accuracy": "good"}}, "quality.*not of type float"),
        ({"base_model": "half a pair: \ud800"}, "not of type str"),
        ({"files": {"a": {"sha256": "0", "size": "1"}}}, "size"),
        ({"format_version": 9}, "format_version is 9, this emberpc reads 1, 2, 3; export the model again"),
        ({"format_version": True}, "export the model again"),
        ({"rejection_score": "entropy"}, "rejection_score is 'entropy'"),
        ({"rejection_threshold": 0.5}, "set rejection_logit for max_logit, not rejection_threshold"),
        ({"rejection_score": "energy", "format_version": 2}, "energy; it needs rejection_threshold"),
        (
            {"rejection_score": "energy", "rejection_threshold": 1, "rejection_logit": 1, "format_version": 2},
            "rejection_logit must be null",
        ),
        ({"rejection_score": "class_cosine", "rejection_threshold": 0.5}, "it needs the format_version 2"),
        ({"format_version": None}, "export the model again"),
    ],
)
def test_an_invalid_field_is_refused_with_the_reason(change: dict[str, Any], words: str) -> None:
    data = json.loads(_manifest().to_json()) | change
    with pytest.raises(BundleError, match=words):
        Manifest.from_json(json.dumps(data))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, '{"format_version": 1}'])
def test_an_invalid_manifest_is_refused(text: str) -> None:
    with pytest.raises(BundleError, match=r"emberpc\.json"):
        Manifest.from_json(text)


@pytest.mark.parametrize("score", RejectionScore)
def test_a_decision_rule_is_stored_in_the_lowest_format_that_supports_it(score: RejectionScore) -> None:
    rule = DecisionRule(2.0, (), 0.25, rejection_score=score)
    manifest = dataclasses.replace(_manifest(), **rule.manifest_fields())
    stored = json.loads(manifest.to_json())
    assert stored["format_version"] == (1 if score is RejectionScore.MAX_LOGIT else 2)
    assert stored["rejection_score"] == score.value
    assert Manifest.from_json(json.dumps(stored)).decision_rule == rule


@pytest.mark.parametrize("score", RejectionScore)
def test_a_reader_of_format_1_refuses_scores_that_it_does_not_support(
    score: RejectionScore, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = dataclasses.replace(_manifest(), **DecisionRule(1.0, (), 0.25, rejection_score=score).manifest_fields())
    monkeypatch.setattr(manifest_module, "FORMAT_VERSIONS", (1,))
    if score is RejectionScore.MAX_LOGIT:
        assert Manifest.from_json(text.to_json()) == text
    else:
        with pytest.raises(BundleError, match="format_version is 2, this emberpc reads 1; export the model again, or"):
            Manifest.from_json(text.to_json())


def test_a_manifest_of_format_1_rejects_by_the_best_logit() -> None:
    """`format-1.json` was written by the last version that had no other scores."""
    path = Path(__file__).parent.parent / "data" / "manifests" / "format-1.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    assert data["format_version"] == 1
    assert "rejection_score" not in data
    rule = Manifest.from_json(json.dumps(data)).decision_rule
    assert (rule.rejection_score, rule.rejection_threshold) == (RejectionScore.MAX_LOGIT, data["rejection_logit"])


def test_unknown_fields_of_a_newer_writer_are_ignored() -> None:
    manifest = _manifest()
    data = json.loads(manifest.to_json()) | {"licence": "MIT"}
    assert Manifest.from_json(json.dumps(data)) == manifest


def test_an_unknown_variant_is_refused_with_a_list_of_the_variants() -> None:
    assert _manifest().variant("").name == "fp32"
    with pytest.raises(BundleError, match="'qint8'; the bundle has: fp32"):
        _manifest().variant("qint8")


@pytest.mark.parametrize(
    "change",
    [
        {"weights_sha256": "11"},
        {"pooling": "cls"},
        {"normalize": False},
        {"dimensions": 4},
        {"prompts": Prompts(query="query: ")},
        {"files": {"tokenizer.json": FileEntry("11", 1)}},
    ],
)
def test_every_field_of_the_old_scheme_changes_the_legacy_fingerprint(change: dict[str, Any]) -> None:
    manifest = _manifest()
    assert dataclasses.replace(manifest, **change).legacy_fingerprint() != manifest.legacy_fingerprint()


@pytest.mark.parametrize("change", [{"created": "now"}, {"quality": {"x": 1.0}}, {"revision": "def"}])
def test_other_fields_do_not_change_the_legacy_fingerprint(change: dict[str, Any]) -> None:
    manifest = _manifest()
    assert dataclasses.replace(manifest, **change).legacy_fingerprint() == manifest.legacy_fingerprint()


def test_legacy_fingerprint_equals_the_one_computed_by_the_old_scheme() -> None:
    """The expected value was computed by emberpc before the present scheme."""
    manifest = dataclasses.replace(
        _manifest(), prompts=Prompts("q: ", "p: "), files={"tokenizer.json": FileEntry("11", 1)}
    )
    assert manifest.legacy_fingerprint() == "530cad5a1d9787853c34abac9882a92d8bc290721d6693b0f77dee98bfd43534"


def _manifest() -> Manifest:
    """Return a manifest. A fixture would be shared by all examples that hypothesis gives to a test."""
    return Manifest(
        task=Task.EMBEDDING,
        base_model="some/model",
        revision="abc",
        weights_sha256="00",
        dimensions=3,
        pooling="mean",
        normalize=True,
        max_tokens=16,
        pad_token_id=0,
        variants=(Variant("fp32", "onnx/model.onnx", Parity(2, 1e-6, 0.99999)),),
    )


def test_two_variants_with_the_same_name_are_refused() -> None:
    data = json.loads(_manifest().to_json())
    data["variants"] *= 2
    with pytest.raises(BundleError, match="two variants have the same name"):
        Manifest.from_json(json.dumps(data))


def test_a_bound_outside_0_to_1_is_refused() -> None:
    with pytest.raises(BundleError, match=r"cosine_min of a variant is 1\.5"):
        Bound(cosine_min=1.5, difference_max=0.1)


def test_a_bound_reports_outputs_beyond_it_and_nan() -> None:
    bound = Bound(cosine_min=0.9, difference_max=0.5)
    expected = np.eye(3, 4, dtype=np.float32)
    assert bound.faults(expected, expected + np.float32(0.1)) == []
    assert "a cosine of 0.000000, its bound is 0.9" in bound.faults(expected, np.roll(expected, 1, axis=1))
    assert bound.faults(expected, expected * 2) == ["a difference of 1.0000 of the largest value, its bound is 0.5"]
    assert len(bound.faults(expected, np.full_like(expected, np.nan))) == 2
