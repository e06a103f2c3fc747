"""The program `emberpc`.

Exit codes:

| code | meaning |
|---|---|
| 0 | done |
| 1 | unexpected: error of the server or this program, damaged data, missing function; or a deletion was not confirmed |
| 2 | wrong usage or input: an argument, a file or a setting; a failed export; a package that is not installed |
| 3 | no server answers, the server is not ready, or it did not answer in time |
| 4 | not found: a model, a collection, a record or a service |
| 5 | conflict: the item exists already, or is not in the required state |
| 6 | refused: authentication or permission failed, or a limit of the server is reached |
| 7 | verification failed |
| 130 | interrupted |

Results and help go to stdout, everything else to stderr. The error that ends a command is one line, `error: …`. With
--debug, the traceback comes before the line.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
from collections.abc import Sequence
from contextlib import suppress

from emberpc.cli.errors import ExitCode, how_to_install
from emberpc.cli.interrupts import handle_interrupts


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the arguments state, and return the exit code. Errors are printed to stderr.

    Args:
        arguments: the arguments after the program name; None: those of this process.
    """
    _open_standard_streams()
    gc.disable()  # imports create many objects and no garbage, so collecting would only cost time
    try:
        with handle_interrupts():
            return _run(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:
        with suppress(OSError, ValueError, KeyboardInterrupt):  # stderr is closed, or Ctrl-C is pressed once more
            sys.stderr.write("interrupted\n")
            sys.stderr.flush()
        return ExitCode.INTERRUPTED
    finally:
        gc.enable()


def _open_standard_streams() -> None:
    """Reopen each of stdin, stdout and stderr that was closed when the process started.

    Otherwise a socket or a file could get the descriptor. Reading a reopened stdin and writing to a reopened stdout
    raise OSError, as a closed descriptor does. A reopened stderr discards its output.
    """
    for number, name, flags, mode in (
        (0, "stdin", os.O_WRONLY, "r"),
        (1, "stdout", os.O_RDONLY, "w"),
        (2, "stderr", os.O_WRONLY, "w"),
    ):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, flags)
            if descriptor != number:
                os.dup2(descriptor, number)
                os.close(descriptor)
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))


def _run(arguments: Sequence[str]) -> int:
    # `emberpc.server` sets environment variables, such as how gRPC treats forks. grpc reads them when it is imported,
    # so this import comes before that of the client, which imports grpc.
    importlib.import_module("emberpc.server")

    try:
        from emberpc.cli.app import run
    except ModuleNotFoundError as error:
        # The base install has only what the client needs. Without the extra [cli], importing `app` fails.
        package = (error.name or "").partition(".")[0]
        if package not in ("typer", "rich"):
            raise
        sys.stderr.write(f"error: the command line needs {package}, which is not installed; {how_to_install('cli')}\n")
        return 2
    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
