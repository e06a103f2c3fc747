"""Validate arguments before anything is sent.

The parameter `name` of these functions is the name of the argument or item, which every error message starts with.
"""

from __future__ import annotations

import numbers
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from emberpc.client.exceptions import InputError, InputTypeError
from emberpc.client.types import Matrix, Vector

#: Types of values that can be iterated over, but are no list of items.
SINGLE: tuple[type, ...] = (str, bytes, bytearray, Mapping)


def path(value: object, name: str) -> Path:
    """Validate the path of a file and return it as a Path; errors call the argument `name`.

    Raises:
        InputTypeError: `value` is neither a str nor a path object that stands for a str.
        InputError: the path has a NUL, which no file name has.
    """
    given = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    if not isinstance(given, str):
        raise InputTypeError(f"{name} is of type {type(value).__name__}; it must be a str or a pathlib.Path")
    if "\0" in given:
        raise InputError(f"{name} has a NUL character; remove it")
    return Path(given)


def text(value: object, name: str) -> str:
    """Validate a text, which may be empty, and return it as a plain str; errors call the text `name`.

    Raises:
        InputTypeError: `value` is not a str.
        InputError: `value` contains a lone surrogate, which UTF-8 cannot encode.
    """
    if not isinstance(value, str):
        raise InputTypeError(f"{name} is of type {type(value).__name__}; it must be a str")
    # protobuf may refuse an instance of a subclass of str, such as numpy.str_.
    value = str(value)
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"{name} holds a lone surrogate (U+{ord(value[error.start]):04X}) at character {error.start}, which is "
                "no Unicode text; decode the source with its right encoding"
            ) from None
    return value


def texts(values: Iterable[str], name: str, minimum: int = 1) -> list[str]:
    """Validate texts and return them as a list; errors call the argument `name`.

    Args:
        values: the texts.
        name: name of the argument.
        minimum: minimum number of texts, 0 or 1.

    Raises:
        InputTypeError: `values` is a str, bytes, a mapping or not iterable, or an item is not a str.
        InputError: there are fewer than `minimum` texts, or UTF-8 cannot encode a text.
    """
    if isinstance(values, str):
        raise InputTypeError(f"{name} is a str; it must be a list of texts, such as [text]")
    if isinstance(values, (bytes, bytearray)):
        raise InputTypeError(
            f"{name} is of type {type(values).__name__}; it must be a list of texts, each a str: decode the bytes"
        )
    if isinstance(values, Mapping):
        raise InputTypeError(
            f"{name} is of type {type(values).__name__}, and only its keys would be sent; give a list of texts"
        )
    if not isinstance(values, Iterable):
        raise InputTypeError(f"{name} is of type {type(values).__name__}; it must be a list of texts")
    checked = [text(value, f"{name}[{i}]") for i, value in enumerate(values)]
    if len(checked) < minimum:
        raise InputError(f"{name} is empty; give at least one")
    return checked


def function(value: object, name: str) -> None:
    """Validate a function that the caller gave; None, for no function, is valid. Errors call the argument `name`.

    Raises:
        InputTypeError: `value` cannot be called, for example because it is a list.
    """
    if value is not None and not callable(value):
        raise InputTypeError(
            f"{name} is of type {type(value).__name__}; it must be a function, such as the `append` of a list"
        )


def count(value: int, name: str, minimum: int = 0, bits: int = 31) -> int:
    """Validate an integer that must be at least `minimum` and below 2**`bits`, and return it as an int.

    By default the range is that of a non-negative int32. Errors call the argument `name`.

    Raises:
        InputTypeError: `value` is not an integer of Python or numpy, or is a bool.
        InputError: `value` is out of range.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise InputTypeError(f"{name} is of type {type(value).__name__}; it must be an int")
    if not minimum <= value < 2**bits:
        # By default, `str` raises ValueError for an int of more than 4,300 digits.
        shown = str(value) if -(2**64) < value < 2**64 else "beyond 2**64"
        limit = f"below 2**{bits}" if value > minimum else f"at least {minimum}"
        raise InputError(f"{name} is {shown}; it must be {limit}")
    return int(value)


def flag(value: bool, name: str) -> bool:
    """Validate a bool of Python or numpy, and return it as a bool; errors call the argument `name`.

    Raises:
        InputTypeError: `value` is not a bool.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise InputTypeError(f"{name} is of type {type(value).__name__}; it must be a bool")
    return bool(value)


def number(value: float, name: str) -> float:
    """Validate a number and return it as a float; errors call the argument `name`.

    NaN and infinity are valid here: the range is checked elsewhere, in most cases by the server.

    Raises:
        InputTypeError: `value` is not a real number, or is a bool or a Decimal.
        InputError: `value` is an int or a Fraction beyond the range of a float.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise InputTypeError(f"{name} is of type {type(value).__name__}; it must be a number")
    try:
        return float(value)
    except OverflowError:
        raise InputError(f"{name} is beyond the range of a float; give a smaller number") from None


def is_array(value: object) -> bool:
    """Return whether a value is an array of one or more dimensions for numpy, such as a list, a tuple or an ndarray.

    A str, bytes, a mapping, a set, an iterator, None and a single number are not.
    """
    if isinstance(value, (list, tuple)):
        return True
    if isinstance(value, SINGLE):
        return False
    try:
        return np.ndim(value) > 0  # type: ignore[arg-type]  # a value of any type
    except ValueError:  # the items of a sequence have different lengths
        return True


def vector(value: npt.ArrayLike, name: str) -> Vector:
    """Validate a vector and return it as float32, shape (dimensions,); errors call the vector `name`.

    The result may share its memory with `value`.

    Raises:
        InputTypeError: `value` is no array, the elements are not real numbers, or an int has more than 64 bits.
        InputError: `value` is empty or has another shape, or contains NaN, infinity or a number beyond float32.
    """
    array = numbers_of(value, name)
    if array.ndim != 1 or not array.size:
        raise InputError(f"{name} has shape {array.shape}; it must be one vector, (dimensions,)")
    row: Vector = _finite(array[None], lambda _: name)[0]
    return row


def matrix(values: npt.ArrayLike, name: str, rows: int) -> Matrix:
    """Validate vectors and return them as float32, shape (`rows`, dimensions); errors call the argument `name`.

    `rows` must be at least 1. The result may share its memory with `values`.

    Raises:
        InputTypeError: `values` is no array, an item of a sequence is neither a sequence nor a numpy array, the
            elements are not real numbers, or an int has more than 64 bits.
        InputError: the vectors have different lengths or are empty, there are not `rows` vectors, `values` has not two
            dimensions, or a vector contains NaN, infinity or a number beyond float32.
    """
    if isinstance(values, Sequence) and is_array(values):
        _same_length(values, name)
    array = numbers_of(values, name)
    if array.ndim != 2 or not array.size:
        raise InputError(f"{name} has shape {array.shape}; it must be ({rows}, dimensions)")
    if len(array) != rows:
        raise InputError(f"{name} has {len(array)} vectors for {rows} items; give one for each")
    return _finite(array, lambda i: f"{name}[{i}]")


def numbers_of(value: npt.ArrayLike, name: str) -> npt.NDArray[Any]:
    """Validate an array of real numbers of any shape and return it; errors call the argument `name`.

    Raises:
        InputTypeError: `value` is no array, or the elements are not real numbers or have more than 64 bits.
        InputError: the items of `value` have different lengths.
    """
    if not is_array(value):
        raise InputTypeError(f"{name} is of type {type(value).__name__}; it must be a list of numbers or a numpy array")
    try:
        array = np.asarray(value)
    except ValueError:
        raise InputError(f"{name} is ragged; it must be an array of numbers") from None
    if array.dtype.kind not in "fiu":
        raise InputTypeError(f"{name} has elements of type {array.dtype}; they must be real numbers")
    return array


def _same_length(values: Sequence[Any], name: str) -> None:
    """Check that all vectors of a list have the length of vector 0; errors call the list `name`.

    Raises:
        InputTypeError: an item is neither a sequence nor a numpy array.
        InputError: a vector has another length. Of several wrong items, the first is named.
    """
    lengths = [len(item) if isinstance(item, (Sequence, np.ndarray)) else None for item in values]
    for i, length in enumerate(lengths):
        if length is None:
            raise InputTypeError(f"{name}[{i}] is of type {type(values[i]).__name__}; it must be a vector")
        if length != lengths[0]:
            raise InputError(f"{name}[{i}] has {length} dimensions and {name}[0] has {lengths[0]}; they must be alike")


def _finite(array: npt.NDArray[Any], name_of: Callable[[int], str]) -> Matrix:
    """Return `array`, shape (rows, dimensions), as float32, without a copy if possible.

    Raises:
        InputError: a row contains NaN, infinity or a number beyond float32. The error calls the first such row `i`
            `name_of(i)`.
    """
    # A number beyond the range of float32 becomes infinity, which the next check finds.
    with np.errstate(over="ignore"):
        rows = np.ascontiguousarray(array, dtype=np.float32)
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if bad.size:
        raise InputError(f"{name_of(int(bad[0]))} holds NaN, infinity or a number beyond float32; leave it out")
    return rows
