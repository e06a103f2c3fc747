"""The command `emberpc collection map`."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import chain
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from emberpc.cli.connection import with_client
from emberpc.cli.errors import MAP_PACKAGES, CliError, ExitCode, require
from emberpc.cli.options import Name, Overwrite, Where
from emberpc.cli.output import note
from emberpc.cli.output_files import atomic_file, check_output_path
from emberpc.cli.progress import Stages, stages
from emberpc.client import Client
from emberpc.client.types import Record

#: Default of --limit: maximum number of records on a map. The time of the layout grows with the number of records.
_LIMIT = 10_000
#: Maximum number of records that one request reads.
_PAGE = 500


@with_client
def draw_map(
    client: Client,
    name: Name,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="HTML file to write, such as map.html.")
    ],
    color_by: Annotated[
        str | None,
        typer.Option(
            metavar="FIELD",
            help="Metadata field that colours the points; default: their labels, or clusters if there are none.",
            show_default=False,
        ),
    ] = None,
    clusters: Annotated[
        int,
        typer.Option(
            min=0, max=200, help="Colour by this number of clusters, named by their words; 0: see --color-by."
        ),
    ] = 0,
    limit: Annotated[
        int,
        typer.Option(min=0, help="Maximum number of records; if there are more, a sample, the same each time; 0: all."),
    ] = _LIMIT,
    where: Where = None,
    overwrite: Overwrite = False,
) -> None:
    """Draw a map of a collection: an HTML file for a browser, in which similar records are near each other."""
    require(MAP_PACKAGES, "map", "emberpc collection map")
    check_output_path(output, overwrite)
    if color_by is not None and clusters:
        raise CliError("give --color-by or --clusters; one of the two")
    from emberpc.cli.maps import colours, groups, layout, page

    distance = client.get_collection(name).distance
    with stages() as tell:
        found = _read_sample(client, name, where, limit, tell)
        if not found.records:
            which = "no records that match the filter" if where else "no records yet; write some with `emberpc upsert`"
            raise CliError(f"{name!r} holds {which}", ExitCode.NOT_FOUND)
        if color_by is not None:
            groups.require_field(found.records, color_by)
        tell("laying out", 0, 1)
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
        with atomic_file(output) as file:
            file.write(page.render(drawing).encode())
    count = len(found.records)
    if count < found.total:
        note(f"{output} shows {count:,} of {found.total:,} records; --limit 0 shows all")
    else:
        note(f"{output} shows {'1 record' if count == 1 else f'all {count:,} records'}")


@dataclass(frozen=True)
class _Sample:
    """Records in a pseudo-random order, and the number `total` of records that they were drawn from."""

    records: tuple[Record, ...]
    total: int


def _read_sample(client: Client, collection: str, where: str | None, limit: int, stages: Stages) -> _Sample:
    """Read records with their vectors: all, or a sample if there are more than `limit`.

    The choice depends only on the ids, so the sample of an unchanged collection is the same each time. If a few records
    are added or deleted, most of the sample stays.

    Args:
        client: client of the server.
        collection: name of the collection.
        where: only records that match this filter; None: all records.
        limit: maximum number of records; 0: all. There may be fewer if records are deleted meanwhile.
        stages: called with the progress.

    Raises:
        EmberpcError: a request failed.
    """
    total = client.count(collection, where=where)
    stages("reading records", 0, total)
    if limit and total > limit:
        ids = []
        for record in client.records(collection, where=where, page_size=_PAGE):
            ids.append(record.id)
            stages("reading records", len(ids), total)
        total, wanted = len(ids), heapq.nsmallest(limit, ids, key=_rank)
        stages("reading vectors", 0, len(wanted))
        parts = (wanted[i : i + _PAGE] for i in range(0, len(wanted), _PAGE))
        every: Iterable[Record] = chain.from_iterable(client.get(collection, part, with_vectors=True) for part in parts)
        stage, expected = "reading vectors", len(wanted)
    else:
        every = client.records(collection, where=where, with_vectors=True, page_size=_PAGE)
        stage, expected = "reading records", total
    found = []
    for record in every:
        found.append(record)
        stages(stage, len(found), expected)
    # If records were added since the count, there may be more than `limit` here.
    ranked = sorted(found, key=lambda record: _rank(record.id))[: limit or None]
    return _Sample(tuple(ranked), max(total, len(found)))


def _rank(record_id: str) -> bytes:
    """Return a sort key for an id. Sorting by the key gives a pseudo-random order, which is the same each time."""
    return hashlib.blake2b(record_id.encode(), digest_size=8).digest()
