"""Build the command line from its commands, run it, and turn errors into exit codes."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Annotated, cast

import typer

# Typer has no public function that installs or returns the completion for a given shell, so this imports a private
# module.
from typer._completion_shared import Shells, get_completion_script, install
from typer.core import TyperGroup

from emberpc.cli import output
from emberpc.cli.error_messages import in_cli_terms
from emberpc.cli.errors import CliError, ExitCode, exit_code
from emberpc.cli.options import OnceCommand

_EPILOG = (
    "Exit codes: 0 done; 1 unexpected; 2 wrong usage or input; 3 no server, or no response in time; 4 not found; "
    "5 conflict; 6 refused; 7 verification failed; 130 interrupted."
)

#: Options that other programs have for the address of a server. The error for one of them names the right option.
_ADDRESS_OPTIONS = ("--server", "--host", "--address", "--addr", "--port", "--url", "--endpoint")
_PROGRAM, _COMPLETE = "emberpc", "_EMBERPC_COMPLETE"
#: Whether errors are shown with their traceback: --debug is given, or EMBERPC_DEBUG is true.
_debug: ContextVar[bool] = ContextVar("debug", default=False)


@dataclass(frozen=True)
class _Command:
    """A command or a group of commands.

    `panel` is the title of the panel that shows the command in the help. The module `emberpc.cli.{module}` has the
    function of the command, or the Typer app of the group, as `attribute`.
    """

    panel: str
    module: str
    attribute: str


_MAKING, _SERVING, _ASKING = "Make a model", "On the server's host", "Ask a server"
_COMMANDS = {
    "export": _Command(_MAKING, "finetune", "app"),
    "compare": _Command(_MAKING, "compare", "compare"),
    "verify": _Command(_MAKING, "export", "verify"),
    "serve": _Command(_SERVING, "server", "serve"),
    "config": _Command(_SERVING, "server", "config"),
    "tune": _Command(_SERVING, "server", "tune"),
    "health": _Command(_ASKING, "models", "health"),
    "info": _Command(_ASKING, "models", "info"),
    "models": _Command(_ASKING, "models", "app"),
    "embed": _Command(_ASKING, "texts", "embed"),
    "count-tokens": _Command(_ASKING, "texts", "count_tokens"),
    "similarity": _Command(_ASKING, "texts", "similarity"),
    "classify": _Command(_ASKING, "texts", "classify"),
    "collection": _Command(_ASKING, "collections", "app"),
    "upsert": _Command(_ASKING, "records", "upsert"),
    "get": _Command(_ASKING, "records", "get"),
    "delete": _Command(_ASKING, "records", "delete"),
    "search": _Command(_ASKING, "records", "search"),
}


@cache
def program(*names: str) -> TyperGroup:
    """Return `emberpc` with the commands `names`, keys of `_COMMANDS`, or with all commands if there are no names.

    The first call for the same names imports the modules of the commands; later calls return the same object.
    """
    app = typer.Typer(
        name="emberpc",
        help="Embeddings, vector search and classification over gRPC, on plain CPUs.",
        epilog=_EPILOG,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
    )
    app.callback()(_every_command)
    for name in names or _COMMANDS:
        command = _COMMANDS[name]
        found = getattr(import_module(f"emberpc.cli.{command.module}"), command.attribute)
        if isinstance(found, typer.Typer):
            for registered in found.registered_commands:
                registered.cls = OnceCommand
            app.add_typer(found, name=name, rich_help_panel=command.panel)
        else:
            app.command(name, cls=OnceCommand, rich_help_panel=command.panel)(found)
    return cast(TyperGroup, typer.main.get_command(app))  # a group, since the app has a callback


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version  # importing this takes as long as a short command

        output.print_lines([f"emberpc {version('emberpc')}"])
        raise typer.Exit


def _every_command(
    debug: Annotated[
        bool, typer.Option("--debug", envvar="EMBERPC_DEBUG", help="Show errors with their traceback.")
    ] = False,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    _debug.set(debug)
    gc.enable()  # `main` disabled it during the imports


def run(arguments: Sequence[str]) -> int:
    """Run the command that `arguments`, without the program name, state, and return the exit code.

    Errors are printed to stderr, but not an exception with KeyboardInterrupt among its causes.

    Raises:
        KeyboardInterrupt: the user pressed Ctrl-C, also if a library then raised an error of its own.
    """
    arguments = _debug_first(arguments)
    _debug.set(arguments[:1] == ["--debug"])  # the callback also reads EMBERPC_DEBUG, but runs after --help
    try:
        if (completion := _completion(arguments)) is not None:
            return completion
        # In standalone mode, Typer would print errors and exit. `run` prints errors in its own form, and returns.
        code = int(_program_for(arguments)(arguments, prog_name=_PROGRAM, standalone_mode=False) or 0)
        if code != ExitCode.INTERRUPTED:
            return code or _flush() or ExitCode.OK
    except SystemExit as error:
        # Rich raises SystemExit if the reader of the help closed the pipe. That is no error.
        if isinstance(error.__context__, BrokenPipeError):
            return ExitCode.OK
        raise
    except typer.TyperException as error:
        # A usage error of Typer has the context of the command, with the command's name. Another TyperException has no
        # context; its message refers to the help of `emberpc`.
        command = getattr(getattr(error, "ctx", None), "command_path", "emberpc")
        message = error.format_message().rstrip(".").replace("Value error, ", "")
        if address := _address_option(error):
            # Typer appends similar option names, in parentheses. They are removed, since they have other meanings.
            message = f"{message.partition(' (')[0]}; the address of the server is {address} HOST:PORT"
        # A message may end with a question, such as "Did you mean …?". An empty message means that the command had no
        # arguments, and Typer printed the help; then no error is printed.
        separator = " See" if message.endswith("?") else "; see"
        return _failed(f"{message}{separator} {command} --help", ExitCode.INPUT) if message else ExitCode.INPUT
    except Exception as error:  # the only place that turns errors of all kinds into a line for the user
        if _is_of_an_interrupt(error):
            raise KeyboardInterrupt from error
        known = exit_code(error)
        if known is None and isinstance(error, OSError) and _is_of_the_help(error):
            unwritable = output.discard_stdout(error)
            return _failed(str(unwritable), unwritable.code)
        if known is None:
            return _failed(f"emberpc made an error ({type(error).__name__}); see it with --debug", ExitCode.INTERNAL)
        return _failed(in_cli_terms(str(error)), known)
    raise KeyboardInterrupt  # Typer returned the exit code instead


def _address_option(error: typer.TyperException) -> str:
    """Return the option for an address, if `error` is about an option of `_ADDRESS_OPTIONS`.

    The option is `--target` if the command has it, else `--listen` if the command has that. Otherwise the result is
    empty.
    """
    if getattr(error, "option_name", None) not in _ADDRESS_OPTIONS:
        return ""
    names = {name for parameter in error.ctx.command.params for name in parameter.opts}  # type: ignore[attr-defined]
    return next((name for name in ("--target", "--listen") if name in names), "")


def _completion(arguments: Sequence[str]) -> int | None:
    """Install or show the completion for the shell that the arguments name, and return the exit code.

    An unknown shell is an error, which is printed. None: the arguments are not --install-completion or
    --show-completion with a value. Without a value, Typer itself handles these options: it detects the present shell.

    Raises:
        OSError, subprocess.CalledProcessError: the completion cannot be installed.
        CliError, typer.Exit: the script cannot be written to stdout, or the reader closed the pipe.
    """
    option, _, shell = " ".join(arguments).replace("=", " ", 1).partition(" ")
    if option not in ("--install-completion", "--show-completion") or not shell:
        return None
    if shell not in [each.value for each in Shells]:
        known = ", ".join(each.value for each in Shells)
        return _failed(f"there is no completion for the shell {shell!r}; give one of {known}", ExitCode.INPUT)
    if option == "--show-completion":
        output.print_script(get_completion_script(prog_name=_PROGRAM, complete_var=_COMPLETE, shell=shell))
    else:
        try:
            _, path = install(shell, _PROGRAM, _COMPLETE)
        except OSError as error:
            reason = f"{error.strerror} ({error.filename})"
            return _failed(
                f"the completion cannot be installed: {reason}; write the output of --show-completion "
                "to a file of your shell instead",
                ExitCode.INPUT,
            )
        output.print_lines([f"{shell} completion installed in {path}; it works after you open a new terminal"])
    return _flush() or ExitCode.OK


def _debug_first(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with --debug at the start, where Typer accepts it, if it occurs before the first `--`.

    All other occurrences before the first `--` are removed. Arguments after that stay as they are.
    """
    options = list(arguments[: arguments.index("--")] if "--" in arguments else arguments)
    rest = list(arguments[len(options) :])
    kept = [argument for argument in options if argument != "--debug"]
    return [*(["--debug"] if len(kept) < len(options) else []), *kept, *rest]


def _program_for(arguments: Sequence[str]) -> TyperGroup:
    """Return `emberpc` with only the command that the arguments name, since importing the other commands is slow.

    The command is the first argument other than --debug. If that is not a command, the program has all commands.
    """
    named = next((argument for argument in arguments if argument != "--debug"), "")
    return program(named) if named in _COMMANDS else program()


def _is_of_an_interrupt(error: BaseException | None) -> bool:
    """Return whether an error, or one in its chain of causes, is a KeyboardInterrupt; False for None.

    A library that Ctrl-C interrupts may raise an error of its own.
    """
    seen = set[int]()  # the chain of causes can have a cycle if a library raises an error again
    while error is not None and not isinstance(error, KeyboardInterrupt) and id(error) not in seen:
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return isinstance(error, KeyboardInterrupt)


def _is_of_the_help(error: OSError) -> bool:
    """Return whether code of Typer or Rich raised the error: the innermost Python function is theirs.

    They write the help to stdout without the module `output`, so `run` takes such an error for one of writing the help.
    """
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).partition(".")[0] in ("rich", "typer")


def _flush() -> int | None:
    """Flush stdout. Return None if that succeeded, 0 if the reader closed the pipe.

    If stdout cannot be written otherwise, print the error, and return its exit code.
    """
    try:
        output.flush()
    except typer.Exit as pipe_closed:
        return pipe_closed.exit_code
    except CliError as error:
        return _failed(str(error), error.code)
    return None


def _failed(message: str, code: ExitCode) -> int:
    if _debug.get():
        output.write_stderr(traceback.format_exc())
    output.note(f"error: {message}")
    return code
