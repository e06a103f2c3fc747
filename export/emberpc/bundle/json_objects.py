"""Refuse JSON objects with a repeated key: Python's json silently keeps only the last value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class RepeatedKeyError(ValueError):
    """A JSON object has the same key twice; the attribute `key` is that key."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def unique_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Return a dict of the pairs of a JSON object. Pass this function to `json.loads` as `object_pairs_hook`.

    Raises:
        RepeatedKeyError: a key occurs twice.
    """
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise RepeatedKeyError(key)
        found[key] = value
    return found
