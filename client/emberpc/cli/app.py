"""The command line as a whole: its commands, and what becomes of their errors."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from contextvars import ContextVar
from importlib.metadata import version
from typing import Annotated

import typer

from emberpc.cli import collections, compare, export, finetune, models, output, records, server, texts
from emberpc.cli.errors import ExitCode, exit_code

_EPILOG = (
    "Exit codes: 0 done; 1 unexpected; 2 wrong usage or input; 3 no server, or no answer in time; 4 not found; "
    "5 conflict; 6 refused; 7 verification failed; 130 interrupted."
)

#: Whether errors are shown with their traceback.
_debug: ContextVar[bool] = ContextVar("debug", default=False)

app = typer.Typer(
    name="emberpc",
    help="Embeddings, vector search and classification over gRPC, on plain CPUs.",
    epilog=_EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_MAKING, _SERVING, _ASKING = "Make a model", "On the server's host", "Ask a server"
export.app.command("finetune-embedding")(finetune.finetune_embedding)
app.add_typer(export.app, name="export", rich_help_panel=_MAKING)
app.command(rich_help_panel=_MAKING)(compare.compare)
app.command(rich_help_panel=_MAKING)(export.verify)
app.command(rich_help_panel=_SERVING)(server.serve)
app.command(rich_help_panel=_SERVING)(server.config)
app.command(rich_help_panel=_ASKING)(models.health)
app.add_typer(models.app, name="models", rich_help_panel=_ASKING)
app.command(rich_help_panel=_ASKING)(texts.embed)
app.command("count-tokens", rich_help_panel=_ASKING)(texts.count_tokens)
app.command(rich_help_panel=_ASKING)(texts.similarity)
app.command(rich_help_panel=_ASKING)(texts.classify)
app.add_typer(collections.app, name="collection", rich_help_panel=_ASKING)
app.command(rich_help_panel=_ASKING)(records.upsert)
app.command(rich_help_panel=_ASKING)(records.get)
app.command(rich_help_panel=_ASKING)(records.delete)
app.command(rich_help_panel=_ASKING)(records.search)


def _print_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"emberpc {version('emberpc')}\n")
        raise typer.Exit


@app.callback()
def _every_command(
    debug: Annotated[
        bool, typer.Option("--debug", envvar="EMBERPC_DEBUG", help="Show errors with their traceback.")
    ] = False,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    _debug.set(debug)


def run(arguments: Sequence[str]) -> int:
    """Run a command; return its exit code."""
    _debug.set(False)
    try:
        # Not standalone: Typer then leaves errors and the exit to this function.
        code = int(app(list(arguments), prog_name="emberpc", standalone_mode=False) or 0)
        return code or _flushed()
    except typer.TyperException as error:
        # Of an error in usage, Typer tells which command it was.
        command = getattr(getattr(error, "ctx", None), "command_path", "emberpc")
        message = error.format_message().rstrip(".")
        # Without one, nothing was asked for, and the help was shown instead.
        return _failed(f"{message}; see {command} --help", ExitCode.INPUT) if message else ExitCode.INPUT
    except Exception as error:  # the one place where an error of any kind becomes a line for the user
        if _is_of_an_interrupt(error):
            return ExitCode.INTERRUPTED
        known = exit_code(error)
        if known is None:
            return _failed(f"emberpc made an error ({type(error).__name__}); see it with --debug", ExitCode.INTERNAL)
        return _failed(str(error), known)


def _is_of_an_interrupt(error: BaseException | None) -> bool:
    """Whether Ctrl-C led to an error: it can end a library between two of its steps, which then raises another."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _flushed() -> int:
    try:
        output.flush()
    except typer.Exit as pipe_closed:
        return pipe_closed.exit_code
    return ExitCode.OK


def _failed(message: str, code: ExitCode) -> int:
    if _debug.get():
        sys.stderr.write(traceback.format_exc())
    output.note(f"error: {message}")
    return code
