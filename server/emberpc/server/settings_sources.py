"""Read the server's settings from flags, environment variables and one TOML file.

The field `drain_seconds` has the flag `--drain-seconds`, the environment variable
`EMBERPC_DRAIN_SECONDS` and the TOML key `drain_seconds`. A flag overrides the variable,
the variable overrides the file, and the file overrides the default. Secrets have no flag.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from emberpc.server.settings import Settings, SettingsError

ENVIRONMENT_PREFIX = "EMBERPC_"
_BOOLS = {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}
#: Names of the types of settings, for error messages. The only other type is a list of strings.
_KINDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    Path: "a path",
    Path | None: "a path",
    str: "a string",
}


@dataclass(frozen=True)
class LoadedSettings:
    """Settings, and the source of each setting.

    Attributes:
        settings: the settings.
        sources: the source by field name: `default`, `flag`, `environment NAME` or `file PATH`.
    """

    settings: Settings
    sources: dict[str, str]


def load_settings(
    overrides: Mapping[str, object],
    *,
    config_file: Path | None = None,
    environ: Mapping[str, str] = os.environ,
) -> LoadedSettings:
    """Read the settings from flags, environment and TOML file, and validate them.

    Args:
        overrides: values of the flags by field name; None for a flag that was not given.
        config_file: the TOML file; None: the file that `EMBERPC_CONFIG` names in `environ`; no file if that is not set.
        environ: the environment variables. An empty one counts as a value; only an empty `EMBERPC_CONFIG` does not.

    Returns:
        The settings, and the source of each.

    Raises:
        SettingsError: a value is invalid or contradicts another, or the file is invalid, see `SettingsError`.
    """
    if config_file is None and environ.get(f"{ENVIRONMENT_PREFIX}CONFIG"):
        config_file = Path(environ[f"{ENVIRONMENT_PREFIX}CONFIG"])
    file_values = _read_toml(config_file) if config_file else {}
    hints = get_type_hints(Settings)
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for field in dataclasses.fields(Settings):
        variable = f"{ENVIRONMENT_PREFIX}{field.name.upper()}"
        given, source = overrides.get(field.name), "flag"
        if given is None and variable in environ:
            given, source = environ[variable], f"environment {variable}"
        if given is None and field.name in file_values:
            given, source = file_values[field.name], f"file {config_file}"
        if given is None:
            sources[field.name] = "default"
        else:
            values[field.name], sources[field.name] = _convert(field.name, hints[field.name], given, source), source
    try:
        return LoadedSettings(Settings(**values), sources)
    except SettingsError as error:
        source = sources.get(re.split("[ :]", str(error))[0], "default")
        raise SettingsError(str(error) if source in ("default", "flag") else f"{error} ({source})") from error


def _read_toml(path: Path) -> dict[str, Any]:
    # The import is here and not at the top: the command line always imports this module, but on Python 3.10 tomli is
    # installed only with the extra `server`.
    if sys.version_info >= (3, 11):
        import tomllib  # noqa: PLC0415
    else:
        import tomli as tomllib  # noqa: PLC0415

    try:
        with path.open("rb") as file:
            values = tomllib.load(file)
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}; check path and permissions") from error
    except (ValueError, RecursionError) as error:  # the decoder's errors, and bytes that are not UTF-8
        raise SettingsError(f"{path} is not TOML: {error}") from error
    known = [field.name for field in dataclasses.fields(Settings)]
    for key in values:
        if key not in known:
            raise SettingsError(f"{path}: there is no setting {key!r}; there are: {', '.join(known)}")
    return values


def _convert(name: str, hint: Any, value: object, source: str) -> Any:
    """Convert the value of a flag, an environment variable or a TOML key to the type of a setting.

    Args:
        name: name of the setting.
        hint: type of the setting.
        value: the value. A string for a list has commas between the items. Empty items are dropped. For a bool: `true`,
            `yes`, 1, `false`, `no` or 0.
        source: source of the value, for the error.

    Raises:
        SettingsError: the value cannot be converted to that type, for example 1.9 or an empty path.
    """
    if hint in (int, float) and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        try:
            number = hint(value)
        except (ValueError, OverflowError):
            pass
        else:
            if hint is float or isinstance(value, str) or number == value:  # `int` cuts 1.9 of a TOML file to 1
                return number
    elif hint is bool and (isinstance(value, bool) or str(value).lower() in _BOOLS):
        return _BOOLS[str(value).lower()]
    elif hint in (Path, Path | None) and isinstance(value, (str, Path)) and str(value):  # "" would be "."
        return Path(value)
    elif hint is str and isinstance(value, str):
        return value
    elif hint == tuple[str, ...]:
        items = value.split(",") if isinstance(value, str) else value
        if isinstance(items, (list, tuple)) and all(isinstance(item, str) for item in items):
            return tuple(item.strip() for item in items if item.strip())
    raise SettingsError(f"{name} is {value!r} ({source}); it must be {_KINDS.get(hint, 'a list of strings')}")
