"""Filters as text: `lang = "en" and year >= 2020`.

    field = value    also !=, <, <=, >, >=; == is =, and <> is !=
    field in ("en", "de")    also `not in`
    field starts with "ab"    or field ^= "ab"
    field exists
    not …    … and …    … or …    ( … )    `not` binds closest, then `and`

A value is a text in double or single quotes, a number, true, false or null. Inside
quotes, write a backslash before a backslash and before the quote that encloses the
text; \\n, \\r and \\t mean the same as in Python. A field is a key, or nested keys
joined by dots. Write a key in quotes if it has other characters than letters, digits,
`_` and `-`, starts with a digit or `-`, or is a keyword of filters such as `in`:
`author."full name" = "X"`. Keywords may be written in capitals.

filter.proto defines the conditions. If a field is missing or has another type than the
value, `=`, `<` and the like, `in` and `starts with` are false. They are true for a list
if they are true for one of its items. `!=` is true whenever `=` is false, and `not in`
whenever `in` is false.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, TypeAlias

from emberpc.client._core import checks
from emberpc.client.exceptions import InputError, InputTypeError
from emberpc.v1 import filter_pb2 as pb

#: A filter as text, see the docstring of this module, or as the message `Filter` of filter.proto.
Where: TypeAlias = "str | pb.Filter"

#: Maximum number of levels of a filter as text: the condition itself, and each `not` and `(` around it. Without a limit
#: the parser could raise RecursionError. The server has the same limit for the levels of the message, where `and`, `or`
#: and `not in` count too, so it may refuse a filter that is accepted here.
_MAX_DEPTH = 32
#: Numbers of filters are doubles on the wire, which do not represent every integer beyond this one. So a number without
#: point and exponent is refused if it is not below this number, either sign.
_MAX_WHOLE = 2**53
_TOKEN = re.compile(
    r"""
    (?P<space>\s+)
    | (?P<text>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')
    | (?P<number>[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?(?![\w.]))
    | (?P<word>[^\W\d][\w-]*)
    | (?P<sign>==|!=|<>|<=|>=|\^=|[=<>(),.])
    """,
    re.VERBOSE | re.DOTALL,
)
_OPERATORS = {
    "=": pb.COMPARISON_OPERATOR_EQUAL,
    "==": pb.COMPARISON_OPERATOR_EQUAL,
    "!=": pb.COMPARISON_OPERATOR_NOT_EQUAL,
    "<>": pb.COMPARISON_OPERATOR_NOT_EQUAL,
    "<": pb.COMPARISON_OPERATOR_LESS,
    "<=": pb.COMPARISON_OPERATOR_LESS_OR_EQUAL,
    ">": pb.COMPARISON_OPERATOR_GREATER,
    ">=": pb.COMPARISON_OPERATOR_GREATER_OR_EQUAL,
}
_WORD_VALUES: dict[str, dict[str, Any]] = {
    "true": {"bool_value": True},
    "false": {"bool_value": False},
    "null": {"null_value": True},
}
_KEYWORDS = frozenset({"and", "or", "not", "in", "exists", "starts", "with", *_WORD_VALUES})
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", '"': '"', "'": "'", "\\": "\\"}


def parse_filter(text: str, name: str = "where") -> pb.Filter:
    """Parse a filter, such as `lang = "en" and year >= 2020`, and return it as a message of the API.

    Args:
        text: the filter; the docstring of `emberpc.client.filters` describes the syntax.
        name: name of the argument in errors.

    Raises:
        InputError: `text` is not a valid filter, has more than 31 `not` and `(` within each other, or has a number that
            is too large; the message states the column and the problem. Or `text` contains a lone surrogate.
        InputTypeError: `text` is not a str.
    """
    return _Parser(checks.text(text, name), name).parse()


def filter_of(where: Where | None, name: str = "where") -> pb.Filter | None:
    """Return a filter, given as text or message, as a message; None stays None. A message is returned unchecked.

    Args:
        where: the filter.
        name: name of the argument in errors.

    Raises:
        InputError: the text is not a valid filter.
        InputTypeError: `where` is neither a str, a Filter nor None.
    """
    if where is None or isinstance(where, pb.Filter):
        return where
    if not isinstance(where, str):
        raise InputTypeError(f"{name} is of type {type(where).__name__}; it must be a str or a Filter")
    return parse_filter(where, name)


@dataclass(frozen=True)
class _Token:
    """A token of a filter.

    Attributes:
        kind: `text` (in quotes), `number`, `word` (a key of a field), `keyword`, `sign`, or `end` after the last one.
        source: the characters of the token in the filter, with quotes; empty for `end`.
        start: offset of the token's first character in the filter, from 0.
    """

    kind: str
    source: str
    start: int

    def __str__(self) -> str:
        return "the end" if self.kind == "end" else self.source

    def has(self, *sources: str) -> bool:
        """Return whether the token is one of the keywords and signs `sources`; these must be in lower case."""
        return self.kind in ("keyword", "sign") and self.source.lower() in sources


class _Parser:
    """Parses the filter `text`. The constructor divides the text into tokens; `parse`, called once, reads them.

    Both raise InputError if the text is not a valid filter; the message calls the filter `name`.
    """

    def __init__(self, text: str, name: str) -> None:
        self._name = name
        self._tokens = self._split(text)
        self._next = 0

    def parse(self) -> pb.Filter:
        """Parse the whole text, and return the filter; raise InputError if the text is not a valid filter."""
        found = self._any(1)
        if self._peek().kind != "end":
            raise self._expected("'and', 'or' or the end")
        return found

    def _split(self, text: str) -> list[_Token]:
        tokens, place = [], 0
        while place < len(text):
            match = _TOKEN.match(text, place)
            if match is None or match.lastgroup is None:
                if text[place] in "\"'":
                    raise self._error(place, f"the text that starts here has no closing {text[place]}")
                raise self._error(place, f"{text[place]!r} has no meaning here; texts and unusual keys go in quotes")
            kind, source = match.lastgroup, match[0]
            if kind == "word" and source.lower() in _KEYWORDS:
                kind = "keyword"
            if kind != "space":
                tokens.append(_Token(kind, source, place))
            place = match.end()
        return [*tokens, _Token("end", "", len(text))]

    def _any(self, depth: int) -> pb.Filter:
        found = [self._all(depth)]
        while self._take("or"):
            found.append(self._all(depth))
        return found[0] if len(found) == 1 else pb.Filter(any=pb.FilterList(filters=found))

    def _all(self, depth: int) -> pb.Filter:
        found = [self._negation(depth)]
        while self._take("and"):
            found.append(self._negation(depth))
        return found[0] if len(found) == 1 else pb.Filter(all=pb.FilterList(filters=found))

    def _negation(self, depth: int) -> pb.Filter:
        if depth > _MAX_DEPTH:
            raise self._error(self._peek().start, f"it is nested more than {_MAX_DEPTH} levels deep; make it flatter")
        if self._take("not"):
            return _not(self._negation(depth + 1))
        if self._take("("):
            found = self._any(depth + 1)
            self._need(")", "'and', 'or' or ')'")
            return found
        return self._condition()

    def _condition(self) -> pb.Filter:
        field = self._field()
        token = self._peek()
        if token.has(*_OPERATORS):
            self._next += 1
            operator = _OPERATORS[token.source]
            return pb.Filter(comparison=pb.Comparison(field=field, operator=operator, value=self._value()))
        if self._take("exists"):
            return pb.Filter(existence=pb.Existence(field=field))
        if self._take("^="):
            return self._prefix(field)
        if self._take("starts"):
            self._need("with", "'with'")
            return self._prefix(field)
        if self._take("not"):
            if self._peek().has("exists"):
                raise self._error(token.start, "`not` goes before the field here: write `not FIELD exists`")
            self._need("in", "'in'")
            return _not(self._membership(field))
        if self._take("in"):
            return self._membership(field)
        raise self._expected("=, !=, <, <=, >, >=, in, not in, starts with or exists")

    def _field(self) -> str:
        keys = [self._key()]
        while self._take("."):
            keys.append(self._key())
        return ".".join(key.replace("\\", "\\\\").replace(".", "\\.") for key in keys)

    def _key(self) -> str:
        token = self._peek()
        if token.kind not in ("word", "text"):
            raise self._expected("a field; a key that is a word of filters, or holds more than letters, goes in quotes")
        self._next += 1
        return self._unquoted(token) if token.kind == "text" else token.source

    def _membership(self, field: str) -> pb.Filter:
        self._need("(", "'('")
        values = [self._value()]
        while self._take(","):
            values.append(self._value())
        self._need(")", "',' or ')'")
        return pb.Filter(membership=pb.Membership(field=field, values=values))

    def _prefix(self, field: str) -> pb.Filter:
        token = self._peek()
        if token.kind != "text":
            raise self._expected('a text in quotes, such as "ab"')
        self._next += 1
        prefix = self._unquoted(token)
        if not prefix:
            raise self._error(token.start, "the start is empty; use `exists` for any value")
        return pb.Filter(prefix=pb.Prefix(field=field, prefix=prefix))

    def _value(self) -> pb.FilterValue:
        token = self._peek()
        if token.kind == "text":
            value = pb.FilterValue(string_value=self._unquoted(token))
        elif token.kind == "number":
            value = pb.FilterValue(number_value=self._number(token))
        elif token.has(*_WORD_VALUES):
            value = pb.FilterValue(**_WORD_VALUES[token.source.lower()])
        else:
            raise self._expected('a value: a text in quotes such as "en", a number, true, false or null')
        self._next += 1
        return value

    def _number(self, token: _Token) -> float:
        number = float(token.source)
        if not math.isfinite(number):
            raise self._error(token.start, f"{token.source} is too large for a number of metadata")
        if token.source.lstrip("+-").isdigit() and abs(number) >= _MAX_WHOLE:
            raise self._error(token.start, f"{token.source} is not below 2**53, so it may not stay exact; use a text")
        return number

    def _unquoted(self, token: _Token) -> str:
        def unescape(match: re.Match[str]) -> str:
            if match[1] not in _ESCAPES:
                place = token.start + 1 + match.start()
                raise self._error(place, f"there is no \\{match[1]}; write \\\\ for a backslash")
            return _ESCAPES[match[1]]

        return re.sub(r"\\(.)", unescape, token.source[1:-1], flags=re.DOTALL)

    def _peek(self) -> _Token:
        return self._tokens[self._next]

    def _take(self, source: str) -> bool:
        found = self._peek().has(source)
        self._next += found
        return found

    def _need(self, source: str, expected: str) -> None:
        if not self._take(source):
            raise self._expected(expected)

    def _expected(self, what: str) -> InputError:
        token = self._peek()
        return self._error(token.start, f"expected {what}; found {token}")

    def _error(self, place: int, what: str) -> InputError:
        return InputError(f"{self._name}, column {place + 1}: {what}")


def _not(condition: pb.Filter) -> pb.Filter:
    # `not` is a keyword of Python, so `pb.Filter(not=…)` is a syntax error.
    negated = pb.Filter()
    getattr(negated, "not").CopyFrom(condition)
    return negated
