"""Files of records and texts are read, or refused with the line of the problem."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from emberpc.cli.errors import CliError
from emberpc.cli.input_files import LineFile

per_example = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])

# Texts that UTF-8 and JSON can represent; a table cannot contain NUL.
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
names = st.text(st.characters(categories=["Ll", "Nd"]), min_size=1)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
records = st.fixed_dictionaries(
    {"id": texts},
    optional={"text": texts, "label": texts, "metadata": st.dictionaries(texts, json_values, max_size=3)},
)


def read(path: Path) -> tuple[list[dict[str, Any]], LineFile]:
    source = LineFile(str(path))
    return list(source.records()), source


@per_example
@given(listed=st.lists(records), blank=st.integers(0, 3), newline=st.sampled_from(["\n", "\r\n"]))
def test_json_lines_are_read_as_written(tmp_path: Path, listed: list[dict[str, Any]], blank: int, newline: str) -> None:
    path = tmp_path / "r.jsonl"
    gap = newline * (blank + 1)
    path.write_bytes(gap.join(json.dumps(record) for record in listed).encode())
    found, source = read(path)
    assert found == listed
    assert source.lines == [1 + i * (blank + 1) for i in range(len(listed))]


@per_example
@given(
    columns=st.lists(names, unique=True, max_size=3).map(lambda found: [f"x{name}" for name in found]),
    data=st.data(),
    kind=st.sampled_from([("csv", ","), ("tsv", "\t")]),
)
def test_a_table_is_read_as_written(
    tmp_path: Path, columns: list[str], data: st.DataObject, kind: tuple[str, str]
) -> None:
    suffix, delimiter = kind
    header = ["id", "text", *columns]
    # A row of one empty cell looks like an empty line; ids are never empty.
    row = st.tuples(texts.filter(bool), *(texts for _ in header[1:])).map(list)
    rows = data.draw(st.lists(row))
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter=delimiter)
    writer.writerows([header, *rows])
    path = tmp_path / f"t.{suffix}"
    path.write_bytes(buffer.getvalue().encode("utf-8-sig"))
    found, _ = read(path)
    assert found == [
        {"id": cells[0], "text": cells[1], "metadata": dict(zip(columns, cells[2:], strict=True))} for cells in rows
    ]


@per_example
@given(content=st.binary(max_size=200), suffix=st.sampled_from([".jsonl", ".csv", ".tsv"]))
def test_any_bytes_are_read_or_refused_with_the_line(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"r{suffix}"
    path.write_bytes(content)
    try:
        read(path)
    except CliError as error:
        line = str(error).removeprefix(f"{path}:").partition(":")[0]
        assert 1 <= int(line) <= content.count(b"\n") + content.count(b"\r") + 1


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("r.jsonl", '{"id": "a"}\n{"id": "b"\n', ":2: the line is not JSON"),
        ("r.jsonl", '{"id": "a"}\n\n["a"]\n', ":3: the line is no JSON object"),
        ("r.jsonl", '{"id": "a", "txt": "t"}\n', ":1: there is a field 'txt'; a record has id, text"),
        ("r.jsonl", '{"text": "t"}\n', ":1: there is no id"),
        ("r.jsonl", '{"id": "a", "metadata": {"x": NaN}}\n', ":1: the line is not JSON"),
        ("r.jsonl", "[" * 100_000, ":1: the line is not JSON"),
        ("r.jsonl", b'{"id": "a"}\n{"id": "\xff"}\n', ":2: byte 9 of the line is not UTF-8"),
        ("r.csv", "title,year\na,1\n", ":1: there is no column id; the columns are title, year; name a column id"),
        ("r.csv", "ID,text\na,t\n", ":1: the column 'ID' may be meant as id: rename it to id"),
        ("r.csv", "text,label\na,x\nb,x\na,y\n", ":4: line 2 has the same text with another label"),
        ("r.csv", "text,label\na,x\n ,x\n", ":3: the text is empty"),
        ("r.csv", "id,year,year\na,1,2\n", ":1: the column 'year' is there twice"),
        ("r.csv", "id,,b\na,1,2\n", ":1: the column '' is there twice, or has no name"),
        ("r.csv", "id,vector\na,1\n", ":1: there is a column vector"),
        ("r.csv", 'id,text\na,"two\nlines"\nb\n', ":4: there are 1 cells for 2 columns"),
        ("r.csv", 'id,text\na,t\nb,"open\nand\nopen\n', ":3: the table is damaged here; check the quotes"),
        ("r.csv", "id,text\ra,t\rb,t\r", ":1: a line ends with CR alone, without LF; save the file again"),
        ("r.csv", "id,text\na,t\rb,t\n", ":2: a line ends with CR alone"),
        ("r.tsv", "id\ttext\r\na\tt\rb\tt\r\n", ":2: a line ends with CR alone"),
        ("r.csv", "id,metadata\na,{}\nb,{x}\n", ":3: metadata is not JSON"),
        ("r.csv", 'id,year,metadata\na,1,"{""year"": 2}"\n', ":2: metadata has a field 'year', and there is a column"),
        ("r.jsonl", '{"id": "a", "id": "b"}\n', ":1: the line has 'id' twice; keep one"),
        ("r.jsonl", '{"id": "a", "metadata": {"x": {"y": 1, "y": 2}}}\n', ":1: the line has 'y' twice; keep one"),
        ("r.csv", "id,metadata\na,[1]\n", ":2: metadata is no JSON object"),
        ("r.tsv", "id,text\n", ":1: the columns seem to be separated by commas"),
        ("r.csv", "", ":1: the table is empty; its first line must name the columns"),
    ],
)
def test_the_error_for_an_invalid_file_names_the_line_and_the_problem(
    tmp_path: Path, name: str, content: str | bytes, words: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CliError) as raised:
        read(path)
    assert str(raised.value).startswith(f"{path}{words}")


def test_records_before_an_invalid_line_are_returned(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text('{"id": "a"}\n{"id": "b"}\nwrong\n')
    found = LineFile(str(path)).records()
    assert [next(found)["id"], next(found)["id"]] == ["a", "b"]
    with pytest.raises(CliError):
        next(found)


def test_a_cell_may_be_as_long_as_a_text(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_text(f"id,text\na,{'x' * 500_000}\n")
    assert len(read(path)[0][0]["text"]) == 500_000


def test_a_folder_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CliError, match="cannot be read: Is a directory"):
        LineFile(str(tmp_path)).texts()


def test_an_empty_file_of_texts_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("")
    with pytest.raises(CliError, match="is empty; give it one text a line"):
        LineFile(str(path)).texts()


def test_locate_replaces_item_numbers_of_a_message_by_lines(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text('\n{"id": "a"}\n\n{"id": "b"}\n')
    _, source = read(path)
    place = f"{path}:"
    assert source.locate("records[1].text is empty", "records") == f"{place}4: text is empty"
    assert source.locate("records[0] is wrong (and 1 more)", "records") == f"{place}2: the record is wrong (and 1 more)"
    both = source.locate("records[1] has none and records[0] has one", "records")
    assert both == f"{place}4: the record has none and {place}2 has one"
    assert source.locate("records[9] is not there", "records") == "records[9] is not there"
    assert source.locate("nothing to place", "records") == "nothing to place"


TYPES = ["year=int,price=float", "new=bool", "code=text"]


def typed(tmp_path: Path, row: str, types: list[str] = TYPES, header: str = "id,year,price,new,code") -> dict[str, Any]:
    path = tmp_path / "r.csv"
    path.write_text(f"{header}\n{row}\n", encoding="utf-8")
    (record,) = LineFile(str(path), types).records()
    metadata: dict[str, Any] = record["metadata"]
    return metadata


@pytest.mark.parametrize(
    ("row", "metadata"),
    [
        ("a,2001,1.5,true,00123", {"year": 2001, "price": 1.5, "new": True, "code": "00123"}),
        ("a,-007, 2e3 ,FALSE,1", {"year": -7, "price": 2000.0, "new": False, "code": "1"}),
        ("a,+9007199254740992,.5,0,", {"year": 2**53, "price": 0.5, "new": False, "code": ""}),
        ("a,, ,,", {"code": ""}),
    ],
)
def test_typed_columns_have_values_of_the_stated_types(tmp_path: Path, row: str, metadata: dict[str, Any]) -> None:
    found = typed(tmp_path, row)
    assert found == metadata
    assert [type(value) for value in found.values()] == [type(value) for value in metadata.values()]


def test_cells_are_strings_without_types(tmp_path: Path) -> None:
    assert typed(tmp_path, "a,2001,1.5,true,00123", []) == {
        "year": "2001", "price": "1.5", "new": "true", "code": "00123"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("a,2001.0,1,1,x", ":2: the column year holds '2001.0'; by --types it must be a whole number from -9007199254"),
        ("a,9007199254740993,1,1,x", ":2: the column year holds '9007199254740993'"),
        ("a,1_000,1,1,x", ":2: the column year holds '1_000'"),
        ("a,\u0661,1,1,x", ":2: the column year holds '\u0661'"),
        ("a,1,nan,1,x", ":2: the column price holds 'nan'; by --types it must be a number, such as -1.5 or 2e3"),
        ("a,1,1e999,1,x", ":2: the column price holds '1e999'"),
        ("a,1,1,yes,x", ":2: the column new holds 'yes'; by --types it must be true, false, 1 or 0"),
        (f"a,1,1,{'y' * 500},x", f":2: the column new holds '{'y' * 60}'; by"),
    ],
)
def test_the_error_for_a_cell_of_another_type_names_line_column_and_value(tmp_path: Path, row: str, words: str) -> None:
    with pytest.raises(CliError) as raised:
        typed(tmp_path, row)
    assert str(raised.value).startswith(f"{tmp_path / 'r.csv'}{words}")


@pytest.mark.parametrize(
    ("types", "words"),
    [
        (["year"], "--types has 'year'; it must be COLUMN=TYPE, such as year=int"),
        (["=int"], "it must be COLUMN=TYPE"),
        (["year=date"], "--types has 'year=date'; a type is one of int, float, bool, text"),
        (["year=int", "year=float"], "--types names the column year twice"),
        (["yaer=int"], "r.csv:1: --types names yaer, which is no metadata column; those are year"),
        (["id=int"], "--types names id, which is no metadata column"),
    ],
)
def test_invalid_types_are_named_in_the_error(tmp_path: Path, types: list[str], words: str) -> None:
    with pytest.raises(CliError, match=re.escape(words)):
        typed(tmp_path, "a,1", types, header="id,year")


def test_a_table_without_ids_gets_ids_that_depend_on_the_texts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "train.csv"
    path.write_text("text,label\nwhere is my parcel?,delivery\nné,other\nwhere is my parcel?,delivery\nlast,other\n")
    found, source = read(path)
    # The ids must stay the same in later versions: a second upsert of a table must not duplicate its records.
    assert [record["id"] for record in found[:2]] == [
        "text-c34ddb857c34aefae3edbd8971be2d60",
        "text-82b5c347493f76b114b701be8bf92057",
    ]
    assert [(record["text"], record["label"]) for record in found] == [
        ("where is my parcel?", "delivery"),
        ("né", "other"),
        ("last", "other"),
    ]
    assert source.lines == [2, 3, 5]
    notes = capsys.readouterr().err.splitlines()
    assert notes == [
        f"{path} has no column id: each id is made of the text, so the same text is one record",
        f"{path}: rows that repeat an earlier row and were left out: 1",
    ]


def test_a_corrected_label_keeps_the_id(tmp_path: Path) -> None:
    (tmp_path / "old.csv").write_text("text,label\na,x\n")
    (tmp_path / "new.tsv").write_text("label\ttext\ny\ta\n")
    (old,), _ = read(tmp_path / "old.csv")
    (new,), _ = read(tmp_path / "new.tsv")
    assert old["id"] == new["id"]
    assert (old["label"], new["label"]) == ("x", "y")


def test_the_lines_of_a_pipe_are_not_counted(tmp_path: Path) -> None:
    """Counting the lines of a pipe would consume them."""
    pipe = tmp_path / "records.jsonl"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=('{"id": "a"}\n',))
    writer.start()
    source = LineFile(str(pipe))
    counted = source.count()
    assert list(source.records()) == [{"id": "a"}]
    writer.join(300)
    assert counted is None
    with pytest.raises(CliError, match="cannot be read: Is a directory"):
        LineFile(str(tmp_path)).count()


def test_rows_with_equal_metadata_in_another_order_are_one_record(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    with path.open("w", newline="") as file:
        rows = (("text", "metadata"), ("a", '{"b": 1, "c": 2}'), ("a", '{"c": 2, "b": 1}'))
        csv.writer(file).writerows(rows)
    assert len(list(LineFile(str(path)).records())) == 1
