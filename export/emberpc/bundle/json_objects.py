"""JSON objects in which no key is twice: Python's json takes the last of two values without a word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class RepeatedKeyError(ValueError):
    """A JSON object has a key twice; `key` says which."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def unique_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object of its pairs; to be the `object_pairs_hook` of `json.loads`.

    Raises:
        RepeatedKeyError: a key is twice among them.
    """
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise RepeatedKeyError(key)
        found[key] = value
    return found
