"""`emberpc embed --stream` embeds a file of any size by lines, and reports invalid lines without ending."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from emberpc.v1 import types_pb2
from fake_server import DIMENSIONS, FakeServer, Fault, vector_of

Emberpc = Any


def test_the_vectors_of_a_file_are_rows_in_the_order_of_its_lines(
    emberpc: Emberpc, fake: FakeServer, tmp_path: Path
) -> None:
    texts = [f"text {i}" for i in range(3000)]
    source, target = tmp_path / "texts.txt", tmp_path / "out.npy"
    source.write_text("\r\n".join(texts) + "\r\n")
    outcome = emberpc("embed", "--file", source, "--stream", "-o", target, "--batch-size", 100)
    assert (outcome.code, outcome.out) == (0, "")
    assert outcome.err == f"wrote 3000 × 8 float32 to {target}\n"
    assert np.array_equal(np.load(target), np.stack([vector_of(text) for text in texts]))
    config = fake.asked["EmbedStream"][0].request.config
    assert config.priority == types_pb2.PRIORITY_BULK
    assert not fake.asked["Embed"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.npy", "texts.txt"]


def test_an_invalid_line_is_reported_and_its_row_is_nan(emberpc: Emberpc, fake: FakeServer, tmp_path: Path) -> None:
    source, target = tmp_path / "texts.txt", tmp_path / "out.npy"
    source.write_text("bad\none\ntwo\nbad\n")
    outcome = emberpc("embed", "--file", source, "--stream", "-o", target)
    assert outcome.code == 2
    lines = outcome.err.splitlines()
    assert sorted(lines[:2]) == [f"{source}:1: text is bad", f"{source}:4: text is bad"]
    assert lines[2:] == [f"wrote 4 × 8 float32 to {target}", "error: 2 of 4 lines have no vector; see above"]
    matrix = np.load(target)
    assert np.isnan(matrix).any(axis=1).tolist() == [True, False, False, True]
    assert np.array_equal(matrix[1:3], np.stack([vector_of("one"), vector_of("two")]))


def test_json_output_has_the_line_number_of_each_vector(emberpc: Emberpc, fake: FakeServer) -> None:
    outcome = emberpc("embed", "--file", "-", "--stream", "--json", stdin="é\nbad\nb\n")
    assert outcome.code == 2
    assert "stdin:2: text is bad" in outcome.err
    found = {item["line"]: np.array(item["vector"], dtype=np.float32) for item in outcome.objects}
    assert sorted(found) == [1, 3]
    assert np.array_equal(found[1], vector_of("é"))
    assert np.array_equal(found[3], vector_of("b"))


def test_vectors_of_stdin_are_written_to_an_array(emberpc: Emberpc, fake: FakeServer, tmp_path: Path) -> None:
    assert emberpc("embed", "--file", "-", "--stream", "-o", tmp_path / "out.npy", stdin="a\nb").code == 0
    assert np.load(tmp_path / "out.npy").shape == (2, DIMENSIONS)


@pytest.mark.parametrize("content", ["bad\nbad\n", ""])
def test_no_array_is_written_if_no_line_has_a_vector(
    emberpc: Emberpc, fake: FakeServer, tmp_path: Path, content: str
) -> None:
    source = tmp_path / "texts.txt"
    source.write_text(content)
    assert emberpc("embed", "--file", source, "--stream", "-o", tmp_path / "out.npy").code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["texts.txt"]


def test_a_stream_that_fails_leaves_no_array(emberpc: Emberpc, fake: FakeServer, tmp_path: Path) -> None:
    source = tmp_path / "texts.txt"
    source.write_text("a\n" * 500)
    fake.faults["EmbedStream"].extend([None, None, Fault(grpc.StatusCode.NOT_FOUND, "it was unloaded", "GONE")])
    outcome = emberpc("embed", "--file", source, "--stream", "-o", tmp_path / "out.npy")
    assert (outcome.code, outcome.err) == (4, "error: it was unloaded\n")
    assert [path.name for path in tmp_path.iterdir()] == ["texts.txt"]


@pytest.mark.parametrize(
    "arguments",
    [["a", "--json"], ["--json"], ["--file", "-"], ["--file", "-", "--json", "-o", "x.npy"], ["a", "--file", "-"]],
)
def test_a_stream_needs_an_input_file_and_exactly_one_output(
    emberpc: Emberpc, fake: FakeServer, arguments: list[str]
) -> None:
    outcome = emberpc("embed", "--stream", *arguments)
    assert outcome.code == 2
    assert "--stream goes with --file and one of -o and --json" in outcome.err
    assert not fake.asked
