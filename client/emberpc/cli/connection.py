"""Options of the commands that call a server, such as --target and --token, and the client made from these options."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from emberpc.cli.error_messages import in_cli_terms
from emberpc.cli.errors import CliError, ExitCode, exit_code
from emberpc.cli.options import add_options
from emberpc.cli.output import note
from emberpc.client import TLS, Client, EmberpcError, FilterWarning
from emberpc.client._core.connection import is_local, is_url

_PANEL = "Connection"

_OPTIONS = [
    Parameter(
        "target",
        Parameter.KEYWORD_ONLY,
        default="localhost:50051",
        annotation=Annotated[
            str,
            typer.Option(envvar="EMBERPC_TARGET", metavar="HOST:PORT", help="The server.", rich_help_panel=_PANEL),
        ],
    ),
    Parameter(
        "timeout",
        Parameter.KEYWORD_ONLY,
        default=30.0,
        annotation=Annotated[
            float, typer.Option(metavar="SECONDS", help="Time limit of a request.", rich_help_panel=_PANEL)
        ],
    ),
    Parameter(
        "token",
        Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[
            str | None,
            typer.Option(
                envvar="EMBERPC_TOKEN",
                metavar="TOKEN",
                help="Bearer token. Other users of this host can see an option, so prefer the variable.",
                rich_help_panel=_PANEL,
            ),
        ],
    ),
    Parameter(
        "tls_ca",
        Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[
            Path | None,
            typer.Option(
                metavar="FILE",
                help="Encrypt the connection; PEM file with the CA certificates that verify the server.",
                rich_help_panel=_PANEL,
            ),
        ],
    ),
]


def with_client(command: Callable[..., None]) -> Callable[..., None]:
    """Return a function for Typer, with the options of `command` and the connection options.

    The function creates a client from the connection options, calls `command` with the client as the first argument and
    with the other options, and closes the client.
    Meanwhile `_filter_warnings` prints warnings about filters, and if the option --batch-size has a
    value, `_batch_remedy` changes errors. Errors of `connect` are raised.
    """

    def run(options: dict[str, Any], values: dict[str, Any]) -> None:
        with connect(**options) as client, _filter_warnings(), _batch_remedy(values.get("batch_size") is not None):
            command(client, **values)

    return add_options(command, _OPTIONS, run)


@contextmanager
def _batch_remedy(has_batches: bool) -> Iterator[None]:
    """Context manager that names --batch-size as a remedy in an EmberpcError of its block.

    An error whose message has the remedy to send less becomes a CliError with the same exit code. Other errors do not
    change, and none does unless `has_batches`: the option --batch-size has a value.
    """
    try:
        yield
    except EmberpcError as error:
        message = in_cli_terms(str(error), batches=has_batches)
        if message == in_cli_terms(str(error)):
            raise
        raise CliError(message, exit_code(error) or ExitCode.INTERNAL) from error


@contextmanager
def _filter_warnings() -> Iterator[None]:
    """Context manager that prints each FilterWarning of its block to stderr as one line, `warning: …`.

    Other warnings are shown as usual.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("always", FilterWarning)
        usual = warnings.showwarning

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if issubclass(category, FilterWarning):
                note(f"warning: {message}")
            else:
                usual(message, category, filename, lineno, file, line)

        warnings.showwarning = show
        yield


def connect(target: str, timeout: float, token: str | None, tls_ca: Path | None) -> Client:
    """Create a client from the values of the connection options. Nothing is sent yet.

    Args:
        target: HOST:PORT, or another target of gRPC such as `unix:PATH`; HOST alone: port 50051.
        timeout: seconds that one request may take, unless a method states another timeout.
        token: bearer token; None or empty: none.
        tls_ca: PEM file of the certificates that may sign the server's certificate; None: no encryption.

    Raises:
        CliError: the target is a URL, the token would be sent to another host unencrypted, or the certificate file
            cannot be read.
        InputError: the target is empty, the timeout is out of range, or the token has invalid characters.
    """
    if is_url(target):
        raise CliError(f"--target is {target!r}; give HOST:PORT alone, and --tls-ca FILE for an encrypted connection")
    if token and tls_ca is None and not is_local(target):
        raise CliError(f"the token would travel to {target} in plain text; give --tls-ca FILE, or connect to this host")
    try:
        tls = TLS.from_files(tls_ca) if tls_ca else None
    except OSError as error:
        raise CliError(f"--tls-ca: {tls_ca} cannot be read: {error.strerror}; check path and permissions") from error
    return Client(target, timeout=timeout, tls=tls, token=token or None)
