"""The program `emberpc`.

What its exit codes mean:

| code | meaning |
|---|---|
| 0 | done |
| 1 | something unexpected: the server made an error, or this program did |
| 2 | wrong usage or wrong input: an argument, a file, a setting; or a part of emberpc that is not installed |
| 3 | no server answers, it is not ready, or it did not answer in time |
| 4 | there is no such thing: a model, a collection, a record |
| 5 | conflict: it exists already, or things are not in the state that this needs |
| 6 | refused: who you are, what you may, or the server is full |
| 7 | verification failed |
| 130 | interrupted |

Results go to stdout and everything else to stderr: one line, `error: …`, for
what went wrong.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
from collections.abc import Sequence

from emberpc.cli.errors import how_to_install


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: what follows the program's name; None: those that it was started with.

    Returns:
        The exit code.
    """
    _open_standard_streams()
    gc.disable()  # imports make much, and nothing of it is garbage
    try:
        return _run(sys.argv[1:] if arguments is None else arguments)
    finally:
        gc.enable()


def _open_standard_streams() -> None:
    """Open those of stdin, stdout and stderr that were closed, so that no socket or file takes their numbers.

    Reading such a stdin, or writing to such a stdout, fails as on a closed file. What goes to such a stderr is lost.
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
    # It says how gRPC shall treat forks, which grpc reads when it is imported; the client imports it first.
    importlib.import_module("emberpc.server")

    try:
        from emberpc.cli.app import run
    except ModuleNotFoundError as error:
        # The base install is the client alone; then this module is all of the command line that can be imported.
        package = (error.name or "").partition(".")[0]
        if package not in ("typer", "rich"):
            raise
        sys.stderr.write(f"error: the command line needs {package}, which is not installed; {how_to_install('cli')}\n")
        return 2
    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
