"""Filters as text: every filter has a text form, and errors name the column of the problem."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emberpc.client import InputError, InputTypeError
from emberpc.client.filters import filter_of, parse_filter
from emberpc.v1 import filter_pb2 as pb

WORDS = {1: "=", 2: "!=", 3: "<", 4: "<=", 5: ">", 6: ">="}
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
KEYS = TEXTS | st.sampled_from(["a", "full_name", "and", "In", "a.b", "back\\slash", "x-1"])
FIELDS = st.lists(KEYS, min_size=1, max_size=3)
VALUES = (
    st.builds(lambda text: pb.FilterValue(string_value=text), TEXTS)
    | st.builds(
        lambda number: pb.FilterValue(number_value=number),
        st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**53), 2**53).map(float),
    )
    | st.booleans().map(lambda value: pb.FilterValue(bool_value=value))
    | st.just(pb.FilterValue(null_value=True))
)


def quoted(text: str, quote: str = '"') -> str:
    return quote + text.replace("\\", "\\\\").replace(quote, "\\" + quote) + quote


def joined(keys: list[str]) -> str:
    return ".".join(key.replace("\\", "\\\\").replace(".", "\\.") for key in keys)


def written(value: pb.FilterValue) -> str:
    kind = value.WhichOneof("value")
    if kind == "string_value":
        return quoted(value.string_value, "'")
    if kind == "number_value":
        return repr(value.number_value)
    return "null" if kind == "null_value" else str(value.bool_value).upper()


@st.composite
def conditions(draw: st.DrawFn) -> tuple[str, pb.Filter]:
    """Draw a filter as text and as the message that it must parse to."""
    keys = draw(FIELDS)
    field, path = joined(keys), " . ".join(quoted(key) for key in keys)
    kind = draw(st.sampled_from(["comparison", "membership", "prefix", "existence"]))
    if kind == "comparison":
        operator, value = draw(st.sampled_from(sorted(WORDS))), draw(VALUES)
        read = pb.Filter(comparison=pb.Comparison(field=field, operator=operator, value=value))  # type: ignore[arg-type]  # a number of the enum
        return f"{path} {WORDS[operator]} {written(value)}", read
    if kind == "membership":
        values = draw(st.lists(VALUES, min_size=1, max_size=3))
        text = f"{path} in ({', '.join(map(written, values))})"
        return text, pb.Filter(membership=pb.Membership(field=field, values=values))
    if kind == "prefix":
        prefix = draw(TEXTS.filter(bool))
        return f"{path} Starts With {quoted(prefix)}", pb.Filter(prefix=pb.Prefix(field=field, prefix=prefix))
    return f"{path} exists", pb.Filter(existence=pb.Existence(field=field))


def negated(inner: tuple[str, pb.Filter]) -> tuple[str, pb.Filter]:
    found = pb.Filter()
    getattr(found, "not").CopyFrom(inner[1])
    return f"not ({inner[0]})", found


def listed(inner: list[tuple[str, pb.Filter]], word: str) -> tuple[str, pb.Filter]:
    filters = pb.FilterList(filters=[each for _, each in inner])
    found = pb.Filter(all=filters) if word == "and" else pb.Filter(any=filters)
    return f" {word} ".join(f"({text})" for text, _ in inner), found


FILTERS = st.recursive(
    conditions(),
    lambda inner: (
        inner.map(negated) | st.builds(listed, st.lists(inner, min_size=2, max_size=3), st.sampled_from(["and", "or"]))
    ),
    max_leaves=5,
)


@given(FILTERS)
def test_every_filter_has_a_text_form_that_parses_to_it(case: tuple[str, pb.Filter]) -> None:
    text, expected = case
    assert parse_filter(text) == expected


@given(st.text(max_size=20) | st.text("ab\"'\\()=<.,^ 1", max_size=20))
def test_any_text_is_parsed_or_refused_with_the_column(text: str) -> None:
    try:
        parse_filter(text)
    except InputError as error:
        assert "column" in str(error) or "surrogate" in str(error)


def equal(field: str, value: str | float) -> pb.Filter:
    read = pb.FilterValue(string_value=value) if isinstance(value, str) else pb.FilterValue(number_value=value)
    return pb.Filter(comparison=pb.Comparison(field=field, operator=pb.COMPARISON_OPERATOR_EQUAL, value=read))


def test_operators_have_the_precedence_of_python_and_sql() -> None:
    a, b, c = equal("a", 1), equal("b", "x"), equal("c.d", -0.5)
    expected = pb.Filter(any=pb.FilterList(filters=[a, pb.Filter(all=pb.FilterList(filters=[b, c]))]))
    assert parse_filter("a = 1 or b == 'x' AND c.d=-.5") == expected
    assert parse_filter("not a = 1") == negated(("", a))[1]
    assert parse_filter("a not in (1)") == negated(("", parse_filter("a in (1)")))[1]
    assert parse_filter('a ^= "x"') == parse_filter("a starts with 'x'")
    assert parse_filter("a <> 1") == parse_filter("a != 1")
    assert parse_filter('"a.b" = 1') == equal("a\\.b", 1)


@pytest.mark.parametrize(
    ("text", "column", "words"),
    [
        ("", 1, "expected a field"),
        ("lang = en", 8, "in quotes"),
        ("lang", 5, "expected =, !="),
        ("lang = 'en' year > 3", 13, "'and', 'or' or the end; found year"),
        ("(lang = 'en'", 13, "')'; found the end"),
        ("lang in ()", 10, "a value"),
        ("lang in ('en' 'de')", 15, "',' or ')'"),
        ("lang = 'en", 8, "no closing '"),
        ("lang = 'e\\n\\x'", 12, "there is no \\x"),
        ("lang starts 'x'", 13, "'with'"),
        ("lang ^= 3", 9, "a text in quotes"),
        ("lang ^= ''", 9, "empty"),
        ("year > 1e999", 8, "too large"),
        ("year = 9007199254740993", 8, "2**53"),
        ("year = 20x", 8, "no meaning"),
        ("a.and = 1", 3, "in quotes"),
        ("a; b", 2, "no meaning"),
        ("not " * 40 + "a exists", 129, "32 levels"),
        ("(" * 5000, 33, "32 levels"),
    ],
)
def test_the_error_for_an_invalid_filter_text_names_the_column(text: str, column: int, words: str) -> None:
    with pytest.raises(InputError) as raised:
        parse_filter(text)
    assert f"where, column {column}: " in str(raised.value)
    assert words in str(raised.value)


def test_a_filter_is_accepted_as_text_or_message_only() -> None:
    assert filter_of(None) is None
    assert filter_of(equal("a", 1)) == filter_of("a = 1")
    with pytest.raises(InputTypeError, match="where is of type dict"):
        filter_of({"a": 1})  # type: ignore[arg-type]  # what is tested


def test_the_error_for_not_exists_names_the_right_form() -> None:
    with pytest.raises(InputError, match="where, column 6: `not` goes before the field here: write `not FIELD exists`"):
        parse_filter("year not exists")
