"""Files of labelled texts are read, or refused with the row of the problem."""

from __future__ import annotations

import csv
import json
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from emberpc.export.data import datasets
from emberpc.export.data.datasets import check_columns, read_labelled
from emberpc.export.data.examples import read_descriptions, training_examples
from emberpc.export.errors import ExportError


def plain(label: str) -> str:
    """Return a label as the reader must return it: in NFC, without space and characters without width around it."""
    label = unicodedata.normalize("NFC", label)
    kept = [i for i, each in enumerate(label) if not each.isspace() and ord(each) not in datasets._INVISIBLE]
    return label[kept[0] : kept[-1] + 1] if kept else ""


# The csv module cannot write NUL, and reads each kind of line end as "\n".
CELLS = st.text(st.characters(exclude_characters="\0\r", exclude_categories=["Cs"]), min_size=1, max_size=20).filter(
    lambda text: text.strip() and plain(text)
)
ROWS = st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=6)


def write(folder: Path, name: str, text: str, encoding: str = "utf-8") -> Path:
    path = folder / name
    path.write_bytes(text.encode(encoding))
    return path


@given(rows=ROWS, delimiter=st.sampled_from([",", "\t"]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_csv_and_tsv_file_that_python_writes_is_read(
    tmp_path: Path, rows: list[tuple[str, str]], delimiter: str
) -> None:
    path = tmp_path / ("data.csv" if delimiter == "," else "data.tsv")
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows([("text", "label"), *rows])
    data = read_labelled(path)
    wanted = [(text, plain(label)) for text, label in rows]
    assert [(text, *labels) for text, labels in zip(data.texts, data.labels, strict=True)] == wanted


@given(rows=ROWS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_json_lines_file_that_python_writes_is_read(tmp_path: Path, rows: list[tuple[str, str]]) -> None:
    lines = [json.dumps({"text": text, "label": label}) for text, label in rows]
    path = write(tmp_path, "data.jsonl", "\n".join(lines))
    data = read_labelled(path)
    wanted = [(text, plain(label)) for text, label in rows]
    assert [(text, *labels) for text, labels in zip(data.texts, data.labels, strict=True)] == wanted


@given(content=st.binary(max_size=200), suffix=st.sampled_from([".csv", ".tsv", ".jsonl"]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_read_or_refused_with_an_export_error(tmp_path: Path, content: bytes, suffix: str) -> None:
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


def test_a_byte_order_mark_quotes_and_other_columns_are_accepted(tmp_path: Path) -> None:
    text = '\ufeffid,message,kind\n1,"two\nlines, and a comma",greeting\n2,bye,parting\n'
    data = read_labelled(write(tmp_path, "data.csv", text), text_column="message", label_column="kind")
    assert data.texts == ["two\nlines, and a comma", "bye"]
    assert data.labels == [("greeting",), ("parting",)]
    assert data.places == ["line 3", "line 4"]


def test_whole_numbers_are_read_as_labels(tmp_path: Path) -> None:
    path = write(tmp_path, "data.jsonl", '{"text": "a", "label": 1}\n\n{"text": "b", "label": "1"}\n')
    assert read_labelled(path).labels == [("1",), ("1",)]


def test_texts_with_conflicting_labels_are_reported(tmp_path: Path) -> None:
    data = read_labelled(write(tmp_path, "data.csv", "text,label\nx,a\ny,a\nx,b\ny,a\n"))
    assert data.conflicts() == {"x": ["line 2: a", "line 4: b"]}


def test_a_text_may_have_several_labels_or_none(tmp_path: Path) -> None:
    path = write(tmp_path, "data.csv", "text,label\nx,b|a\ny,\nz, a | a |\n")
    assert read_labelled(path, separator="|").labels == [("a", "b"), (), ("a",)]
    rows = (
        '{"text": "x", "label": ["b", "a"]}\n{"text": "y", "label": null}\n{"text": "z"}\n{"text": "w", "label": []}\n'
    )
    path = write(tmp_path, "data.jsonl", rows)
    assert read_labelled(path, separator="|").labels == [("a", "b"), (), (), ()]
    with pytest.raises(ExportError, match="line 3: there is no column 'label'"):
        read_labelled(write(tmp_path, "one.jsonl", '{"text": "x", "label": "b"}\n\n{"text": "z"}\n'))
    with pytest.raises(ExportError, match="line 1: there is no column 'labels'"):
        read_labelled(path, label_column="labels", separator="|")


def test_invisible_parts_of_an_emoji_stay_in_a_label(tmp_path: Path) -> None:
    """An emoji without its variation selector or its tags is another emoji."""
    labels = ["\u2764\ufe0f", "\u2764", "\U0001f3f4\U000e0067\U000e0062\U000e007f", "\U0001f3f4"]
    path = write(tmp_path, "d.csv", "text,label\n" + "".join(f"{i},{label}\n" for i, label in enumerate(labels)))
    assert [label for (label,) in read_labelled(path).labels] == labels


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("data.csv", "text,label\na,x\n,y\n", "line 3: text is empty"),
        ("data.csv", "text,label\na,x\nb,  \n", "line 3: label is empty"),
        ("data.csv", "text,kind\na,x\n", "there is no column 'label'; there are: text, kind"),
        ("data.csv", "text,label\na,x\nb, c,y\n", "line 3: it does not have 2 columns"),
        ("data.csv", "text,label\na\n", "line 2: it does not have 2 columns"),
        ("data.csv", 'text,label\n"a,x\n', "line 2: .*correct the quotes"),
        ("data.csv", "text,label\n" + "a" * 200_000 + ",x\n", "line 2: .*give no text more than 131072 characters"),
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
        ("data.jsonl", '{"text": "a", "label": NaN}\n', "line 1: label is of type float"),
        ("data.jsonl", '{"text": "a", "label": "\\ud800"}\n', "line 1: label holds a lone surrogate"),
        ("data.jsonl", '{"text": "\\udc00", "label": "x"}\n', "line 1: text holds a lone surrogate"),
        ("data.csv", "text,label\na,x\0\n", "line 2: label holds a NUL character"),
        ("data.csv", "text,label\na,\u200b \ufeff\n", "line 2: label is empty"),
        ("data.txt", "a", "must end in .csv, .tsv, .jsonl, .ndjson or .parquet"),
    ],
)
def test_the_error_for_an_invalid_row_names_the_row(tmp_path: Path, name: str, content: str, words: str) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(ExportError, match=words) as caught:
        read_labelled(path)
    assert str(path) in str(caught.value)


def test_the_error_for_another_encoding_names_line_and_byte(tmp_path: Path) -> None:
    path = write(tmp_path, "data.csv", "text,label\ncafé,x\n", "latin-1")
    with pytest.raises(ExportError, match="line 2, byte 4: it is not UTF-8"):
        read_labelled(path)
    path.write_bytes(b"text,label\n" + b"a,x\n" * 9000 + b"caf\xe9,x\n")  # more bytes than one part that is decoded
    with pytest.raises(ExportError, match="line 9002, byte 4: it is not UTF-8"):
        read_labelled(path)


def test_a_missing_file_is_named_in_the_error(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="cannot be read: No such file"):
        read_labelled(tmp_path / "data.csv")


def test_parquet_without_pyarrow_names_the_extra_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ExportError, match=r"pip install 'emberpc\[parquet\]'"):
        read_labelled(write(tmp_path, "data.parquet", "PAR1"))


def test_parquet_with_numbers_and_lists_is_read_and_errors_name_rows(tmp_path: Path) -> None:
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
        (
            "d.csv",
            "text;label\na;b\n",
            "line 1: the columns seem to be separated by semicolons, but this kind of file needs commas",
        ),
        ("d.csv", "text\tlabel\na\tb\n", "separated by tabs, but this kind of file needs commas"),
        ("d.tsv", "text,label\na,b\n", "separated by commas, but this kind of file needs tabs"),
        ("d.csv", "text,label,label\na,b,c\n", "line 1: the column 'label' is there twice"),
        ("d.tsv", "text\tlabel\ttext\na\tb\tc\n", "line 1: the column 'text' is there twice"),
    ],
)
def test_a_header_with_another_delimiter_or_repeated_columns_is_refused(
    tmp_path: Path, name: str, content: str, words: str
) -> None:
    with pytest.raises(ExportError, match=words):
        read_labelled(write(tmp_path, name, content))


INVISIBLE = ["io\u200e", "\u00adio", "\u2066io\u2069 ", "\u200fio\u061c", "\u180eio\u2064"]
PADDED = [
    "io",
    "io ",
    " io",
    "\u00a0io\t",
    "\ufeffio",
    "io \u200b ",
    *INVISIBLE,
    "caf\u00e9",
    "cafe\u0301",
    "cafe\u0301 ",
]


@pytest.mark.parametrize("name", ["d.csv", "d.tsv", "d.jsonl", "several.csv", "several.jsonl"])
def test_labels_that_differ_only_in_invisible_characters_are_one_label(tmp_path: Path, name: str) -> None:
    several = name.startswith("several")
    path = tmp_path / name
    with path.open("w", newline="", encoding="utf-8") as file:
        if path.suffix == ".jsonl":
            file.writelines(
                json.dumps({"text": str(i), "label": [label] if several else label}) + "\n"
                for i, label in enumerate(PADDED)
            )
        else:
            rows = [("text", "label"), *((str(i), label) for i, label in enumerate(PADDED))]
            csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",").writerows(rows)
    data = read_labelled(path, separator=";" if several else None)
    assert training_examples(data, min_examples=1).labels == ("caf\u00e9", "io")


def test_labels_of_descriptions_are_normalized_like_those_of_texts(tmp_path: Path) -> None:
    path = write(tmp_path, "d.csv", "label,description\n io ,input\ncafe\u0301,drinks\n")
    assert read_descriptions(path, ["caf\u00e9", "io"]) == ("drinks", "input")


def test_labels_that_differ_only_in_case_are_kept_apart_and_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, "d.csv", "text,label\na,BASH\nb,bash\nc,io\nd,Bash\n")
    assert training_examples(read_labelled(path), min_examples=1).labels == ("BASH", "Bash", "bash", "io")
    assert f"{path}: labels that differ from another one only in case, space, " in caplog.text
    assert "written: 2, such as " in caplog.text
    assert "such as 'BASH' and 'Bash' and 'bash'; they count as different labels" in caplog.text
    caplog.clear()
    path = write(tmp_path, "e.csv", "text,label\na,bash\nb,io\n")
    training_examples(read_labelled(path), min_examples=1)
    assert not caplog.text


def test_a_repeated_json_field_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "d.jsonl", '{"text": "a", "label": "x"}\n{"text": "b", "label": "x", "label": "y"}\n')
    with pytest.raises(ExportError, match=r"d\.jsonl, line 2: the field 'label' is there twice; keep one"):
        read_labelled(path)


def test_a_repeated_parquet_column_is_refused(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["x"]), pa.array(["y"])], ["text", "label", "label"])
    pq.write_table(table, tmp_path / "d.parquet")
    with pytest.raises(ExportError, match="the column 'label' is there twice"):
        read_labelled(tmp_path / "d.parquet")


@pytest.mark.parametrize(
    "labels",
    [
        ["1", "01", "1.0", "+1"],
        ["card arrival", "card  arrival", "card\u00a0arrival", "card\tarrival"],
        ["io", "i\u200bo", "\uff49\uff4f", "IO"],
    ],
)
def test_labels_that_look_nearly_equal_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, labels: list[str]
) -> None:
    path = write(tmp_path, "d.csv", "text,label\n" + "".join(f"{i},{label}\n" for i, label in enumerate(labels)))
    assert set(training_examples(read_labelled(path), min_examples=1).labels) == set(labels)
    assert f"written: {len(labels) - 1}, such as " in caplog.text


def test_labels_that_clearly_differ_are_not_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    labels = ["1", "1.5", "10", "-1", "1.0.0", "1st", "io", "oi", "card arrival", "cardarrival"]
    path = write(tmp_path, "d.csv", "text,label\n" + "".join(f"{i},{label}\n" for i, label in enumerate(labels)))
    training_examples(read_labelled(path), min_examples=1)
    assert not caplog.text


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("NaN", "label is of type float"),
        ("1.0", "label is of type float"),
        ("true", "label is of type bool"),
        ('{"a": 1}', "label is of type dict"),
        ('["a", 1.5]', "label holds 1.5, which is not a label"),
        ('["a", null]', "label holds None, which is not a label"),
        ('"a;b\\u0000"', "label holds a NUL character"),
        ('["a\\u0000"]', "label holds a NUL character"),
        ('["a", "\\ud800"]', "label holds a lone surrogate"),
    ],
)
def test_an_invalid_label_is_refused_in_multi_label_files(tmp_path: Path, label: str, words: str) -> None:
    path = write(tmp_path, "d.jsonl", f'{{"text": "t", "label": {label}}}\n')
    with pytest.raises(ExportError, match=f"line 1: {words}"):
        read_labelled(path, separator=";")


def test_an_empty_separator_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="the separator of labels is empty"):
        read_labelled(write(tmp_path, "d.csv", "text,label\na,b\n"), separator="")


@pytest.mark.parametrize("column", ["floats", "bytes", "booleans"])
@pytest.mark.parametrize("separator", [None, ";"])
def test_parquet_labels_of_other_types_are_refused(tmp_path: Path, column: str, separator: str | None) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    values: dict[str, list[object]] = {"floats": [1.0, float("nan")], "bytes": [b"x", b"y"], "booleans": [True, False]}
    pq.write_table(pa.table({"text": ["a", "b"], "label": values[column]}), tmp_path / "d.parquet")
    with pytest.raises(ExportError, match="row 1: label is of type (float|bytes|bool); it must be a text"):
        read_labelled(tmp_path / "d.parquet", separator=separator)


@pytest.mark.parametrize("name", ["d.CSV", "d.Tsv", "d.ndjson", "d.JSONL"])
def test_file_suffixes_are_read_in_any_case(tmp_path: Path, name: str) -> None:
    rows = {"csv": "text,label\r\na,x\r\n", "tsv": "text\tlabel\r\na\tx\r\n"}
    content = rows.get(name[2:].lower(), '{"text": "a", "label": "x"}\r\n')
    assert read_labelled(write(tmp_path, name, content)).labels == [("x",)]


def test_space_around_column_names_is_removed(tmp_path: Path) -> None:
    assert read_labelled(write(tmp_path, "d.csv", "text , label\na,x\n")).labels == [("x",)]
    with pytest.raises(ExportError, match="line 1: the column 'label' is there twice"):
        read_labelled(write(tmp_path, "e.csv", "text,label,label \na,x,y\n"))


@pytest.mark.parametrize(
    ("rows", "words"),
    [("a,x\nb,x\nc,y\n", "1 label has fewer than 2 texts: 'y'"), ("a,x\nb,y\n", "2 labels have fewer than 2 texts")],
)
def test_the_error_for_labels_with_too_few_texts_states_their_number(tmp_path: Path, rows: str, words: str) -> None:
    path = tmp_path / "train.csv"
    path.write_text(f"text,label\n{rows}")
    with pytest.raises(ExportError, match=words):
        training_examples(read_labelled(path))


def test_check_columns_reads_only_the_start_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text('text,label\na,x\n"open\n')
    check_columns(path, {"text": "", "label": ""})
    with pytest.raises(ExportError, match="'intent'; there are: text, label; rename one, or give --"):
        check_columns(path, {"text": "", "intent": "give --label-column"})
    path.write_text("text,label\n")
    with pytest.raises(ExportError, match="has no rows"):
        check_columns(path, {"text": ""})
