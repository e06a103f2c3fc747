"""`emberpc collection export` and `import`: records survive both, files are whole, invalid records fail alone."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emberpc.client import Client, Record
from fake_server import FakeServer
from stream_helpers import LETTERS, texts_of

pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

Emberpc = Any
LONG = " ".join(LETTERS * 2)
ODD = 'naïve "ключ"\u2028/鍵 #1'


@pytest.fixture
def client(tiny_client: Client) -> Client:
    """A client of the server of tiny models."""
    return tiny_client


@pytest.fixture
def notes(client: Client) -> list[Record]:
    """The records of a collection `notes` with settings of its own, embedded by the server."""
    client.create_collection(
        "notes",
        model="tiny",
        distance="dot_product",
        truncation="end",
        m=8,
        ef_construction=50,
        indexed_fields=["number", "a b"],
    )
    client.upsert(
        "notes",
        [
            Record(f"n/{i:03}", text, {"number": i, "x": [None, True, 1.5, {"y": ODD}]}, "label" if i % 2 else "")
            for i, text in enumerate(texts_of(300))
        ]
        + [Record(ODD, LONG, time_to_live=3600)],
    )
    return list(client.records("notes", with_vectors=True, page_size=1000))


def same(found: list[Record], wanted: list[Record]) -> bool:
    return found == wanted and all(
        one.vector is not None and other.vector is not None and one.vector.tobytes() == other.vector.tobytes()
        for one, other in zip(found, wanted, strict=True)
    )


def settings_of(client: Client, name: str) -> dict[str, Any]:
    own = ("name", "record_count", "sequence", "size_bytes", "create_time")
    return {key: value for key, value in vars(client.get_collection(name)).items() if key not in own}


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_an_exported_and_deleted_collection_is_equal_after_its_import(
    client: Client, emberpc: Emberpc, notes: list[Record], tmp_path: Path, suffix: str
) -> None:
    file = tmp_path / f"notes.{suffix}"
    hits = client.search("notes", "a b c", top_k=20)
    settings = settings_of(client, "notes")
    outcome = emberpc("collection", "export", "notes", "-o", file)
    assert (outcome.code, outcome.out) == (0, "")
    assert outcome.err.startswith(f"wrote 301 records to {file}\n")
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    client.delete_collection("notes")
    if suffix == "jsonl":
        (reported,) = outcome.err.splitlines()[1:]
        assert reported.startswith("to make the collection again: emberpc collection create notes --model tiny ")
        command = reported.partition(": ")[2].replace("emberpc", f"{sys.executable} -m emberpc.cli.main")
        subprocess.run(command, shell=True, check=True, capture_output=True, timeout=300)
        outcome = emberpc("collection", "import", "notes", file, "--json")
    else:
        outcome = emberpc("collection", "import", "notes", file, "--json", "--create")
        assert outcome.err == "created the collection notes: model tiny, 32 dimensions, dot_product\n"
    assert outcome.code == 0, outcome.err
    assert outcome.objects[0]["inserted"] == 301
    assert settings_of(client, "notes") == settings
    found = list(client.records("notes", with_vectors=True))
    assert same(found, notes)
    (left,) = (record.time_to_live for record in found if record.time_to_live is not None)
    assert 3000 < left <= 3600
    assert client.search("notes", "a b c", top_k=20) == hits


def test_filtered_records_are_exported_and_imported_through_pipes_without_vectors(
    client: Client, emberpc: Emberpc, notes: list[Record]
) -> None:
    outcome = emberpc("collection", "export", "notes", "-o", "-", "--where", "number < 3", "--no-vectors")
    assert outcome.code == 0
    assert [(item["id"], "vector" in item, "revision" in item) for item in outcome.objects] == [
        (f"n/{i:03}", False, False) for i in range(3)
    ]
    again = emberpc("collection", "import", "copy", "-", "--create", "--model", "tiny", stdin=outcome.out)
    assert again.code == 0, again.err
    copied = list(client.records("copy", with_vectors=True))
    assert copied == [record for record in notes if record.id in ("n/000", "n/001", "n/002")]


def test_import_reports_invalid_records_with_their_places_and_writes_the_others(
    client: Client, emberpc: Emberpc, tmp_path: Path
) -> None:
    client.create_collection("c", model="tiny")
    lines = tmp_path / "r.jsonl"
    lines.write_bytes(
        b'{"id": "a", "text": "a"}\nnonsense\n\n{"text": "b"}\n{"id": "\xff"}\n{"id": "c", "text": 7}\n'
        b'{"id": "long", "text": "' + LONG.encode() + b'"}\n{"id": "z", "text": "z"}\n'
    )
    table = tmp_path / "r.csv"
    table.write_text("id,text,metadata\nb,b,{}\nc\nd,d,{x}\ne,,\ny,y,\n")
    rows = tmp_path / "r.parquet"
    nested = [{"id": "c", "text": "c", "metadata": "[1]"}, {"id": None, "text": "d", "metadata": None}]
    good = [{"id": key, "text": key, "metadata": "{}"} for key in "fgx"]
    pq.write_table(pa.Table.from_pylist([good[0], *nested, good[1], {"id": "h", "text": " "}, good[2]]), rows)

    outcome = emberpc("collection", "import", "c", lines, "--json")
    assert outcome.code == 2
    assert outcome.objects[0]["inserted"] == 2
    reported = sorted(outcome.err.splitlines())
    assert reported[0] == f"{lines}:2: the line is not JSON"
    assert reported[1] == f"{lines}:4: there is no id; give each record one"
    assert reported[2] == f"{lines}:5: byte 9 of the line is not UTF-8; convert the file to it"
    assert reported[3] == f"{lines}:6: text is of type int; it must be a str"
    assert reported[4].startswith(f"{lines}:7: text has ")
    assert reported[5:] == ["error: 5 of 7 records were not written; the lines above say why"]

    outcome = emberpc("collection", "import", "c", table)
    assert outcome.code == 2
    assert sorted(outcome.err.splitlines()) == [
        f"{table}:3: there are 1 cells for 3 columns; check the delimiters",
        f"{table}:4: metadata is not JSON",
        f"{table}:5: text is empty; give the record a text or a vector",
        "error: 3 of 5 records were not written; the lines above say why",
    ]

    outcome = emberpc("collection", "import", "c", rows)
    assert outcome.code == 2
    assert sorted(outcome.err.splitlines()) == [
        f"{rows}: row 2: metadata is no JSON object; write {{…}}",
        f"{rows}: row 3: there is no id; give each record one",
        f"{rows}: row 5: text is empty; give the record a text or a vector",
        "error: 3 of 6 records were not written; the lines above say why",
    ]
    assert [record.id for record in client.records("c")] == ["a", "b", "f", "g", "x", "y", "z"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with texts, and with files that an import leaves out."""
    root = tmp_path / "texts"
    for name, content in {
        "b.md": "\ufeffa b c\r\n \r\n\r\nd e\nf\r\n\r\n",
        "sub/deep/x.TXT": "x y z\n",
        "a.txt": "a",
        "sub/é.txt": "e f",
        ".hidden.txt": "h",
        ".git/y.txt": "g",
        "code.py": "p",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content.encode())
    return root


def test_import_of_a_folder_makes_a_record_of_each_text_file(client: Client, emberpc: Emberpc, folder: Path) -> None:
    outcome = emberpc("collection", "import", "texts", folder, "--create", "--model", "tiny", "--truncation", "end")
    assert outcome.code == 0, outcome.err
    found = {record.id: (record.text, record.metadata) for record in client.records("texts")}
    assert found == {
        "a.txt": ("a", {"path": "a.txt"}),
        "b.md": ("a b c\r\n \r\n\r\nd e\nf\r\n\r\n", {"path": "b.md"}),
        "sub/deep/x.TXT": ("x y z\n", {"path": "sub/deep/x.TXT"}),
        "sub/é.txt": ("e f", {"path": "sub/é.txt"}),
    }
    assert client.get_collection("texts").truncation == "end"


def test_split_paragraphs_makes_a_record_of_each_paragraph(client: Client, emberpc: Emberpc, folder: Path) -> None:
    client.create_collection("c", model="tiny")
    assert emberpc("collection", "import", "c", folder, "--split", "paragraphs").code == 0
    found = {record.id: (record.text, record.metadata) for record in client.records("c", where='path = "b.md"')}
    assert found == {"b.md#1": ("a b c", {"path": "b.md"}), "b.md#2": ("d e\nf", {"path": "b.md"})}
    assert client.count("c") == 5


def test_import_reports_unreadable_files_of_a_folder_and_writes_the_others(
    client: Client, emberpc: Emberpc, folder: Path
) -> None:
    client.create_collection("c", model="tiny")
    (folder / "sub" / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "gone.md").symlink_to(folder / "nowhere")
    (folder / "long.md").write_text(LONG)
    (folder / "loop").symlink_to(folder)
    outcome = emberpc("collection", "import", "c", folder)
    assert outcome.code == 2
    gone, long, latin, error = sorted(outcome.err.splitlines(), key=lambda line: (line.startswith("error"), line))
    assert gone == f"{folder}/gone.md is no file; remove it"
    assert long.startswith(f"{folder}/long.md: text has ")
    assert latin == f"{folder}/sub/latin.txt: byte 4 is not UTF-8; convert the file to it"
    assert error == "error: 3 of 7 records were not written; the lines above say why"
    assert client.count("c") == 4


def test_the_error_of_an_import_into_a_missing_collection_names_the_remedy(
    client: Client, emberpc: Emberpc, tmp_path: Path
) -> None:
    file = tmp_path / "v.jsonl"
    file.write_text(
        '{"id": "a", "vector": [1, 2, 3]}\n{"id": "b", "vector": [3, 2]}\n{"id": "c", "vector": [4, 5, 6]}\n'
    )
    outcome = emberpc("collection", "import", "c", file)
    assert outcome.code == 4
    assert "there is no collection 'c'; make it with --create" in outcome.err
    texts = emberpc("collection", "import", "c", "-", "--create", stdin='{"id": "a", "text": "t"}\n')
    assert texts.code == 2
    assert "give --model" in texts.err
    assert emberpc("collection", "import", "c", "-", "--create", stdin="").code == 2
    assert list(client.collections()) == []
    outcome = emberpc("collection", "import", "c", file, "--create", "--distance", "euclidean")
    assert outcome.code == 2
    assert outcome.err.splitlines() == [
        "created the collection c: vectors only, 3 dimensions, euclidean",
        f"{file}:2: vector has 2 dimensions, the collection has 3; give a vector of 3 dimensions",
        "error: 1 of 3 records were not written; the lines above say why",
    ]
    assert [hit.record.id for hit in client.search("c", [4, 5, 6], top_k=1)] == ["c"]
    outcome = emberpc("collection", "import", "c", file, "--create", "--distance", "cosine")
    assert outcome.code == 5
    assert "its distance is euclidean; leave out --distance" in outcome.err


def test_vectors_of_another_model_are_refused_and_text_only_embeds_their_texts(
    client: Client, emberpc: Emberpc, notes: list[Record], tmp_path: Path
) -> None:
    file = tmp_path / "notes.parquet"
    assert emberpc("collection", "export", "notes", "-o", file).code == 0
    outcome = emberpc("collection", "import", "imported", file, "--create", "--model", "other")
    assert outcome.code == 5
    assert f"the vectors in {file} were made by another model than 'other', as it is served here" in outcome.err
    assert [collection.name for collection in client.collections()] == ["notes"]
    client.create_collection("there", model="other", truncation="end")
    assert emberpc("collection", "import", "there", file).code == 5
    arguments = ["--create", "--model", "other", "--text-only"]
    assert emberpc("collection", "import", "imported", file, *arguments).code == 0
    assert emberpc("collection", "import", "there", file, "--text-only").code == 0
    imported, there = (list(client.records(name, with_vectors=True)) for name in ("imported", "there"))
    assert imported == there == notes
    expected = client.embed([record.text for record in notes], model="other", truncation="end")
    assert np.abs(np.stack([record.vector for record in imported if record.vector is not None]) - expected).max() < 1e-5
    assert client.get_collection("imported").indexed_fields == ("number", "a b")


def test_export_replaces_an_existing_file_only_with_overwrite(
    client: Client, emberpc: Emberpc, notes: list[Record], tmp_path: Path
) -> None:
    file = tmp_path / "notes.jsonl"
    file.write_text("mine")
    outcome = emberpc("collection", "export", "notes", "-o", file)
    assert (outcome.code, outcome.err) == (
        2,
        f"error: --output: {file} is there already; choose another name, or --overwrite\n",
    )
    assert file.read_text() == "mine"
    assert emberpc("collection", "export", "notes", "-o", file, "--overwrite").code == 0
    assert len(file.read_bytes().splitlines()) == 301
    for name, words in (("r.txt", "does not say in which form"), ("no/r.jsonl", "is not there"), (".", "does not say")):
        outcome = emberpc("collection", "export", "notes", "-o", tmp_path / name)
        assert outcome.code == 2
        assert words in outcome.err
    assert emberpc("collection", "export", "none", "-o", tmp_path / "none.jsonl").code == 4
    assert [path.name for path in tmp_path.iterdir()] == ["notes.jsonl"]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("unnamed", [True, False])
def test_an_export_that_cannot_write_the_whole_file_leaves_no_file(
    client: Client,
    emberpc: Emberpc,
    notes: list[Record],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    suffix: str,
    unnamed: bool,
) -> None:
    if not unnamed:
        # As on a file system that has no files without a name.
        monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY | os.O_WRONLY)
    file = tmp_path / f"notes.{suffix}"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        outcome = emberpc("collection", "export", "notes", "-o", file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (outcome.code, outcome.err) == (2, f"error: {file} cannot be written: File too large\n")
    assert list(tmp_path.iterdir()) == []
    assert emberpc("collection", "export", "notes", "-o", file).code == 0
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


# The program handles neither SIGTERM nor SIGKILL.
@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_an_export_that_a_signal_ends_leaves_no_file(
    fake: FakeServer, emberpc: Emberpc, tmp_path: Path, number: signal.Signals
) -> None:
    emberpc("collection", "create", "c")
    lines = "".join(json.dumps({"id": f"{i:05}", "text": "t"}) + "\n" for i in range(3000))
    assert emberpc("upsert", "c", "-", stdin=lines).code == 0
    # Where the tests run in the background, SIGINT is ignored, and a child inherits that.
    main = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from emberpc.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    (tmp_path / "there.parquet").write_text("mine")
    arguments = ["collection", "export", "c", "-o", str(tmp_path / "there.parquet"), "--overwrite"]
    with subprocess.Popen([sys.executable, "-c", main, *arguments], stderr=subprocess.PIPE, text=True) as process:

        def stop(request: Any) -> None:
            if request.page_token:
                process.send_signal(number)
                process.wait(300)

        fake.hooks["ListRecords"] = stop
        said = process.communicate(timeout=300)[1]
    assert process.returncode == (130 if number == signal.SIGINT else -number), said
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("there.parquet", "mine")]


def test_an_export_fails_if_the_collection_changes_its_model_meanwhile(
    fake: FakeServer, emberpc: Emberpc, tmp_path: Path
) -> None:
    emberpc("collection", "create", "c", "--model", "canned")
    assert emberpc("upsert", "c", "-", stdin='{"id": "a", "text": "t"}\n').code == 0
    fake.hooks["ListRecords"] = lambda _: setattr(fake.collections["c"], "model_fingerprint", "other")
    outcome = emberpc("collection", "export", "c", "-o", tmp_path / "c.jsonl")
    assert (outcome.code, list(tmp_path.iterdir())) == (5, [])
    assert "embedded with another model meanwhile; export it again" in outcome.err
    fake.collections["c"].model_fingerprint = ""
    assert emberpc("collection", "export", "c", "-o", tmp_path / "c.jsonl", "--no-vectors").code == 0


def test_parquet_without_pyarrow_names_the_extra_parquet(
    client: Client, emberpc: Emberpc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emberpc.cli.errors.find_spec", lambda name: None)
    for arguments in (["export", "c", "-o", tmp_path / "c.parquet"], ["import", "c", tmp_path / "c.parquet"]):
        outcome = emberpc("collection", *arguments)
        assert outcome.code == 2
        assert "needs pyarrow, which is not installed; run, in a checkout: pip install '.[parquet]'; or" in outcome.err
