"""The command `emberpc collection map`."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from emberpc.cli.connection import with_client
from emberpc.cli.errors import MAP_PACKAGES, CliError, ExitCode, require
from emberpc.cli.options import Where
from emberpc.cli.output import note, stages
from emberpc.client import Client

#: Records that are laid out within half a minute on two cores.
_LIMIT = 10_000


@with_client
def draw_map(
    client: Client,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the collection.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The page, such as map.html.")],
    color_by: Annotated[
        str | None,
        typer.Option(
            metavar="FIELD",
            help="Metadata field that colours the points; default: their labels, or clusters if there are none.",
            show_default=False,
        ),
    ] = None,
    clusters: Annotated[
        int, typer.Option(min=0, max=200, help="Colour by so many clusters, named by their words; 0: see --color-by.")
    ] = 0,
    limit: Annotated[
        int, typer.Option(min=0, help="Most records; of more, the same sample each time; 0: all.")
    ] = _LIMIT,
    where: Where = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
) -> None:
    """Draw a map of a collection, where like records lie together: one HTML file to open in a browser."""
    require(MAP_PACKAGES, "map", "emberpc collection map")
    _check_place(output, overwrite)
    if color_by is not None and clusters:
        raise CliError("give --color-by or --clusters; one of the two")
    from emberpc.cli.maps import colours, groups, layout, page, sample

    distance = client.get_collection(name).distance
    with stages() as tell:
        found = sample.read_sample(client, name, where, limit, tell)
        if not found.records:
            which = "no records that match the filter" if where else "no records yet; write some with `emberpc upsert`"
            raise CliError(f"{name!r} holds {which}", ExitCode.NOT_FOUND)
        if color_by is not None:
            groups.require_field(found.records, color_by)
        tell("laying them out", 0, 1)
        vectors = np.stack([record.vector for record in found.records if record.vector is not None])
        laid_out = layout.lay_out(vectors, distance)
        grouping = groups.group(found.records, laid_out.places, color_by, clusters)
        drawing = page.Drawing(
            collection=name,
            where=where or "",
            total=found.total,
            made=f"{datetime.now(timezone.utc):%Y-%m-%d}",
            records=found.records,
            layout=laid_out,
            grouping=grouping,
            looks=colours.looks(grouping, laid_out.places),
        )
        page.write(page.render(drawing), output)
    count = len(found.records)
    if count < found.total:
        note(f"{output} shows {count:,} of {found.total:,} records; --limit 0 shows all")
    else:
        note(f"{output} shows {'1 record' if count == 1 else f'all {count:,} records'}")


def _check_place(output: Path, overwrite: bool) -> None:
    """Make sure before the work that its outcome has a place.

    Raises:
        CliError: the folder is not there, or the file is and is to stay.
    """
    folder = output.absolute().parent
    if not folder.is_dir():
        raise CliError(f"--output: the folder {folder} is not there; make it, or choose another")
    if output.is_dir():
        raise CliError(f"--output: {output} is a folder; give a file, such as {output / 'map.html'}")
    if output.exists() and not overwrite:
        raise CliError(f"{output} is there already; give another file, or --overwrite")
