"""Embedding of a corpus with Ray Data: whole, correct, and continued after a kill."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).resolve().parent.parent.parent / "examples" / "ray_embedding" / "embed_corpus.py"
FILES, ROWS = 3, 100
PART = 20

pytestmark = pytest.mark.slow


def words(number: int) -> str:
    """Return a text that differs from those of other numbers."""
    return " ".join(np.base_repr(number * 7919 + 11, 26).lower().translate(str.maketrans("0123456789", "qrstuvwxyz")))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed; run: pip install 'emberpc[ray]'")
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(FILES):
        ids = range(number * ROWS, (number + 1) * ROWS)
        texts = [None if i % 50 == 7 else " " if i % 50 == 8 else words(i) for i in ids]
        table = pa.table({"id": [f"r{i}" for i in ids], "text": pa.array(texts, pa.string()), "other": list(ids)})
        pq.write_table(table, folder / f"{number}.parquet", row_group_size=30)
    return folder


def command(corpus: Path, out: Path, model: Path, rows: int = PART) -> list[str]:
    arguments = [str(corpus), str(out), "--model", str(model), "--rows", str(rows), "--actors", "2"]
    return [sys.executable, str(SCRIPT), *arguments]


def test_a_killed_job_continues_with_the_remaining_parts(corpus: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    from emberpc.server.engine import Model, Truncation
    from emberpc.server.errors import items_of

    out = tmp_path / "vectors"
    with subprocess.Popen(command(corpus, out, tiny_bundle), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        parts = 0
        while parts < 3:
            line = process.stdout.readline()
            assert line, "it ended before it could be killed"
            parts += line.startswith("part-")
        process.kill()
    (out / ".part-00002-000004.parquet.1").write_bytes(b"half a file")
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("part-*")}
    assert len(before) >= 3

    again = subprocess.run(command(corpus, out, tiny_bundle), capture_output=True, text=True, check=True, timeout=300)
    assert again.stdout.startswith(f"{FILES * ROWS // PART} parts, ")
    assert int(again.stdout.split()[2]) >= 3
    found = sorted(out.glob("part-*"))
    assert len(found) == FILES * ROWS // PART
    assert before.items() <= {path.name: path.stat().st_mtime_ns for path in found}.items()
    assert not list(out.glob(".part-*"))

    rows = [row for path in found for row in pq.read_table(path).to_pylist()]
    assert [row["id"] for row in rows] == [f"r{i}" for i in range(FILES * ROWS)]
    assert [row["vector"] is None for row in rows] == [i % 50 in (7, 8) for i in range(FILES * ROWS)]
    texts = [row["text"] for row in rows if row["vector"]]
    model = Model.load("tiny", tiny_bundle)
    ids = [text.ids for text in model.tokenizer.tokenize(texts, "", Truncation.END, items_of("texts"))]
    truth = np.concatenate([model.encoder.run([each]) for each in ids])
    assert np.allclose(np.array([row["vector"] for row in rows if row["vector"]]), truth, atol=1e-5)

    whole = subprocess.run(command(corpus, out, tiny_bundle), capture_output=True, text=True, check=True, timeout=300)
    assert whole.stdout == "15 parts, 15 of them done before\n"


def test_a_folder_of_another_job_is_refused(
    corpus: Path, tiny_bundle: Path, other_tiny_bundle: Path, tmp_path: Path
) -> None:
    out = tmp_path / "vectors"
    subprocess.run(command(corpus / "0.parquet", out, tiny_bundle), capture_output=True, check=True, timeout=300)
    for other, word in (
        (command(corpus, out, tiny_bundle), "corpus"),
        (command(corpus / "0.parquet", out, other_tiny_bundle), "model"),
        (command(corpus / "0.parquet", out, tiny_bundle, rows=50), "rows"),
    ):
        refused = subprocess.run(other, capture_output=True, text=True, check=False, timeout=300)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert f"another job, with another {word}" in refused.stderr


@pytest.mark.parametrize("wrong", ["nothing", "text", "no-column"])
def test_an_invalid_corpus_is_refused_by_name(corpus: Path, tiny_bundle: Path, tmp_path: Path, wrong: str) -> None:
    folder = tmp_path / wrong
    folder.mkdir()
    arguments = command(folder, tmp_path / "vectors", tiny_bundle)
    if wrong == "text":
        (folder / "0.parquet").write_text("id,text\n")
    if wrong == "no-column":
        arguments = [*command(corpus, tmp_path / "vectors", tiny_bundle), "--text-column", "body"]
    refused = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=300)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: ")
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "vectors").exists()
