"""Exceptions of the training libraries become errors that name the part of the model that a library cannot handle."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest

from emberpc.export.errors import ExportError
from emberpc.export.libraries import calling_libraries


def no_module() -> None:
    importlib.import_module("no_such_library.layers")


SETTINGS: dict[str, str] = {}


def no_key() -> None:
    SETTINGS["pooling_mode"]


def no_attribute() -> None:
    object().hidden_size  # type: ignore[attr-defined]  # noqa: B018


def unknown_setting() -> None:
    def layer(size: int) -> None: ...

    layer(size=1, local_attention=2)  # type: ignore[call-arg]


def other() -> None:
    raise ZeroDivisionError("secret")


@pytest.mark.parametrize(
    ("block", "subject"),
    [
        (no_module, "the module no_such_library is missing"),
        (no_key, "the key 'pooling_mode' is unknown or missing"),
        (no_attribute, "object has no 'hidden_size'"),
        (unknown_setting, "the key 'local_attention' is unknown"),
        (other, "ZeroDivisionError"),
    ],
)
def test_the_error_names_the_module_or_key(block: Callable[[], None], subject: str) -> None:
    with pytest.raises(ExportError) as caught, calling_libraries("m cannot be loaded", "get it again"):
        block()
    assert str(caught.value) == f"m cannot be loaded ({subject}); get it again"


def test_a_long_key_is_shortened() -> None:
    with pytest.raises(ExportError) as caught, calling_libraries("m cannot be loaded", "get it again"):
        SETTINGS["k" * 10_000]
    assert len(str(caught.value)) < 300
