"""What the command line says of an error, and with which code it exits."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from importlib.util import find_spec


class ExitCode(IntEnum):
    """What the exit codes mean; the table is in `emberpc.cli.main`."""

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
    """A command cannot do its work; the message is for its user."""

    def __init__(self, message: str, code: ExitCode = ExitCode.INPUT) -> None:
        super().__init__(message)
        self.code = code


#: What the packages of each extra are imported as, or of the part of it that a command needs.
SERVER_PACKAGES = ("onnxruntime", "tokenizers", "hnswlib", "threadpoolctl", "grpc_health", "grpc_reflection")
VERIFY_PACKAGES = ("onnxruntime", "tokenizers")
MAP_PACKAGES = ("sklearn",)
EXPORT_PACKAGES = (
    *("torch", "transformers", "optimum", "onnx", "onnxruntime"),
    *("tokenizers", "sentence_transformers", "sklearn", "matplotlib", "jinja2", "hnswlib"),
)


def exit_code(error: Exception) -> ExitCode | None:
    """Return the code for an error that is told in one line; None for one that is a fault of the program."""
    if isinstance(error, CliError):
        return error.code
    from emberpc import client  # which the commands of the host do without

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
    """Return how to install an extra: from a checkout of the repository, or by the name that it is published under."""
    in_checkout = f"pip install '.[{extra}]'"
    if extra == "export":
        # Without the constraints, pip takes another PyTorch, with gigabytes of CUDA.
        in_checkout = f"pip install torch '.[{extra}]' -c constraints.txt"
    return f"run, in a checkout: {in_checkout}; or, once it is published: pip install 'emberpc[{extra}]'"


def require(packages: Sequence[str], extra: str, command: str) -> None:
    """Make sure that a command's packages are installed, before it starts on its work; they are not imported.

    Args:
        packages: what it needs.
        extra: the extra that they come with.
        command: what needs them, such as `emberpc serve`.

    Raises:
        CliError: one is missing; the message says how to install it.
    """
    for package in packages:
        if find_spec(package) is None:
            raise CliError(f"`{command}` needs {package}, which is not installed; {how_to_install(extra)}")
