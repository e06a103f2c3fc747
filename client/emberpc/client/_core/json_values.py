"""Convert metadata to protobuf's Struct and back, and a Timestamp to a datetime."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

import numpy as np
from google.protobuf.struct_pb2 import NULL_VALUE, ListValue, Struct, Value
from google.protobuf.timestamp_pb2 import Timestamp

from emberpc.client._core import checks
from emberpc.client.exceptions import InputError, InputTypeError

#: Greatest magnitude of an int in metadata. Numbers are doubles on the wire, and doubles represent every integer up to
#: and including this one.
_MAX_WHOLE = 2**53
#: Maximum number of levels of dicts and lists in metadata, the outermost dict included. A level takes up to three
#: nested messages, and parsers of protobuf accept 100 levels of messages.
_MAX_DEPTH = 30


def to_datetime(timestamp: Timestamp) -> datetime:
    """Return a timestamp as a datetime in UTC, rounded down to microseconds."""
    return timestamp.ToDatetime(tzinfo=timezone.utc)


def mapping(struct: Struct) -> dict[str, Any]:
    """Return metadata as a dict.

    A number without a fraction becomes an int if its magnitude is at most 2**53. Any other number becomes a float.
    """
    return {key: _plain(value) for key, value in struct.fields.items()}


def struct(values: Mapping[str, Any], name: str) -> Struct:
    """Validate metadata and return it as a message; errors call the metadata `name`.

    Raises:
        InputTypeError: `values` is not a mapping, JSON has no type for a value, or a key is not a str.
        InputError: a number is not finite, the magnitude of an int is above 2**53, a key or a str contains a lone
            surrogate, or dicts and lists are nested more than 30 levels deep, `values` included.
    """
    if not isinstance(values, Mapping):
        raise InputTypeError(f"{name} is of type {type(values).__name__}; it must be a dict")
    return _struct(values, name, 1)


def _struct(values: Mapping[Any, Any], name: str, depth: int) -> Struct:
    if depth > _MAX_DEPTH:
        raise InputError(f"{name} is nested more than {_MAX_DEPTH} levels deep; make it flatter")
    fields = {checks.text(key, f"a key of {name}"): value for key, value in values.items()}
    return Struct(fields={key: _value(value, f"{name}.{key}", depth) for key, value in fields.items()})


def _value(value: Any, name: str, depth: int) -> Value:
    if value is None:
        return Value(null_value=NULL_VALUE)
    if isinstance(value, (bool, np.bool_)):
        return Value(bool_value=bool(value))
    if isinstance(value, numbers.Real):
        return Value(number_value=_number(value, name))
    if isinstance(value, str):
        return Value(string_value=checks.text(value, name))
    if isinstance(value, Mapping):
        return Value(struct_value=_struct(value, name, depth + 1))
    if isinstance(value, (list, tuple)):
        if depth >= _MAX_DEPTH:
            raise InputError(f"{name} is nested more than {_MAX_DEPTH} levels deep; make it flatter")
        items = [_value(item, f"{name}[{i}]", depth + 1) for i, item in enumerate(value)]
        return Value(list_value=ListValue(values=items))
    raise InputTypeError(
        f"{name} is of type {type(value).__name__}; metadata holds what JSON does: str, numbers, bool, None, dict, list"
    )


def _number(value: numbers.Real, name: str) -> float:
    if isinstance(value, numbers.Integral) and abs(int(value)) > _MAX_WHOLE:
        shown = value if abs(int(value)) < 10**40 else "a number of more than 40 digits"
        raise InputError(f"{name} is {shown}, and numbers past 2**53 do not stay exact; give it as a str")
    try:
        number = float(value)
    except OverflowError as error:
        raise InputError(f"{name} is greater than any float; give it as a str") from error
    if not math.isfinite(number):
        raise InputError(f"{name} is {number}, which JSON cannot hold; leave it out or give None")
    return number


def _plain(value: Value) -> Any:
    kind = value.WhichOneof("kind")
    if kind == "number_value":
        number = value.number_value
        # A greater number stays a float, since `struct` refuses an int beyond 2**53, but not a float. So metadata that
        # was read can be written again.
        return int(number) if number.is_integer() and abs(number) <= _MAX_WHOLE else number
    if kind == "struct_value":
        return mapping(value.struct_value)
    if kind == "list_value":
        return [_plain(item) for item in value.list_value.values]
    return getattr(value, kind) if kind in ("string_value", "bool_value") else None
