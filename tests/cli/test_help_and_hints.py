"""The help in a narrow terminal, completion of names, and hints beside results."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from emberpc.cli.app import program
from emberpc.cli.bundle_summary import show_bundle
from emberpc.cli.options import completer
from emberpc.cli.output import counted
from emberpc.cli.server import _remedy_without_models
from emberpc.client import AlreadyExists, Client
from emberpc.server.collections.backend import collection_exists
from emberpc.server.settings import Settings
from fake_server import FakeServer

Emberpc = Any


def commands(command: Any, *names: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield (names, command) of each command that is no group."""
    if not hasattr(command, "commands"):
        yield names, command
        return
    for name, inner in command.commands.items():
        yield from commands(inner, *names, name)


COMMANDS = dict(commands(program()))


@pytest.mark.parametrize("names", COMMANDS, ids=" ".join)
def test_the_help_of_80_columns_shows_all_names_whole(
    emberpc: Emberpc, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = emberpc(*names, "--help").out
    assert max(map(len, text.splitlines())) <= 80
    assert "<bool>" not in text
    words = text.replace(",", " ").replace(";", " ").replace("(", " ").replace(")", " ").replace("]", " ").split()
    for parameter in COMMANDS[names].params:
        if parameter.hidden:
            continue
        for name in (*parameter.opts, *parameter.secondary_opts, parameter.envvar):
            assert name is None or not name.startswith(("-", "EMBERPC")) or name in words
    if names[0] in ("serve", "config"):
        for field in Settings.__dataclass_fields__.values():
            assert (f"EMBERPC_{field.name.upper()}" in words) is not field.metadata["secret"]


def test_names_are_completed_also_after_a_comma() -> None:
    complete = completer(("int8", "int8-fast", "int8-static", "fp16"))
    assert complete("int") == ["int8", "int8-fast", "int8-static"]
    assert complete("fp16,int8-f") == ["fp16,int8-fast"]
    assert complete("x") == []


def test_a_classifier_is_shown_without_fields_of_classifiers_from_examples(emberpc: Emberpc, fake: FakeServer) -> None:
    fields = [row[0] for row in emberpc("models", "classifiers", "kinds").rows]
    assert not {"collection", "strategy", "example_count", "model"} & set(fields)
    assert "model_fingerprint" in fields


@pytest.mark.parametrize(
    ("method", "command", "hint"),
    [
        ("models", ["models"], "no model is served; start the server with --model NAME=DIR\n"),
        (
            "classifiers",
            ["models", "classifiers"],
            "no classifier is served; make one with `emberpc export classifier`\n",
        ),
        (
            "collections",
            ["collection", "list"],
            "there are no collections; create one with `emberpc collection create NAME --model MODEL`\n",
        ),
    ],
)
@pytest.mark.usefixtures("fake")
def test_an_empty_list_comes_with_a_hint(
    emberpc: Emberpc, monkeypatch: pytest.MonkeyPatch, method: str, command: list[str], hint: str
) -> None:
    monkeypatch.setattr(Client, method, lambda _: [])
    outcome = emberpc(*command)
    assert (outcome.code, outcome.err) == (0, hint)
    assert emberpc(*command, "--json").err == ""


@pytest.mark.usefixtures("fake")
def test_a_collection_that_exists_can_be_accepted(emberpc: Emberpc, monkeypatch: pytest.MonkeyPatch) -> None:
    error = AlreadyExists(collection_exists("notes").message)
    monkeypatch.setattr(Client, "create_collection", Mock(side_effect=error))
    outcome = emberpc("collection", "create", "notes")
    assert outcome.code == 5
    assert outcome.err == (
        "error: there is a collection 'notes' already; accept it with --exist-ok, delete it, or choose another name\n"
    )


def test_a_wrong_variable_of_the_environment_is_named(emberpc: Emberpc, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("LISTEN", "x"), ("LOG_LEVEL", "loud"), ("RECALL_PROBE", "2")):
        with monkeypatch.context() as patch:
            patch.setenv(f"EMBERPC_{name}", value)
            outcome = emberpc("config")
        assert outcome.code == 2
        assert outcome.err.endswith(f" (environment EMBERPC_{name})\n")
    assert "environment" not in emberpc("config", "--listen", "x").err


def test_the_hint_of_a_server_without_models_is_what_its_settings_allow(tmp_path: Path) -> None:
    models = tmp_path / "models"
    assert _remedy_without_models(Settings()) == "give --model NAME=DIR"
    assert _remedy_without_models(Settings(models_dir=models)) == ""  # the server refuses a missing folder
    models.mkdir()
    assert "emberpc models load" not in _remedy_without_models(Settings(models_dir=models))
    assert "emberpc models load" in _remedy_without_models(Settings(models_dir=models, model_admin=True))
    (models / "minilm").mkdir()
    assert _remedy_without_models(Settings(models_dir=models)) == ""


def test_one_item_is_in_the_singular() -> None:
    assert [counted(number, "hit") for number in (0, 1, 2)] == ["0 hits", "1 hit", "2 hits"]


def test_the_summary_says_on_which_texts_one_variant_was_measured(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from emberpc.bundle import read_bundle

    manifest = read_bundle(tiny_bundle).manifest
    show_bundle(manifest, tiny_bundle, as_json=False)
    assert f"the table was measured on {manifest.measured_on}\n" in capsys.readouterr().err


def test_the_hint_ignores_a_folder_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> Iterator[Path]:
        raise PermissionError

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert _remedy_without_models(Settings(models_dir=tmp_path)) == ""
