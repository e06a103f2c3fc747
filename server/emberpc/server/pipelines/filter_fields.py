"""Validate the strings of filters, and the names of metadata fields in filters and in a collection's indexed fields."""

from __future__ import annotations

from collections.abc import Sequence

from emberpc.server.collections import filters
from emberpc.server.errors import invalid

_MAX_INDEXED_FIELDS = 16


def check_field(field: str, path: str) -> str:
    """Return `field`, such as `author.name`, unchanged, after a check that it is a valid name of a metadata field.

    Args:
        field: keys of the metadata, separated by dots. A backslash stands before a dot or backslash that is part of a
            key.
        path: path of the field in the request, for errors.

    Raises:
        ServiceError: INVALID_ARGUMENT if the name is empty, has more than 1000 characters, more than 40 keys, a
            backslash before any other character or at the end, or a NUL character.
    """
    if not field:
        raise invalid(path, "is empty; name a key of the metadata")
    if len(field) > filters.MAX_FIELD:
        raise invalid(path, f"has {len(field)} characters, it may have {filters.MAX_FIELD}; shorten the keys")
    if not filters.is_field(field):
        raise invalid(path, f"is {field!r}; a backslash may only stand before a dot or a backslash of a key")
    if (count := len(filters.keys(field))) > filters.MAX_KEYS:
        raise invalid(path, f"has {count} nested keys, it may have {filters.MAX_KEYS}; metadata is never deeper")
    return check_string(field, path)


def check_string(value: str, path: str) -> str:
    """Return the string `value` unchanged; raise INVALID_ARGUMENT, naming `path`, if it contains a NUL character."""
    # SQLite's JSON functions end a string at NUL, so a filter would compare only the part before it.
    if "\0" in value:
        raise invalid(path, "holds a NUL character, which filters cannot compare; leave it out")
    return value


def check_indexed_fields(fields: Sequence[str], path: str) -> None:
    """Check the list of metadata fields that a collection indexes.

    Args:
        fields: names of metadata fields; may be empty.
        path: path of the list in the request, for errors.

    Raises:
        ServiceError: INVALID_ARGUMENT if there are more than 16 fields, `check_field` refuses a field, or a key is
            empty or has a double quote, a backslash or a character below U+0020: SQLite cannot index this key.
    """
    if len(fields) > _MAX_INDEXED_FIELDS:
        raise invalid(path, f"has {len(fields)} fields, it may have {_MAX_INDEXED_FIELDS}; each slows down every write")
    for i, field in enumerate(fields):
        if not filters.can_be_indexed(check_field(field, f"{path}[{i}]")):
            problem = "has a key that is empty or holds a double quote, a backslash or a control character"
            raise invalid(f"{path}[{i}]", f"{problem}, which cannot be indexed; filters can use it all the same")
