"""The commands `emberpc serve` and `emberpc config`, which run on the host of the server."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from emberpc.cli.errors import SERVER_PACKAGES, CliError, require
from emberpc.cli.options import AsJson, add_options, completer
from emberpc.cli.output import Column, note, print_json, print_table
from emberpc.server.settings import INDEX_BACKENDS, LOG_LEVELS, Settings, SettingsError
from emberpc.server.settings_sources import ENVIRONMENT_PREFIX, LoadedSettings, load_settings

#: The valid values of the settings that have few of them.
_CHOICES = {"index_backend": INDEX_BACKENDS, "log_level": LOG_LEVELS}


def _parameter(field: dataclasses.Field[Any], hint: Any) -> Parameter:
    """Return the command-line option of a setting, as a parameter of a command.

    The default of the option is None: the value of the setting is then that of the environment, of the configuration
    file, or its default.

    Args:
        field: the setting.
        hint: type of the setting. The parameter has this type, or list[str] for a tuple of strings, or is None.
    """
    several = hint == tuple[str, ...]
    shown = str(field.default).lower() if hint is bool else field.default
    default = "" if field.default in ((), None, "") else f"; default: {shown}"
    choices = _CHOICES.get(field.name, ())
    flag = f"--{field.name.replace('_', '-')}"
    option = typer.Option(
        f"{flag}/--no-{flag[2:]}" if hint is bool else flag,
        help=f"{field.metadata['help']} ({ENVIRONMENT_PREFIX}{field.name.upper()}{default})",
        metavar=field.metadata["form"] or "|".join(choices) or None,
        autocompletion=completer(choices) if choices else None,
        show_default=False,
    )
    return Parameter(
        field.name,
        Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[(list[str] if several else hint) | None, option],
    )


def _options() -> list[Parameter]:
    """Return the options of `serve` and `config`: one for each setting that is not secret, and --config."""
    hints = get_type_hints(Settings)
    flags = [field for field in dataclasses.fields(Settings) if not field.metadata["secret"]]
    config = typer.Option("--config", metavar="FILE", help=f"TOML file of settings. ({ENVIRONMENT_PREFIX}CONFIG)")
    return [
        *(_parameter(field, hints[field.name]) for field in flags),
        Parameter("config_file", Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[Path | None, config]),
    ]


def _with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command with the options of `_options` and those of `command`.

    It calls `command` with the loaded settings as first argument. The value of a setting comes from the first of these
    places that has one: option, environment, configuration file, default. The command raises CliError if a setting is
    wrong or the configuration file is invalid.
    """

    def run(options: dict[str, Any], values: dict[str, Any]) -> None:
        config_file = options.pop("config_file")
        try:
            loaded = load_settings(options, config_file=config_file, environ=os.environ)
        except SettingsError as error:
            raise CliError(str(error)) from error
        command(loaded, **values)

    return add_options(command, _options(), run)


@_with_settings
def serve(loaded: LoadedSettings) -> None:
    """Serve bundles and collections over gRPC until SIGTERM or Ctrl-C.

    A flag overrides the environment, and the environment overrides the file of
    --config. `emberpc config` shows which settings that gives.
    """
    extra, packages = SERVER_PACKAGES[loaded.settings.index_backend]
    require(packages, extra, "emberpc serve")
    from emberpc.server.errors import StartupError
    from emberpc.server.start import serve

    settings = loaded.settings
    if remedy := _remedy_without_models(settings):
        note(f"no model is served, so texts are neither embedded nor classified; {remedy}")
    try:
        serve(settings)
    except StartupError as error:
        raise CliError(str(error)) from error


def _remedy_without_models(settings: Settings) -> str:
    """Return what the user can do to serve a model if the server will start without one; otherwise an empty text."""
    folder = settings.models_dir
    if settings.model or settings.watch_models:
        return ""
    if folder is None:
        return "give --model NAME=DIR"
    try:
        if not folder.is_dir() or any(path.is_dir() for path in folder.iterdir()):
            return ""  # the server refuses a missing folder, and serves the bundles of another
    except OSError:
        return ""  # the server says which folder it cannot read
    load = ", or load one with `emberpc models load NAME PATH`" if settings.model_admin else ""
    return f"put a bundle into {folder} and start the server again{load}"


@_with_settings
def tune(loaded: LoadedSettings, as_json: AsJson = False) -> None:
    """Measure again which engine runs each model fastest on this host.

    The flags are those of `serve`. The results are stored in --data-dir, and a
    server uses them within a minute. The host should be idle.
    """
    extra, packages = SERVER_PACKAGES[loaded.settings.index_backend]
    require(packages, extra, "emberpc tune")
    from emberpc.bundle.cores import usable_cores
    from emberpc.server.errors import StartupError
    from emberpc.server.measure_models import measure_models

    settings, rows = loaded.settings, []
    if not settings.model and settings.models_dir is None:
        raise CliError("there is no model to measure; give --model NAME=DIR or --models-dir DIR")
    try:
        for name, choice in measure_models(settings, settings.workers or usable_cores()):
            rows.append({"model": name, **dataclasses.asdict(choice)})
            note(f"{name}: {choice.reason}")
    except StartupError as error:
        raise CliError(str(error)) from error
    if not rows:
        note("nothing was measured: the settings state engine, precision and size of micro-batches of every model")
    columns = ("model", "engine", "precision", "batch_tokens")
    if as_json:
        print_json(rows)
    elif rows:
        print_table([Column(name) for name in columns], [[row[name] for name in columns] for row in rows])


@_with_settings
def config(loaded: LoadedSettings, as_json: AsJson = False) -> None:
    """Show the settings that `emberpc serve` would use, and the source of each.

    The flags are those of `serve`.
    """
    fields = dataclasses.fields(Settings)
    names = [field.name for field in fields]
    values = {field.name: _shown(loaded.settings, field) for field in fields}
    if as_json:
        print_json({"setting": name, "value": values[name], "source": loaded.sources[name]} for name in names)
        return
    rows = [(name, ", ".join(v) if isinstance(v := values[name], list) else v, loaded.sources[name]) for name in names]
    print_table([Column("setting"), Column("value"), Column("source")], rows)


def _shown(settings: Settings, field: dataclasses.Field[Any]) -> Any:
    value = getattr(settings, field.name)
    if field.metadata["secret"]:
        return "(secret)" if value else ""
    if isinstance(value, tuple):
        return list(value)
    if value is None:
        return ""
    return str(value) if isinstance(value, Path) else value
