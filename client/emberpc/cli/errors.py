"""Exit codes, the error that a command reports to the user, and checks that optional packages are installed."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from importlib.util import find_spec


class ExitCode(IntEnum):
    """Exit codes of the program `emberpc`; the docstring of `emberpc.cli.main` has a table of their meanings."""

    OK = 0
    INTERNAL = 1
    INPUT = 2
    UNAVAILABLE = 3
    NOT_FOUND = 4
    CONFLICT = 5
    REFUSED = 6
    UNVERIFIED = 7
    INTERRUPTED = 130


class CliError(Exception):
    """A command failed. The message is for the user. `code` is the exit code of the program, by default INPUT."""

    def __init__(self, message: str, code: ExitCode = ExitCode.INPUT) -> None:
        super().__init__(message)
        self.code = code


_SERVER = ("onnxruntime", "tokenizers", "threadpoolctl", "grpc_health", "grpc_reflection")
#: Import names of the packages that `serve` needs beside the base install and the extra [cli], by index backend, after
#: the extra that installs them.
SERVER_PACKAGES = {"embedded": ("server", (*_SERVER, "hnswlib")), "milvus": ("milvus", (*_SERVER, "pymilvus"))}
#: Import names of the packages that `verify` needs; with --against it needs EXPORT_PACKAGES too.
VERIFY_PACKAGES = ("onnxruntime", "tokenizers")
#: Import names of the packages that `collection map` needs.
MAP_PACKAGES = ("sklearn",)
#: Import names of the packages that `export`, `compare` and `verify --against` need.
EXPORT_PACKAGES = (
    *("torch", "transformers", "optimum", "onnx", "onnxruntime"),
    *("tokenizers", "sentence_transformers", "sklearn", "threadpoolctl", "matplotlib", "jinja2", "hnswlib"),
)


def exit_code(error: Exception) -> ExitCode | None:
    """Return the exit code of a CliError or an error of the client; None for other errors, which are not expected."""
    if isinstance(error, CliError):
        return error.code
    from emberpc import client  # late: commands without a server do not need the client

    codes = {
        client.InvalidArgument: ExitCode.INPUT,
        client.InputError: ExitCode.INPUT,
        client.InputTypeError: ExitCode.INPUT,
        client.Unavailable: ExitCode.UNAVAILABLE,
        client.DeadlineExceeded: ExitCode.UNAVAILABLE,
        client.NotFound: ExitCode.NOT_FOUND,
        client.AlreadyExists: ExitCode.CONFLICT,
        client.FailedPrecondition: ExitCode.CONFLICT,
        client.Aborted: ExitCode.CONFLICT,
        client.Unauthenticated: ExitCode.REFUSED,
        client.PermissionDenied: ExitCode.REFUSED,
        client.ResourceExhausted: ExitCode.REFUSED,
        client.EmberpcError: ExitCode.INTERNAL,
    }
    return next((code for kind, code in codes.items() if isinstance(error, kind)), None)


def how_to_install(extra: str) -> str:
    """Return instructions to install an extra, such as `cli`, from a checkout or from a package index."""
    in_checkout = f"pip install '.[{extra}]'"
    if extra == "export":
        # Without the constraints, pip compares versions for minutes.
        in_checkout = f"pip install torch '.[{extra}]' -c constraints.txt"
    return f"run, in a checkout: {in_checkout}; or, once it is published: pip install 'emberpc[{extra}]'"


def require(packages: Sequence[str], extra: str, command: str) -> None:
    """Check that the packages of a command are installed, without importing them.

    Args:
        packages: import names of the packages.
        extra: the extra that installs them.
        command: the command that needs them, such as `emberpc serve`.

    Raises:
        CliError: a package is missing; the message names the first one, and says how to install the extra.
    """
    for package in packages:
        if find_spec(package) is None:
            raise CliError(f"`{command}` needs {package}, which is not installed; {how_to_install(extra)}")
