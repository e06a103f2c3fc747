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
from emberpc.cli.options import AsJson, add_options
from emberpc.cli.output import Column, note, print_json, print_table
from emberpc.server.settings import ENVIRONMENT_PREFIX, LoadedSettings, Settings, SettingsError, load_settings


def _parameter(field: dataclasses.Field[Any], hint: Any) -> Parameter:
    """Return the option of a setting. Its default is None, so that environment and file apply if it is not given."""
    several = hint == tuple[str, ...]
    shown = str(field.default).lower() if hint is bool else field.default
    default = "" if field.default in ((), None) else f"; default: {shown}"
    flag = f"--{field.name.replace('_', '-')}"
    option = typer.Option(
        f"{flag}/--no-{flag[2:]}" if hint is bool else flag,
        help=f"{field.metadata['help']} ({ENVIRONMENT_PREFIX}{field.name.upper()}{default})",
        metavar=field.metadata["form"] or None,
        show_default=False,
        # Their second names (--no-…) would take the width that the help of the other options needs.
        rich_help_panel="Switches" if hint is bool else None,
    )
    return Parameter(
        field.name,
        Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[(list[str] if several else hint) | None, option],
    )


def _options() -> list[Parameter]:
    """Return an option for each setting, and --config."""
    hints = get_type_hints(Settings)
    flags = [field for field in dataclasses.fields(Settings) if not field.metadata["secret"]]
    config = typer.Option("--config", metavar="FILE", help=f"TOML file of settings. ({ENVIRONMENT_PREFIX}CONFIG)")
    return [
        *(_parameter(field, hints[field.name]) for field in flags),
        Parameter("config_file", Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[Path | None, config]),
    ]


def _with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of the settings to a command, and pass it the settings loaded from them, environment and file."""

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

    A flag overrides the environment, and the environment overrides the file;
    `emberpc config` shows the outcome.
    """
    require(SERVER_PACKAGES, "server", "emberpc serve")
    from emberpc.server.errors import StartupError
    from emberpc.server.start import serve

    settings = loaded.settings
    if not settings.model and not settings.watch_models:
        remedy = "give --model NAME=DIR"
        if settings.models_dir is not None:
            remedy = "load one with `emberpc models load NAME PATH`"
        note(f"no model is served, so texts are neither embedded nor classified; {remedy}")
    try:
        serve(settings)
    except StartupError as error:
        raise CliError(str(error)) from error


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
