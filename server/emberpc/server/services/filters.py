"""Filters: from the messages of filter.proto to the index's own terms, within bounds."""

from __future__ import annotations

import math
from collections.abc import Sequence

from emberpc.server.collections import filters
from emberpc.server.collections.filters import can_be_indexed
from emberpc.server.errors import invalid
from emberpc.v1 import filter_pb2 as pb

_OPERATORS: dict[pb.ComparisonOperator.ValueType, filters.Operator] = {
    pb.COMPARISON_OPERATOR_EQUAL: filters.Operator.EQUAL,
    pb.COMPARISON_OPERATOR_NOT_EQUAL: filters.Operator.NOT_EQUAL,
    pb.COMPARISON_OPERATOR_LESS: filters.Operator.LESS,
    pb.COMPARISON_OPERATOR_LESS_OR_EQUAL: filters.Operator.LESS_OR_EQUAL,
    pb.COMPARISON_OPERATOR_GREATER: filters.Operator.GREATER,
    pb.COMPARISON_OPERATOR_GREATER_OR_EQUAL: filters.Operator.GREATER_OR_EQUAL,
}
_MAX_INDEXED_FIELDS = 16
_EQUALITIES = (filters.Operator.EQUAL, filters.Operator.NOT_EQUAL)


#: Of all filters of a request together; of one filter, see `filters`.
MAX_REQUEST_CONDITIONS = 2_000
MAX_REQUEST_VALUES = 50_000


def read_filter(message: pb.Filter, path: str = "filter") -> filters.Filter:
    """Read the only filter of a request.

    Args:
        message: the filter.
        path: what the request calls it.

    Raises:
        ServiceError: INVALID_ARGUMENT, naming the part that is wrong or over a limit.
    """
    return FilterReader().read(message, path)


class FilterReader:
    """Reads the filters of one request, and counts the conditions and values of all of them."""

    def __init__(self) -> None:
        self._conditions = 0
        self._values = 0

    def read(self, message: pb.Filter, path: str) -> filters.Filter:
        """Read a filter; arguments and errors as of `read_filter`."""
        reader = _Reader(path)
        found = reader.read(message, path, 1)
        self._conditions += reader.conditions
        self._values += reader.values
        for count, limit, name in (
            (self._conditions, MAX_REQUEST_CONDITIONS, "conditions"),
            (self._values, MAX_REQUEST_VALUES, "values of memberships"),
        ):
            if count > limit:
                raise invalid(path, f"makes {count} {name} in the request, which may have {limit}; split the request")
        return found


class _Reader:
    """Reads one filter, and counts its conditions and the values of its memberships."""

    def __init__(self, path: str) -> None:
        self._path = path
        self.conditions = 0
        self.values = 0

    def read(self, message: pb.Filter, path: str, depth: int) -> filters.Filter:
        """Read a condition, so deep within the filter."""
        if depth > filters.MAX_DEPTH:
            raise invalid(path, f"is nested more than {filters.MAX_DEPTH} levels deep; make the filter flatter")
        self.conditions += 1
        if self.conditions > filters.MAX_CONDITIONS:
            raise invalid(
                self._path,
                f"has more than {filters.MAX_CONDITIONS} conditions; leave some out, or use a membership for many "
                "values of one field",
            )
        kind = message.WhichOneof("condition")
        if kind == "all":
            return filters.AllOf(self._list(message.all, f"{path}.all", depth))
        if kind == "any":
            return filters.AnyOf(self._list(message.any, f"{path}.any", depth))
        if kind == "not":
            return filters.Not(self.read(getattr(message, "not"), f"{path}.not", depth + 1))
        if kind == "comparison":
            return _comparison(message.comparison, f"{path}.comparison")
        if kind == "membership":
            self.values += len(message.membership.values)
            if self.values > MAX_REQUEST_VALUES:
                raise invalid(
                    self._path,
                    f"has more than {MAX_REQUEST_VALUES} values of memberships; leave some out, or split the request",
                )
            return _membership(message.membership, f"{path}.membership")
        if kind == "prefix":
            prefix = message.prefix.prefix
            if not prefix:
                raise invalid(f"{path}.prefix.prefix", "is empty; give how the strings start, or ask for existence")
            field = _field(message.prefix.field, f"{path}.prefix.field")
            return filters.Prefix(field, _string(prefix, f"{path}.prefix.prefix"))
        if kind == "existence":
            return filters.Existence(_field(message.existence.field, f"{path}.existence.field"))
        raise invalid(path, "has no condition; set one, or leave the filter out")

    def _list(self, message: pb.FilterList, path: str, depth: int) -> tuple[filters.Filter, ...]:
        count = len(message.filters)
        if not 1 <= count <= filters.MAX_LIST:
            raise invalid(f"{path}.filters", f"has {count} filters; it must have 1 to {filters.MAX_LIST}")
        return tuple(self.read(each, f"{path}.filters[{i}]", depth + 1) for i, each in enumerate(message.filters))


def check_indexed_fields(fields: Sequence[str], path: str) -> None:
    """Raise INVALID_ARGUMENT unless there can be an index on each field, and they are not too many."""
    if len(fields) > _MAX_INDEXED_FIELDS:
        raise invalid(path, f"has {len(fields)} fields, it may have {_MAX_INDEXED_FIELDS}; each slows down every write")
    for i, field in enumerate(fields):
        if not can_be_indexed(_field(field, f"{path}[{i}]")):
            what = "has a key that is empty or holds a quote, a backslash or a control character"
            raise invalid(f"{path}[{i}]", f"{what}, which cannot be indexed; filters can ask for it all the same")


def _comparison(message: pb.Comparison, path: str) -> filters.Comparison:
    operator = _OPERATORS.get(message.operator)
    if operator is None:
        raise invalid(
            f"{path}.operator", f"is {message.operator}, which is no ComparisonOperator; use EQUAL or another"
        )
    value = _value(message.value, f"{path}.value")
    if operator not in _EQUALITIES and filters.kind_of(value) not in ("string", "number"):
        raise invalid(
            f"{path}.operator",
            f"is {operator.value!r}, which goes for numbers and strings only; use EQUAL or NOT_EQUAL",
        )
    return filters.Comparison(_field(message.field, f"{path}.field"), operator, value)


def _membership(message: pb.Membership, path: str) -> filters.Membership:
    count = len(message.values)
    if not 1 <= count <= filters.MAX_VALUES:
        raise invalid(f"{path}.values", f"has {count} values; it must have 1 to {filters.MAX_VALUES}")
    values = tuple(_value(value, f"{path}.values[{i}]") for i, value in enumerate(message.values))
    return filters.Membership(_field(message.field, f"{path}.field"), values)


def _field(field: str, path: str) -> str:
    if not field:
        raise invalid(path, "is empty; name a key of the metadata")
    if len(field) > filters.MAX_FIELD:
        raise invalid(path, f"has {len(field)} characters, it may have {filters.MAX_FIELD}; shorten the keys")
    if not filters.is_field(field):
        raise invalid(path, f"is {field!r}; a backslash may only stand before a dot or a backslash of a key")
    if (count := len(filters.keys(field))) > filters.MAX_KEYS:
        raise invalid(path, f"has {count} nested keys, it may have {filters.MAX_KEYS}; metadata is never deeper")
    return _string(field, path)


def _value(message: pb.FilterValue, path: str) -> filters.Value:
    kind = message.WhichOneof("value")
    if kind == "string_value":
        return _string(message.string_value, f"{path}.string_value")
    if kind == "number_value":
        if not math.isfinite(message.number_value):
            raise invalid(f"{path}.number_value", f"is {message.number_value}; metadata numbers are finite, give one")
        return message.number_value
    if kind == "bool_value":
        return message.bool_value
    if kind == "null_value":
        return None
    raise invalid(path, "is not set; give a string, a number, a truth value or null")


def _string(value: str, path: str) -> str:
    # SQLite ends a string of JSON there.
    if "\0" in value:
        raise invalid(path, "holds a NUL character, which filters cannot compare; leave it out")
    return value
