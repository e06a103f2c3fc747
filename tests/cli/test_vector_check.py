"""An import uses vectors of another fingerprint than the model's if the model gives equal vectors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emberpc.client import Client, Record, Unavailable
from stream_helpers import texts_of

pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

Emberpc = Any


@pytest.fixture
def client(tiny_client: Client) -> Client:
    """A client of the server of tiny models."""
    return tiny_client


@pytest.fixture
def notes(client: Client) -> list[Record]:
    """The records of a collection `notes` that were embedded by the server."""
    client.create_collection("notes", model="tiny", truncation="end")
    client.upsert("notes", [Record(f"n{i:03}", text) for i, text in enumerate(texts_of(40))])
    return list(client.records("notes", with_vectors=True))


@pytest.fixture
def old_file(client: Client, emberpc: Emberpc, notes: list[Record], tmp_path: Path) -> Path:
    """The records of `notes` as a version with another scheme of fingerprints exported them."""
    file = tmp_path / "notes.parquet"
    assert emberpc("collection", "export", "notes", "-o", file).code == 0
    table = pq.read_table(file)
    settings = json.loads(table.schema.metadata[b"emberpc.collection"])
    assert settings["model_fingerprint"] == client.get_model("tiny").fingerprint
    settings["model_fingerprint"] = "0" * 64
    pq.write_table(table.replace_schema_metadata({"emberpc.collection": json.dumps(settings)}), file)
    return file


def changed(file: Path, column: str, values: Any) -> None:
    table = pq.read_table(file)
    place = table.schema.get_field_index(column)
    pq.write_table(table.set_column(place, column, values), file)


@pytest.mark.parametrize("create", [True, False])
def test_vectors_of_an_old_fingerprint_are_imported_if_the_model_gives_equal_ones(
    client: Client, emberpc: Emberpc, notes: list[Record], old_file: Path, create: bool
) -> None:
    if not create:
        client.create_collection("there", model="tiny", truncation="end")
    outcome = emberpc("collection", "import", "there", old_file, *(["--create"] if create else []))
    assert outcome.code == 0, outcome.err
    assert "'tiny' gives 8 of its texts the vectors that it has; its vectors are taken" in outcome.err
    found = list(client.records("there", with_vectors=True))
    assert found == notes
    for one, other in zip(found, notes, strict=True):
        assert one.vector is not None
        assert other.vector is not None
        assert one.vector.tobytes() == other.vector.tobytes()
    assert client.get_collection("there").model_fingerprint == client.get_model("tiny").fingerprint


@pytest.mark.parametrize("problem", ["another model", "other vectors", "another width", "no texts", "no vectors"])
def test_vectors_of_another_fingerprint_are_refused_without_proof(
    client: Client, emberpc: Emberpc, notes: list[Record], old_file: Path, problem: str
) -> None:
    model = "other" if problem == "another model" else "tiny"
    vectors = [np.roll(record.vector, 1) for record in notes if record.vector is not None]
    kind = pa.list_(pa.float32())
    if problem == "other vectors":
        changed(old_file, "vector", pa.array(vectors, kind))
    elif problem == "another width":
        changed(old_file, "vector", pa.array([vector[:7] for vector in vectors], kind))
    elif problem == "no texts":
        changed(old_file, "text", pa.array([" "] * len(notes)))
    elif problem == "no vectors":
        changed(old_file, "vector", pa.array([None] * len(notes), kind))
    client.create_collection("there", model=model, truncation="end")
    for arguments in (["there"], ["new", "--create", "--model", model]):
        outcome = emberpc("collection", "import", arguments[0], old_file, *arguments[1:])
        assert outcome.code == 5, outcome.err
        assert f"were made by another model than {model!r}, as it is served here" in outcome.err
    assert client.count("there") == 0
    assert sorted(collection.name for collection in client.collections()) == ["notes", "there"]


def test_a_failed_call_of_the_check_ends_the_import_with_its_error(
    client: Client, emberpc: Emberpc, notes: list[Record], old_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise Unavailable("the server is away")

    monkeypatch.setattr(Client, "embed", fail)
    outcome = emberpc("collection", "import", "there", old_file, "--create")
    assert outcome.code == 3
    assert outcome.err == "error: the server is away\n"
