"""JSON objects with a repeated key are refused, and the error names the key; other JSON objects are read."""

from __future__ import annotations

import json

import pytest

from emberpc.bundle.json_objects import RepeatedKeyError, unique_keys


def test_an_object_without_repeated_keys_is_read() -> None:
    document = '{"b": 1, "a": {"b": null}, "c": [{}]}'
    assert json.loads(document, object_pairs_hook=unique_keys) == json.loads(document)


@pytest.mark.parametrize("document", ['{"a": 1, "b": 2, "a": 1}', '{"x": [{"a": 1, "a": 2}]}'])
def test_a_repeated_key_is_named_in_the_error(document: str) -> None:
    with pytest.raises(RepeatedKeyError) as raised:
        json.loads(document, object_pairs_hook=unique_keys)
    assert raised.value.key == "a"
