"""Small data and quick exports for tests whose result does not depend on the size."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from emberpc.export import classifier, embedding
from emberpc.export.data.stdlib_texts import sample_texts
from emberpc.export.variants import measurement, selection


@pytest.fixture(autouse=True)
def quick_exports(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare, time and draw few texts, and use the conversions of tiny encoders that earlier tests made.

    Measuring a speed that no test compares took a fifth of the time of a small model's export; texts beyond the edge
    cases, the two long texts and a few docstrings took a tenth. A test with the marker `whole_exports` exports as
    users do.
    """
    if request.node.get_closest_marker("whole_exports"):
        return
    request.getfixturevalue("convert_once")
    request.getfixturevalue("quick_comparison")
    monkeypatch.setattr(measurement, "ROUNDS", 1)
    monkeypatch.setattr(selection, "_CALIBRATION_TEXTS", 64)
    monkeypatch.setattr(selection, "_ENOUGH_TEXTS", 32)
    for timing in (measurement, selection):
        monkeypatch.setattr(timing, "TIMED_TEXTS", 16)
    for exporting in (embedding, classifier):
        monkeypatch.setattr(exporting, "PARITY_TEXTS", 16)


@pytest.fixture(scope="session")
def measured_texts() -> list[str]:
    """Short docstrings to measure the variants of a real model on."""
    return [text for text in sample_texts(400) if len(text) < 200][:48]


@pytest.fixture
def some_texts(tmp_path: Path) -> Path:
    """A file with 24 texts to measure on; the default of an export is 512 docstrings."""
    path = tmp_path / "some-texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in sample_texts(24)))
    return path


@pytest.fixture
def few_labelled(training_file: Path, tmp_path: Path) -> Path:
    """A quarter of the docstrings labelled with their modules."""
    with training_file.open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    path = tmp_path / "few-labelled.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows[::4]])
    return path
