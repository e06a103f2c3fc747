"""The commands `emberpc collection backup` and `restore`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from emberpc.cli.connection import with_client
from emberpc.cli.errors import CliError
from emberpc.cli.options import AsJson, Name, Overwrite
from emberpc.cli.output import note, print_fields, print_json
from emberpc.cli.output_files import check_output_path
from emberpc.cli.progress import Stages, stages
from emberpc.client import Client

_MEGABYTE = 10**6


@with_client
def backup(
    client: Client,
    name: Name,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The file to write.")],
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write a backup of one state of a collection to one file. Reads and writes continue meanwhile."""
    target = check_output_path(output, overwrite)
    with stages() as show:
        try:
            size = client.backup_collection(name, output, progress=_megabytes(show, "backing up (MB)"))
        except OSError as error:
            raise CliError(f"--output: {output} cannot be written: {error.strerror}") from error
    if target.is_stream:
        # The device or pipe may be stdout, which must have nothing but the backup. So the size goes to stderr.
        note(f"wrote {size} bytes to {output}")
    elif as_json:
        print_json([{"file": output, "bytes": size}])
    else:
        print_fields({"file": output, "bytes": size})


@with_client
def restore(
    client: Client,
    name: Name,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file that `collection backup` wrote.")],
    as_json: AsJson = False,
) -> None:
    """Create a collection from a backup file, and show it. If the server refuses the file, no collection is created."""
    with stages() as show:
        try:
            collection = client.restore_collection(name, file, progress=_megabytes(show, "restoring (MB)"))
        except OSError as error:
            raise CliError(f"{file} cannot be read: {error.strerror}; check path and permissions") from error
    if as_json:
        print_json([collection])
    else:
        print_fields(vars(collection))


def _megabytes(show: Stages, stage: str) -> Callable[[int, int], None]:
    return lambda done, total: show(stage, done // _MEGABYTE, total // _MEGABYTE)
