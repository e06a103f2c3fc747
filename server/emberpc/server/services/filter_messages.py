"""Convert the messages of filter.proto to the types of `collections.filters`, and check the limits of filters."""

from __future__ import annotations

import math

from emberpc.server.collections import filters
from emberpc.server.errors import invalid
from emberpc.server.pipelines.filter_fields import check_field, check_string
from emberpc.server.pipelines.limits import MAX_REQUEST_CONDITIONS, MAX_REQUEST_VALUES
from emberpc.v1 import filter_pb2 as pb

_OPERATORS: dict[pb.ComparisonOperator.ValueType, filters.Operator] = {
    pb.COMPARISON_OPERATOR_EQUAL: filters.Operator.EQUAL,
    pb.COMPARISON_OPERATOR_NOT_EQUAL: filters.Operator.NOT_EQUAL,
    pb.COMPARISON_OPERATOR_LESS: filters.Operator.LESS,
    pb.COMPARISON_OPERATOR_LESS_OR_EQUAL: filters.Operator.LESS_OR_EQUAL,
    pb.COMPARISON_OPERATOR_GREATER: filters.Operator.GREATER,
    pb.COMPARISON_OPERATOR_GREATER_OR_EQUAL: filters.Operator.GREATER_OR_EQUAL,
}
_EQUALITIES = (filters.Operator.EQUAL, filters.Operator.NOT_EQUAL)


def read_filter(message: pb.Filter, path: str = "filter") -> filters.Filter:
    """Convert the filter of a request that has only one.

    Args:
        message: the filter.
        path: path of the filter in the request, for errors.

    Raises:
        ServiceError: INVALID_ARGUMENT, naming the filter or its part that is wrong or exceeds a limit.
    """
    return FilterReader().read(message, path)


class FilterReader:
    """Converts the filters of one request, and limits the conditions and values of all of them together."""

    def __init__(self) -> None:
        self._conditions = 0
        self._values = 0

    def read(self, message: pb.Filter, path: str) -> filters.Filter:
        """Convert the next filter of the request, and count its conditions and values.

        Args:
            message: the filter.
            path: path of the filter in the request, for errors.

        Raises:
            ServiceError: INVALID_ARGUMENT. If the filter is wrong or exceeds a limit of one filter, the error names the
                filter or the part of the filter. If this filter and the filters before it in the request together have
                more than 2,000 conditions, or more than 50,000 values in memberships (conditions that a field equals
                one of several values), the error names this filter.
        """
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
    """Converts one filter, and counts and limits its conditions and the values in its memberships.

    A membership is a condition that a field equals one of several values.

    Args:
        path: path of the filter in the request, for errors about the whole filter.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self.conditions = 0
        self.values = 0

    def read(self, message: pb.Filter, path: str, depth: int) -> filters.Filter:
        """Convert one condition, with the conditions nested in it, and count all of them.

        Args:
            message: the condition.
            path: path of the condition in the request, for errors.
            depth: nesting depth of the condition; the filter itself has depth 1.

        Raises:
            ServiceError: INVALID_ARGUMENT, naming the filter or its part that is wrong or exceeds a limit.
        """
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
                raise invalid(
                    f"{path}.prefix.prefix",
                    "is empty; give the first characters of the strings, or use an existence condition",
                )
            field = check_field(message.prefix.field, f"{path}.prefix.field")
            return filters.Prefix(field, check_string(prefix, f"{path}.prefix.prefix"))
        if kind == "existence":
            return filters.Existence(check_field(message.existence.field, f"{path}.existence.field"))
        raise invalid(path, "has no condition; set one, or leave the filter out")

    def _list(self, message: pb.FilterList, path: str, depth: int) -> tuple[filters.Filter, ...]:
        count = len(message.filters)
        if not 1 <= count <= filters.MAX_LIST:
            raise invalid(f"{path}.filters", f"has {count} filters; it must have 1 to {filters.MAX_LIST}")
        return tuple(self.read(each, f"{path}.filters[{i}]", depth + 1) for i, each in enumerate(message.filters))


def _comparison(message: pb.Comparison, path: str) -> filters.Comparison:
    operator = _OPERATORS.get(message.operator)
    if operator is None:
        raise invalid(
            f"{path}.operator", f"is {message.operator}, which is not a ComparisonOperator; use EQUAL or another"
        )
    value = _value(message.value, f"{path}.value")
    if operator not in _EQUALITIES and filters.kind_of(value) not in ("string", "number"):
        raise invalid(
            f"{path}.operator",
            f"is {operator.value!r}, which compares numbers and strings only; use EQUAL or NOT_EQUAL",
        )
    return filters.Comparison(check_field(message.field, f"{path}.field"), operator, value)


def _membership(message: pb.Membership, path: str) -> filters.Membership:
    count = len(message.values)
    if not 1 <= count <= filters.MAX_VALUES:
        raise invalid(f"{path}.values", f"has {count} values; it must have 1 to {filters.MAX_VALUES}")
    values = tuple(_value(value, f"{path}.values[{i}]") for i, value in enumerate(message.values))
    return filters.Membership(check_field(message.field, f"{path}.field"), values)


def _value(message: pb.FilterValue, path: str) -> filters.Value:
    kind = message.WhichOneof("value")
    if kind == "string_value":
        return check_string(message.string_value, f"{path}.string_value")
    if kind == "number_value":
        if not math.isfinite(message.number_value):
            raise invalid(f"{path}.number_value", f"is {message.number_value}; metadata numbers are finite, give one")
        return message.number_value
    if kind == "bool_value":
        return message.bool_value
    if kind == "null_value":
        return None
    raise invalid(path, "is not set; give a string, a number, a truth value or null")
