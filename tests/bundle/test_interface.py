"""Inputs of a graph: the name of an input or the user states its role; an input without a role is refused."""

from __future__ import annotations

import numpy as np
import pytest

from emberpc.bundle import BundleError, Graph, Tensor, UnstatedError, find_inputs
from emberpc.bundle.interface import Interface
from emberpc.bundle.transformers_settings import read_first_position

IDS = np.array([[5, 6, 7], [5, 6, 0]])
MASK = np.array([[1, 1, 1], [1, 1, 0]])


def graph(*names: str, kind: str = "tensor(int64)") -> Graph:
    return Graph([Tensor(name, kind, ["batch", "tokens"]) for name in names], [])


@pytest.mark.parametrize(
    ("names", "roles"),
    [
        (("input_ids",), ("input_ids",)),
        (("ids", "mask"), ("input_ids", "attention_mask")),
        (("input_ids:0", "attention_mask:0"), ("input_ids", "attention_mask")),
        (("attention_mask", "INPUT_IDS"), ("attention_mask", "input_ids")),
        (("tokens", "padding_mask", "segments"), ("input_ids", "attention_mask", "token_type_ids")),
        (("input_ids", "attention_mask", "position_ids"), ("input_ids", "attention_mask", "position_ids")),
    ],
)
def test_input_roles_are_found_by_whole_names(names: tuple[str, ...], roles: tuple[str, ...]) -> None:
    found = find_inputs(graph(*names), first_position=0)
    assert tuple(getattr(found, role) for role in roles) == names


@pytest.mark.parametrize(
    "names",
    [
        ("input_ids", "attention_mask", "task_id"),
        ("input_ids", "attention_mask", "language_ids"),
        ("input_ids", "attention_mask", "global_attention_mask"),
        ("input_ids", "attention_mask", "decoder_input_ids"),
        ("pixel_values", "attention_mask"),
        ("input_ids", "tokens"),
        ("attention_mask",),
    ],
)
def test_an_input_of_an_unknown_role_is_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(UnstatedError, match="the roles of the inputs .* are unknown; the server can give input_ids, "):
        find_inputs(graph(*names), first_position=0)


@pytest.mark.parametrize(
    ("stated", "words"),
    [
        ("input_ids:attention_mask:position_ids", "state the role of each input: inputs=input_ids=input_ids:"),
        ("input_ids:position_ids:attention_mask", "state the role of each input"),
        ("input_ids=input_ids:attention_mask:position_ids", "must be ROLE=NAME:ROLE=NAME"),
        ("input_ids=input_ids:attention_mask=attention_mask", "names input_ids, attention_mask; the inputs are"),
        ("input_ids=input_ids:input_ids=attention_mask:position_ids=position_ids", "each role once"),
        ("task=input_ids:attention_mask=attention_mask:position_ids=position_ids", "has the role 'task'; roles are"),
        ("position_ids=position_ids", "input_ids"),
        ("a:b:c:d", "state the role of each input: inputs=ROLE=a:ROLE=b"),
        (":::", "input_ids"),
        ("=", "has the role ''"),
    ],
)
def test_an_invalid_model_option_inputs_is_refused(stated: str, words: str) -> None:
    with pytest.raises(BundleError, match=words):
        find_inputs(graph("input_ids", "attention_mask", "position_ids"), stated, 0)


def test_stated_roles_override_input_names() -> None:
    found = find_inputs(graph("a", "b", "c"), "position_ids=a:input_ids=b:attention_mask=c", 0)
    assert (found.input_ids, found.attention_mask, found.position_ids) == ("b", "c", "a")
    assert find_inputs(graph("a", "b", "c"), "a:b:c").token_type_ids == "c"


@pytest.mark.parametrize(
    ("config", "first"),
    [
        ({"model_type": "bert"}, 0),
        ({"model_type": "qwen3", "pad_token_id": 151_643}, 0),
        ({"model_type": "roberta", "pad_token_id": 1}, 2),
        ({"model_type": "mpnet"}, 2),
    ],
)
def test_positions_start_at_the_first_position_of_the_model_type(config: dict[str, object], first: int) -> None:
    assert read_first_position(config) == first
    inputs = find_inputs(graph("input_ids", "position_ids", kind="tensor(int32)"), "", first)
    positions = inputs.feeds(IDS, MASK)["position_ids"]
    assert positions.dtype == np.int32
    np.testing.assert_array_equal(positions[MASK == 1], np.array([0, 1, 2, 0, 1]) + first)


def test_positions_of_a_model_of_unknown_type_are_refused() -> None:
    assert read_first_position({}) is None
    with pytest.raises(BundleError, match="states no model_type"):
        find_inputs(graph("input_ids", "position_ids"))


def test_legacy_text_has_no_fields_that_were_added_later() -> None:
    inputs = find_inputs(graph("input_ids", "attention_mask"))
    assert Interface(inputs, "out", "mean").legacy_text() == (
        "Interface(inputs=Inputs(input_ids='input_ids', attention_mask='attention_mask', token_type_ids='', "
        "integers='int64'), output='out', pooling='mean', normalize=False)"
    )
    assert inputs.roles() == {"input_ids": "input_ids", "attention_mask": "attention_mask"}
