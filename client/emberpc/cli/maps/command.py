"""The command `emberpc collection map`."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from emberpc.cli.connection import with_client
from emberpc.cli.errors import MAP_PACKAGES, CliError, ExitCode, require
from emberpc.cli.options import Name, Overwrite, Where
from emberpc.cli.output import note
from emberpc.cli.progress import stages
from emberpc.cli.whole_files import check_place, whole_file
from emberpc.client import Client

#: Records that are laid out within half a minute on two cores.
_LIMIT = 10_000


@with_client
def draw_map(
    client: Client,
    name: Name,
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
    overwrite: Overwrite = False,
) -> None:
    """Draw a map of a collection, where like records lie together: one HTML file to open in a browser."""
    require(MAP_PACKAGES, "map", "emberpc collection map")
    check_place(output, overwrite)
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
        with whole_file(output) as file:
            file.write(page.render(drawing).encode())
    count = len(found.records)
    if count < found.total:
        note(f"{output} shows {count:,} of {found.total:,} records; --limit 0 shows all")
    else:
        note(f"{output} shows {'1 record' if count == 1 else f'all {count:,} records'}")
