"""Limits of numbers and texts in the files of a model, and their checks.

The server sends many of these values. The limits keep them within their fields of the wire format (such as int32 and
UTF-8), and they limit the size of a model's description.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable

from emberpc.bundle.errors import BundleError

MAX_DIMENSIONS = 65_536
MAX_TOKENS = 2**20
#: Greatest token id: the greatest int32, since token ids are int32 in some graphs.
MAX_TOKEN_ID = 2**31 - 1
MAX_LABELS = 30_000
MAX_MATRYOSHKA_DIMENSIONS = 1_000
MAX_VARIANTS = 100
#: Maximum number of entries of each of the manifest's tables `files`, `quality`, `dropped` and `tools`.
MAX_ENTRIES = 10_000
#: Maximum number of characters of a short text: a name, a label, a path, a key of a table, or a field such as
#: `created`.
MAX_NAME_LENGTH = 1_024
#: Maximum number of characters of a prompt, a model option, or the manifest's field `measured_on`.
MAX_TEXT_LENGTH = 16_384
#: Maximum number of characters of all labels of a model together.
MAX_LABEL_CHARACTERS = 2**20
#: Greatest magnitude of a whole number in the manifest that has no other limit, such as the bytes of a file: the
#: greatest int64.
MAX_INTEGER = 2**63 - 1


def whole_number(value: object, name: str, minimum: int, maximum: int) -> int:
    """Validate a whole number and return it as int.

    Args:
        value: an int, or a text of at most 19 decimal digits; a bool or float is refused.
        name: name and place of the number, for the error.
        minimum: the minimum value allowed.
        maximum: the maximum value allowed.

    Raises:
        BundleError: the value is not a whole number, or out of range.
    """
    found = value
    # Python refuses to convert thousands of digits. A text with more digits than MAX_INTEGER is out of range or begins
    # with zeros that it does not need; both are refused.
    if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) <= len(str(MAX_INTEGER)):
        found = int(value)
    if type(found) is not int or not minimum <= found <= maximum:
        raise BundleError(f"{name} is {reprlib.repr(value)}; it must be a whole number from {minimum} to {maximum}")
    return found


def check_length(value: str, name: str, maximum: int = MAX_NAME_LENGTH) -> str:
    """Validate the length and encoding of a text and return it.

    Args:
        value: the text.
        name: name and place of the text, for the error.
        maximum: maximum number of characters allowed.

    Raises:
        BundleError: the text is too long, or has a lone surrogate, which UTF-8 cannot encode.
    """
    if len(value) > maximum:
        raise BundleError(f"{name} has {len(value)} characters; it may have at most {maximum}")
    if not is_unicode(value):
        raise BundleError(f"{name} is {reprlib.repr(value)}, which is no valid Unicode; correct it")
    return value


def check_count(count: int, name: str, maximum: int) -> None:
    """Validate the number of entries of a list or table.

    Args:
        count: number of entries.
        name: name and place of the list or table, for the error.
        maximum: maximum number of entries allowed.

    Raises:
        BundleError: `count` is above `maximum`.
    """
    if count > maximum:
        raise BundleError(f"{name} has {count} entries; it may have at most {maximum}")


def check_labels(labels: Iterable[str], name: str) -> None:
    """Validate the number of labels, the characters of each label, and the characters of all labels together.

    Args:
        labels: the labels.
        name: name and place of the labels, for the error.

    Raises:
        BundleError: `MAX_LABELS`, `MAX_NAME_LENGTH` or `MAX_LABEL_CHARACTERS` is exceeded, or a label has a lone
            surrogate, which UTF-8 cannot encode.
    """
    found = tuple(labels)
    check_count(len(found), name, MAX_LABELS)
    for i, label in enumerate(found):
        check_length(label, f"{name}[{i}]")
    if (total := sum(map(len, found))) > MAX_LABEL_CHARACTERS:
        raise BundleError(f"{name} has {total} characters in all; it may have at most {MAX_LABEL_CHARACTERS}")


def is_unicode(text: str) -> bool:
    """Return whether UTF-8 can encode a text. False means a lone surrogate, which JSON can contain as an escape."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def is_finite(number: float) -> bool:
    """Return whether a number is finite as a float.

    NaN, infinities and integers beyond float's range are not, and Python's json accepts all of these.
    """
    try:
        return math.isfinite(number)
    except OverflowError:
        return False
