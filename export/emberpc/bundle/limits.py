"""Limits of the numbers and texts in the files of a model, and the checks against them.

The limits keep each value within its field of the wire format (int32, UTF-8) and a description of a model to some MiB.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable

from emberpc.bundle.errors import BundleError

MAX_DIMENSIONS = 65_536
MAX_TOKENS = 2**20
#: Token ids and counts are int32 in some graphs and on the wire.
MAX_TOKEN_ID = 2**31 - 1
MAX_LABELS = 30_000
MAX_MATRYOSHKA_DIMENSIONS = 1_000
MAX_VARIANTS = 100
#: Entries of a table in the manifest, such as `files` or `quality`.
MAX_ENTRIES = 10_000
#: Characters of a name, label, path or digest.
MAX_NAME_LENGTH = 1_024
#: Characters of a prompt or of an explanation.
MAX_TEXT_LENGTH = 16_384
#: Characters of all labels of a model.
MAX_LABEL_CHARACTERS = 2**20
#: Any other number, such as the bytes of a file: int64.
MAX_INTEGER = 2**63 - 1


def whole_number(value: object, name: str, least: int, most: int) -> int:
    """Return a whole number, which may be written as decimal digits.

    Args:
        value: an int, or a text of digits.
        name: what it is and where it stands, for the error.
        least: the least value allowed.
        most: the greatest value allowed.

    Raises:
        BundleError: it is none, or out of range.
    """
    found = value
    # More digits than these are out of range, and Python refuses to convert some thousands.
    if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) <= len(str(MAX_INTEGER)):
        found = int(value)
    if type(found) is not int or not least <= found <= most:
        raise BundleError(f"{name} is {reprlib.repr(value)}; it must be a whole number from {least} to {most}")
    return found


def check_length(value: str, name: str, most: int = MAX_NAME_LENGTH) -> str:
    """Return a text, or refuse one that is too long or that UTF-8 cannot write.

    Args:
        value: the text.
        name: what it is and where it stands, for the error.
        most: characters allowed.

    Raises:
        BundleError: it is too long, or has half a surrogate pair.
    """
    if len(value) > most:
        raise BundleError(f"{name} has {len(value)} characters; it may have at most {most}")
    if not is_unicode(value):
        raise BundleError(f"{name} is {reprlib.repr(value)}, which is no valid Unicode; correct it")
    return value


def check_count(count: int, name: str, most: int) -> None:
    """Refuse a list or table of too many entries.

    Raises:
        BundleError: `count` is above `most`.
    """
    if count > most:
        raise BundleError(f"{name} has {count} entries; it may have at most {most}")


def check_labels(labels: Iterable[str], name: str) -> None:
    """Refuse labels that are too many, too long or together too long.

    Raises:
        BundleError: a limit is exceeded.
    """
    found = tuple(labels)
    check_count(len(found), name, MAX_LABELS)
    for i, label in enumerate(found):
        check_length(label, f"{name}[{i}]")
    if (total := sum(map(len, found))) > MAX_LABEL_CHARACTERS:
        raise BundleError(f"{name} has {total} characters in all; it may have at most {MAX_LABEL_CHARACTERS}")


def is_unicode(text: str) -> bool:
    """Return False for a text with half a surrogate pair, which JSON can escape and UTF-8 cannot write."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
