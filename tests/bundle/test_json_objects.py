"""JSON objects in which no key is twice."""

from __future__ import annotations

import json

import pytest

from emberpc.bundle.json_objects import RepeatedKeyError, unique_keys


def test_an_object_is_read_as_it_is() -> None:
    document = '{"b": 1, "a": {"b": null}, "c": [{}]}'
    assert json.loads(document, object_pairs_hook=unique_keys) == json.loads(document)


@pytest.mark.parametrize("document", ['{"a": 1, "b": 2, "a": 1}', '{"x": [{"a": 1, "a": 2}]}'])
def test_a_key_that_is_twice_is_named(document: str) -> None:
    with pytest.raises(RepeatedKeyError) as raised:
        json.loads(document, object_pairs_hook=unique_keys)
    assert raised.value.key == "a"
