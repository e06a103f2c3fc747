"""Compile filters to filter expressions of Milvus. The expressions use terms, which are stored beside the metadata.

Milvus and milvus-lite compare JSON values in other ways than emberpc's filters, and differ from each other: for null,
for missing fields, for lists, and for `true` and 1. An array of strings means the same in both. So each record has an
array of terms. A term states one fact about a metadata field:

- the field exists;
- its value is of a kind (`kind_of`), such as a string;
- its value is a list that contains a value of a kind;
- its value is, or is a list that contains, this exact value.

Equality, membership and existence need terms only. Comparisons by order and prefixes read the JSON, but only of records
whose terms state that the field is a string or a number. If the field is a list with a string or a number, Milvus
cannot decide: the record is doubtful, and the server decides by `filters.matches`. `_ordered` has further such cases.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from emberpc.server.collections.filters import (
    AllOf,
    AnyOf,
    Comparison,
    Existence,
    Filter,
    Membership,
    Not,
    Operator,
    Prefix,
    Value,
    keys,
    kind_of,
)
from emberpc.server.milvus.literals import quoted

#: Name of the field of a Milvus row that has the terms: hashes of facts about the record's metadata, for filters.
FIELD = "terms"
#: Milvus's limit of the items of an array, and so of the terms of a record.
MAX_TERMS = 4096
#: Bytes of a term: a hash in hexadecimal.
TERM_BYTES = 16

#: Patterns of a metadata key, and of a prefix, that both Milvus and milvus-lite take literally, without escapes.
_PLAIN_KEY = re.compile(r"[A-Za-z0-9_.-]+")
_PLAIN_PREFIX = re.compile(r'[^%_\\"\'\x00-\x1f]+')


@dataclass(frozen=True)
class MilvusFilter:
    """A filter as filter expressions of Milvus.

    Attributes:
        expression: every record that matches the filter meets this expression; empty: every record meets it.
        doubtful: a filter expression of the doubtful records, for which Milvus cannot decide. A record that meets
            `expression` and `doubtful` may or may not match the filter: `filters.matches` must decide. A record that
            meets only `expression` matches. Empty: no record is doubtful.
    """

    expression: str
    doubtful: str = ""


EVERYTHING = MilvusFilter("")


def terms(metadata: Mapping[str, Any]) -> list[str]:
    """Return the terms of a record's metadata (hashes, each of one fact about a field), sorted, without repetition."""
    return sorted(set(_terms(metadata, ())))


def compile_filter(condition: Filter, *, met: bool = True) -> MilvusFilter:
    """Compile a validated filter, or its negation, to filter expressions of Milvus.

    Args:
        condition: the filter.
        met: True: compile the filter; False: compile its negation.
    """
    if isinstance(condition, Not):
        return compile_filter(condition.condition, met=not met)
    if isinstance(condition, (AllOf, AnyOf)):
        parts = [compile_filter(each, met=met) for each in condition.conditions]
        return _all(parts) if isinstance(condition, AllOf) is met else _any(parts)
    path = keys(condition.field)
    if isinstance(condition, Existence):
        return MilvusFilter(_has([_term(path, "there")], met=met))
    if isinstance(condition, Membership):
        return MilvusFilter(_has([_value_term(path, value) for value in condition.values], met=met))
    if isinstance(condition, Comparison) and condition.operator in (Operator.EQUAL, Operator.NOT_EQUAL):
        equal = condition.operator is Operator.EQUAL
        return MilvusFilter(_has([_value_term(path, condition.value)], met=met is equal))
    return _ordered(condition, path, met=met)


def both(*expressions: str) -> str:
    """Join expressions by AND. Empty expressions are left out; the result is empty if all are empty."""
    return " and ".join(f"({each})" for each in expressions if each)


def _ordered(condition: Comparison | Prefix, path: tuple[str, ...], *, met: bool) -> MilvusFilter:
    """Compile a comparison by order, or a prefix, of the field with the nested keys `path`; its negation unless `met`.

    The kind is that of the value that the field is compared with, string or number; string for a prefix. Records whose
    field is a list with an item of the kind are doubtful (see `MilvusFilter`). Records whose field is of the kind are
    doubtful for a negation, and if `_compared` returns no expression.
    """
    kind = "string" if isinstance(condition, Prefix) else kind_of(condition.value)
    is_one, holds_one = _has([_term(path, kind)]), _has([_term(path, "list", kind)])
    compared = _compared(condition, path) if met else ""
    if compared:
        return MilvusFilter(f"({is_one} and {compared}) or {holds_one}", holds_one)
    either = f"{is_one} or {holds_one}"
    return MilvusFilter(either if met else "", either)


def _compared(condition: Comparison | Prefix, path: tuple[str, ...]) -> str:
    """Return the expression by which Milvus compares a field with the value or prefix of `condition`.

    Empty if the keys, the value or the prefix have characters that Milvus and milvus-lite may read in different ways.

    Args:
        condition: the condition; its field is not read.
        path: the nested keys of the metadata field.
    """
    if not all(_PLAIN_KEY.fullmatch(key) for key in path):
        return ""
    field = "metadata" + "".join(f'["{key}"]' for key in path)
    if isinstance(condition, Prefix):
        return f'{field} like "{condition.prefix}%"' if _PLAIN_PREFIX.fullmatch(condition.prefix) else ""
    if isinstance(condition.value, str):
        return f"{field} {condition.operator.value} {quoted(condition.value)}" if condition.value.isprintable() else ""
    return f"{field} {condition.operator.value} {_number(condition.value)}"


def _number(value: Value) -> str:
    return repr(float(value or 0)).replace("e+", "e")


def _all(parts: Sequence[MilvusFilter]) -> MilvusFilter:
    return MilvusFilter(both(*(part.expression for part in parts)), _either([part.doubtful for part in parts]))


def _any(parts: Sequence[MilvusFilter]) -> MilvusFilter:
    expressions = [part.expression for part in parts]
    return MilvusFilter(_either(expressions) if all(expressions) else "", _either([part.doubtful for part in parts]))


def _either(expressions: Sequence[str]) -> str:
    return " or ".join(f"({each})" for each in dict.fromkeys(expressions) if each)


def _has(wanted: Sequence[str], *, met: bool = True) -> str:
    listed = ", ".join(f'"{term}"' for term in wanted)
    return f"{'' if met else 'not '}array_contains_any({FIELD}, [{listed}])"


def _terms(value: Any, path: tuple[str, ...]) -> Iterator[str]:
    if path:
        yield _term(path, "there")
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _terms(inner, (*path, key))
    elif isinstance(value, (list, tuple)):
        for item in value:
            if (kind := kind_of(item)) != "other":
                yield _term(path, "list", kind)
                yield _value_term(path, item)
    else:
        yield _term(path, kind_of(value))
        yield _value_term(path, value)


def _value_term(path: tuple[str, ...], value: Value) -> str:
    kind = kind_of(value)
    if isinstance(value, (int, float)) and kind == "number":
        # Equal numbers must have the same term: 1 and 1.0, and 0.0 and -0.0.
        whole = int(value) if value == int(value) else None
        return _term(path, "equal", kind, repr(value) if whole is None else str(whole))
    return _term(path, "equal", kind, json.dumps(value))


def _term(path: tuple[str, ...], *about: str) -> str:
    """Return the term for a fact about the metadata field with the nested keys `path`.

    `about` names the fact, such as `there`, or `equal` with the kind and the value. The term is a hash of 16
    hexadecimal digits, since Milvus limits the length of strings in arrays.
    """
    return blake2b(json.dumps([path, *about]).encode(), digest_size=TERM_BYTES // 2).hexdigest()
