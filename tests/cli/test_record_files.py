"""Record files: any record is read as written; any file is read, or refused with the row of the problem."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from emberpc.cli.collection_settings import CollectionSettings
from emberpc.cli.errors import CliError
from emberpc.cli.import_export import fields_of
from emberpc.cli.input_files import LineFile
from emberpc.cli.output import json_line
from emberpc.cli.output_files import atomic_file
from emberpc.cli.record_sources import RecordError, RecordSource
from emberpc.client import Record

pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
from emberpc.cli.parquet import ParquetRecords, write_records  # noqa: E402 - imports pyarrow

per_example = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])

texts = st.text(st.characters(exclude_categories=["Cs"]))
json_values = st.recursive(
    # Numbers as the client reads them from the wire.
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
records = st.builds(
    Record,
    id=texts.filter(bool),
    text=st.just("") | texts,
    label=st.just("") | texts,
    metadata=st.dictionaries(texts, json_values, max_size=3),
    time_to_live=st.none() | st.floats(0.001, 1e9),
    vector=st.none() | arrays(np.float32, st.integers(1, 5), elements=floats),
)
collection_settings = st.builds(
    CollectionSettings,
    model=texts,
    model_fingerprint=texts,
    dimensions=st.integers(0, 2**31 - 1),
    distance=st.sampled_from(["cosine", "dot_product", "euclidean"]),
    truncation=st.sampled_from(["refuse", "end", "start"]),
    m=st.integers(0, 64),
    ef_construction=st.integers(0, 2000),
    indexed_fields=st.lists(texts, max_size=3).map(tuple),
)


def identity(record: Record) -> Any:
    """Return the fields of a record that a file stores, with the vector as bytes."""
    vector = None if record.vector is None else np.asarray(record.vector, dtype=np.float32).tobytes()
    return record.id, record.text, record.label, json.dumps(record.metadata), record.time_to_live, vector


def read(source: RecordSource) -> list[Any]:
    return [identity(Record(**record)) for record in source.records()]


@per_example
@given(listed=st.lists(records, max_size=5))
def test_records_are_read_from_json_lines_as_written(tmp_path: Path, listed: list[Record]) -> None:
    path = tmp_path / "r.jsonl"
    with atomic_file(path) as file:
        file.writelines(json_line(fields_of(record)).encode() for record in listed)
    assert read(LineFile(str(path))) == [identity(record) for record in listed]


@per_example
@given(listed=st.lists(records, max_size=5), made=collection_settings)
def test_records_and_settings_are_read_from_parquet_as_written(
    tmp_path: Path, listed: list[Record], made: CollectionSettings
) -> None:
    path = tmp_path / "r.parquet"
    with atomic_file(path) as file:
        write_records(file, listed, made, with_vectors=True)
    source = ParquetRecords(str(path))
    assert source.settings == made
    assert source.count() == len(listed)
    assert read(source) == [identity(record) for record in listed]
    assert [source.place(i) for i in range(len(listed))] == [f"{path}: row {i + 1}" for i in range(len(listed))]


def test_a_parquet_file_is_written_and_read_in_parts(tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"
    rows = np.random.default_rng(0).normal(size=(10_000, 3)).astype(np.float32)
    taken = 0

    def corpus() -> Any:
        nonlocal taken
        for i, row in enumerate(rows):
            taken += 1
            yield Record(f"{i:05}", "x" * 3_000_000 if i == 9_000 else "", vector=row)

    with atomic_file(path) as file:
        write_records(file, corpus(), CollectionSettings(), with_vectors=True)
    layout = pq.ParquetFile(path).metadata
    assert [layout.row_group(i).num_rows for i in range(layout.num_row_groups)] == [4096, 4096, 1808]
    found = list(ParquetRecords(str(path)).records())
    assert len(found) == taken == 10_000
    assert np.array_equal(np.stack([record["vector"] for record in found]), rows)


def test_a_parquet_file_without_vectors_has_no_fingerprint(tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"
    with path.open("wb") as file:
        write_records(
            file, [Record("a", "t")], CollectionSettings(model="m", model_fingerprint="f"), with_vectors=False
        )
    source = ParquetRecords(str(path))
    assert source.settings == CollectionSettings(model="m")
    assert list(source.records()) == [{"id": "a", "text": "t", "label": "", "metadata": {}}]


def test_parquet_tables_of_other_programs_are_read(tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"
    table = pa.table(
        {
            "id": pa.array(["a", "b"], pa.large_string()),
            "label": pa.array(["x", "x"]).dictionary_encode(),
            "vector": pa.array([[1.0, 2.0], [3.0, 4.0]], pa.list_(pa.float64(), 2)),
            "metadata": pa.array([[("k", 1)], None], pa.map_(pa.string(), pa.int64())),
            "year": [2019, None],
            "tags": [["s", "t"], []],
        }
    )
    pq.write_table(table, path)
    source = ParquetRecords(str(path))
    assert source.settings == CollectionSettings()
    found = [{**record, "vector": record["vector"].tolist()} for record in source.records()]
    assert found == [
        {"id": "a", "label": "x", "vector": [1.0, 2.0], "metadata": {"year": 2019, "tags": ["s", "t"], "k": 1}},
        {"id": "b", "label": "x", "vector": [3.0, 4.0], "metadata": {"year": None, "tags": []}},
    ]


def test_invalid_parquet_rows_are_reported_and_the_others_are_read(tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"
    pq.write_table(pa.table({"id": ["a", None, "c", "d"], "metadata": ["{}", "{}", "x", '{"n": 1}']}), path)
    refused: list[RecordError] = []
    source = ParquetRecords(str(path))
    assert [record["id"] for record in source.records(refused.append)] == ["a", "d"]
    assert [source.place(0), source.place(1)] == [f"{path}: row 1", f"{path}: row 4"]
    assert [str(error).partition(": ")[2] for error in refused] == [
        "row 2: there is no id; give each record one",
        "row 3: metadata is not JSON",
    ]
    with pytest.raises(RecordError, match="row 2"):
        list(ParquetRecords(str(path)).records())


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"text": ["t"]}, "there is no column id; rename one of text to id"),
        ({"id": [1]}, "the column id is of type int64; it must be text"),
        ({"id": ["a"], "vector": ["b"]}, "the column vector is of type string; it must be a list of numbers"),
        ({"id": ["a"], "metadata": [7]}, "the column metadata is of type int64; it must be JSON objects as text"),
    ],
)
def test_a_parquet_table_with_columns_of_other_types_is_refused(
    tmp_path: Path, columns: dict[str, Any], words: str
) -> None:
    path = tmp_path / "r.parquet"
    pq.write_table(pa.table(columns), path)
    with pytest.raises(CliError) as raised:
        ParquetRecords(str(path))
    assert str(raised.value).startswith(f"{path}: {words}")


def test_a_repeated_column_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["id", "id"]), path)
    with pytest.raises(CliError, match="the column 'id' is there twice"):
        ParquetRecords(str(path))


@pytest.mark.parametrize(
    "content", ["[]", "{", '{"model": 7}', '{"indexed_fields": 7}', '{"indexed_fields": [7]}', "null"]
)
def test_damaged_collection_settings_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "r.parquet"
    pq.write_table(pa.table({"id": ["a"]}).replace_schema_metadata({"emberpc.collection": content}), path)
    with pytest.raises(CliError, match="the settings of the collection in it are damaged"):
        ParquetRecords(str(path))


@per_example
@given(data=st.data())
def test_a_damaged_parquet_file_is_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "r.parquet"
    with path.open("wb") as file:
        listed = [Record(str(i), "text " * i, {"n": i}, vector=np.full(3, i, np.float32)) for i in range(20)]
        write_records(file, listed, CollectionSettings(model="m"), with_vectors=True)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content[: data.draw(st.just(len(content)) | st.integers(0, len(content)))])
    refused: list[RecordError] = []
    try:
        list(ParquetRecords(str(path)).records(refused.append))
    except CliError as error:
        assert str(path) in str(error)


def test_a_missing_parquet_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CliError, match="cannot be read: there is no such file"):
        ParquetRecords(str(tmp_path / "r.parquet"))


def test_an_expiring_record_is_exported_with_a_short_time_to_live() -> None:
    assert fields_of(Record("a", "text", time_to_live=0.0))["time_to_live"] == 0.001
    assert "time_to_live" not in fields_of(Record("a", "text"))
