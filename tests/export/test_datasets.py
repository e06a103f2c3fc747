"""Files of labelled texts: read as they are meant, or refused with the row."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from emberpc.export.datasets import read_labelled
from emberpc.export.errors import ExportError

# csv has no way to write NUL, and reads every line's end as one.
CELLS = st.text(st.characters(exclude_characters="\0\r", exclude_categories=["Cs"]), min_size=1, max_size=20).filter(
    lambda text: text.strip()
)
ROWS = st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=6)


def write(folder: Path, name: str, text: str, encoding: str = "utf-8") -> Path:
    path = folder / name
    path.write_bytes(text.encode(encoding))
    return path


@given(rows=ROWS, delimiter=st.sampled_from([",", "\t"]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_csv_writes_is_read(tmp_path: Path, rows: list[tuple[str, str]], delimiter: str) -> None:
    path = tmp_path / ("data.csv" if delimiter == "," else "data.tsv")
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows([("text", "label"), *rows])
    data = read_labelled(path)
    assert [(text, *labels) for text, labels in zip(data.texts, data.labels, strict=True)] == rows


@given(rows=ROWS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_json_writes_is_read(tmp_path: Path, rows: list[tuple[str, str]]) -> None:
    lines = [json.dumps({"text": text, "label": label}) for text, label in rows]
    path = write(tmp_path, "data.jsonl", "\n".join(lines))
    data = read_labelled(path)
    assert [(text, *labels) for text, labels in zip(data.texts, data.labels, strict=True)] == rows


@given(content=st.binary(max_size=200), suffix=st.sampled_from([".csv", ".tsv", ".jsonl"]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_read_or_refused_in_words(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"data{suffix}"
    path.write_bytes(b"text,label\n" + content if suffix == ".csv" else content)
    refusal = ""
    try:
        data = read_labelled(path)
    except ExportError as error:
        refusal = str(error)
    if refusal:
        assert str(path) in refusal
    else:
        assert len(data.texts) == len(data.labels) >= 1


def test_a_byte_order_mark_quotes_and_other_columns_are_no_trouble(tmp_path: Path) -> None:
    text = '\ufeffid,message,kind\n1,"two\nlines, and a comma",greeting\n2,bye,parting\n'
    data = read_labelled(write(tmp_path, "data.csv", text), text_column="message", label_column="kind")
    assert data.texts == ["two\nlines, and a comma", "bye"]
    assert data.labels == [("greeting",), ("parting",)]
    assert data.places == ["line 3", "line 4"]


def test_whole_numbers_are_labels(tmp_path: Path) -> None:
    path = write(tmp_path, "data.jsonl", '{"text": "a", "label": 1}\n\n{"text": "b", "label": "1"}\n')
    assert read_labelled(path).labels == [("1",), ("1",)]


def test_texts_with_several_labels_are_told(tmp_path: Path) -> None:
    data = read_labelled(write(tmp_path, "data.csv", "text,label\nx,a\ny,a\nx,b\ny,a\n"))
    assert data.conflicts() == {"x": ["line 2: a", "line 4: b"]}


def test_a_text_may_have_several_labels_or_none(tmp_path: Path) -> None:
    path = write(tmp_path, "data.csv", "text,label\nx,b|a\ny,\nz, a | a |\n")
    assert read_labelled(path, separator="|").labels == [("a", "b"), (), ("a",)]
    path = write(tmp_path, "data.jsonl", '{"text": "x", "label": ["b", "a"]}\n{"text": "y", "label": null}\n')
    assert read_labelled(path, separator="|").labels == [("a", "b"), ()]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("data.csv", "text,label\na,x\n,y\n", "line 3: text is empty"),
        ("data.csv", "text,label\na,x\nb,  \n", "line 3: label is empty"),
        ("data.csv", "text,kind\na,x\n", "there is no column 'label'; there are: text, kind"),
        ("data.csv", "text,label\na,x\nb, c,y\n", "line 3: it does not have 2 columns"),
        ("data.csv", "text,label\na\n", "line 2: it does not have 2 columns"),
        ("data.csv", 'text,label\n"a,x\n', "line 2: .*mend the quotes"),
        ("data.csv", "text,label\n" + "a" * 200_000 + ",x\n", "line 2: .*no text have more than 131072 characters"),
        ("data.csv", "", "has no rows"),
        ("data.csv", "text,label\n", "has no rows"),
        ("data.jsonl", '{"text": "a", "label": "x"}\n{"text": \n', "line 2: it is not JSON"),
        ("data.jsonl", '["a", "x"]\n', "line 1: it is not a JSON object"),
        ("data.jsonl", "[" * 100_000, "line 1: it is not JSON"),
        ("data.jsonl", '{"text": "a", "label": null}\n', "line 1: label is empty"),
        ("data.jsonl", '{"text": "a", "label": ["x"]}\n', "line 1: label is of type list"),
        ("data.jsonl", '{"text": "a", "label": true}\n', "line 1: label is of type bool"),
        ("data.jsonl", '{"text": 1.5, "label": "x"}\n', "line 1: text is of type float"),
        ("data.jsonl", '{"label": "x"}\n', "line 1: there is no column 'text'"),
        ("data.txt", "a", "must end in .csv, .tsv, .jsonl or .parquet"),
    ],
)
def test_what_is_wrong_is_named_with_its_row(tmp_path: Path, name: str, content: str, words: str) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(ExportError, match=words) as caught:
        read_labelled(path)
    assert str(path) in str(caught.value)


def test_another_encoding_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, "data.csv", "text,label\ncafé,x\n", "latin-1")
    with pytest.raises(ExportError, match="line 2, byte 4: it is not UTF-8"):
        read_labelled(path)
    path.write_bytes(b"text,label\n" + b"a,x\n" * 9000 + b"caf\xe9,x\n")  # more than is decoded at once
    with pytest.raises(ExportError, match="line 9002, byte 4: it is not UTF-8"):
        read_labelled(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="cannot be read: No such file"):
        read_labelled(tmp_path / "data.csv")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ExportError, match=r"pip install 'emberpc\[parquet\]'"):
        read_labelled(write(tmp_path, "data.parquet", "PAR1"))


def test_parquet_is_read_with_lists_numbers_and_rows_that_are_named(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "data.parquet"
    pq.write_table(pa.table({"text": ["a", "b", "c"], "label": [1, 2, 1]}), path)
    assert read_labelled(path).labels == [("1",), ("2",), ("1",)]
    pq.write_table(pa.table({"text": ["a", "b"], "label": [["x", "y"], []]}), path)
    assert read_labelled(path, separator="|").labels == [("x", "y"), ()]
    pq.write_table(pa.table({"text": ["a", None], "label": ["x", "y"]}), path)
    with pytest.raises(ExportError, match=r"data\.parquet, row 2"):
        read_labelled(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ExportError, match=r"data\.parquet"):
        read_labelled(path)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("d.csv", "text;label\na;b\n", "line 1: the columns seem to be separated by semicolons, and .csv has commas"),
        ("d.csv", "text\tlabel\na\tb\n", "separated by tabs, and .csv has commas"),
        ("d.tsv", "text,label\na,b\n", "separated by commas, and .tsv has tabs"),
        ("d.csv", "text,label,label\na,b,c\n", "line 1: the column 'label' is there twice"),
        ("d.tsv", "text\tlabel\ttext\na\tb\tc\n", "line 1: the column 'text' is there twice"),
    ],
)
def test_a_header_that_cannot_be_meant_so_is_refused(tmp_path: Path, name: str, content: str, words: str) -> None:
    with pytest.raises(ExportError, match=words):
        read_labelled(write(tmp_path, name, content))
