"""The commands `emberpc collection …`. Other modules define map, backup, restore, export and import."""

from __future__ import annotations

import itertools
import sys
import time
from typing import Annotated

import typer

from emberpc.cli import backups, import_export
from emberpc.cli.connection import with_client
from emberpc.cli.errors import CliError, ExitCode
from emberpc.cli.maps.command import draw_map
from emberpc.cli.options import AsJson, Name, Where
from emberpc.cli.output import Column, counted, note, print_fields, print_json, print_table
from emberpc.cli.progress import progress
from emberpc.cli.records import WithVectors
from emberpc.client import AlreadyExists, Client, Collection
from emberpc.client.types import Distance, Progress, Truncation

app = typer.Typer(help="Create, show, change, check, analyse, copy and delete collections.", no_args_is_help=True)

#: Timeout of a request for duplicates or clusters, in seconds. It replaces --timeout, since the server may need minutes
#: for a million records.
GROUPS_TIMEOUT = 3600.0
#: Seconds between two requests for the progress of a reembedding.
_FOLLOW_SECONDS = 0.5


@app.command()
@with_client
def create(
    client: Client,
    name: Name,
    model: Annotated[
        str,
        typer.Option(help="Model that embeds the texts of the collection. Default: none; records bring vectors."),
    ] = "",
    dimensions: Annotated[int, typer.Option(min=0, help="Dimensions of the vectors; 0: those of the model.")] = 0,
    distance: Annotated[Distance, typer.Option(help="How vectors are compared.")] = "cosine",
    truncation: Annotated[
        Truncation, typer.Option(help="Treatment of records whose text has too many tokens.")
    ] = "refuse",
    m: Annotated[int, typer.Option("--m", min=0, help="Links of each node of the graph; 0: the server's default.")] = 0,
    ef_construction: Annotated[
        int, typer.Option(min=0, help="Candidates kept while inserting; 0: the server's default.")
    ] = 0,
    indexed_fields: Annotated[
        list[str] | None,
        typer.Option("--indexed-field", metavar="FIELD", help="A metadata field that filters use often; repeatable."),
    ] = None,
    exist_ok: Annotated[
        bool,
        typer.Option(
            "--exist-ok", help="Accept an existing collection of that name with the same settings, and show it."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Create a collection, and show it."""
    try:
        collection = client.create_collection(
            name,
            model=model,
            dimensions=dimensions,
            distance=distance,
            truncation=truncation,
            m=m,
            ef_construction=ef_construction,
            indexed_fields=indexed_fields or (),
            exist_ok=exist_ok,
        )
    except AlreadyExists as error:
        raise CliError(str(error).replace("; use it,", "; accept it with --exist-ok,"), ExitCode.CONFLICT) from error
    _show(collection, as_json)


@app.command("list")
@with_client
def list_collections(client: Client, as_json: AsJson = False) -> None:
    """List the collections: name, number of records, model, dimensions, distance, size on disk; --json: all fields."""
    if as_json:
        print_json(client.collections())
        return
    columns = [
        Column("name"),
        Column("records", "right"),
        Column("model"),
        Column("dimensions", "right"),
        Column("distance"),
        Column("MB", "right"),
    ]
    found = list(client.collections())
    rows = [
        (c.name, c.record_count, c.model or "(vectors only)", c.dimensions, c.distance, f"{c.size_bytes / 1e6:.1f}")
        for c in found
    ]
    print_table(columns, rows)
    if not found:
        note("there are no collections; create one with `emberpc collection create NAME --model MODEL`")
    for damaged in (c for c in found if c.problem):
        note(f"{damaged.name} cannot be used: {damaged.problem}")


@app.command()
@with_client
def get(client: Client, name: Name, as_json: AsJson = False) -> None:
    """Show one collection: settings, number of records, size, and the progress of a reembedding."""
    _show(client.get_collection(name), as_json)


@app.command()
@with_client
def update(
    client: Client,
    name: Name,
    truncation: Annotated[Truncation, typer.Option(help="Treatment of records whose text has too many tokens.")],
    as_json: AsJson = False,
) -> None:
    """Change how a collection truncates record texts with too many tokens, from now on, and show the collection."""
    _show(client.update_collection(name, truncation=truncation), as_json)


@app.command()
@with_client
def delete(
    client: Client,
    name: Name,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete a collection with all its records.

    Asks first if stdin and stderr are terminals and --yes is not given. Exit code 1: not confirmed; 130: Ctrl-C.
    """
    if not yes and sys.stdin.isatty() and sys.stderr.isatty():
        count = client.get_collection(name).record_count
        try:
            wanted = typer.confirm(f"delete the collection {name} with {counted(count, 'record')}?", err=True)
        except typer.Abort as abort:  # Ctrl-C, or the end of stdin
            if isinstance(abort.__context__, KeyboardInterrupt):
                raise
            wanted = False
        if not wanted:
            note("nothing deleted")
            raise typer.Exit(ExitCode.INTERNAL)
    client.delete_collection(name)
    note(f"deleted the collection {name}")


@app.command()
@with_client
def reembed(
    client: Client,
    name: Name,
    model: Annotated[str, typer.Option(help="The new model.")] = "",
    dimensions: Annotated[int, typer.Option(min=0, help="Dimensions of the vectors; 0: those of the model.")] = 0,
    wait: Annotated[
        bool, typer.Option(help="Wait until the reembedding is done; with --no-wait it continues on the server.")
    ] = True,
    cancel: Annotated[
        bool, typer.Option("--cancel", help="Cancel the reembedding; the collection keeps its model.")
    ] = False,
) -> None:
    """Replace the vectors of a collection by those of another model, or cancel that.

    The server embeds the stored texts. Searches use the old vectors until all new vectors exist.
    """
    if cancel == bool(model):
        raise CliError("give --model, or --cancel, one of the two")
    if cancel:
        note(f"{name} keeps its model: {client.cancel_reembedding(name).model or 'none'}")
        return
    found = client.reembed_collection(name, model, dimensions=dimensions)
    if wait:
        with progress("embedding", found.record_count) as done:
            found = _followed(client, found, done)
    if found.reembedding is None:
        note(f"{name} now has the model {found.model}, with {found.dimensions} dimensions")
    else:
        note(f"the server embeds {name} with {model}; `emberpc collection get {name}` shows the progress")


@app.command()
@with_client
def verify(
    client: Client,
    name: Name,
    full: Annotated[bool, typer.Option("--full", help="Search for every record instead of a random sample.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check that all records are undamaged, and that searches find a sample of them, or all with --full.

    Exit code 7: a problem was found. The server repairs some kinds of problems.
    """
    with progress("verifying", client.get_collection(name).record_count) as done:
        found = client.verify_collection(name, full=full, progress=lambda checked, _: done(checked))
    if as_json:
        print_json([found])
    elif found.ok:
        print_fields({"records": found.checked, "problems": 0})
    else:
        rows = [(problem.id or "(the collection)", problem.reason, problem.message) for problem in found.problems]
        print_table([Column("record"), Column("problem"), Column("what to do", wide=True)], rows)
    if not found.ok:
        count = len(found.problems)
        message = f"{name!r} failed the verification: {count} problem{'' if count == 1 else 's'}"
        raise CliError(f"{message} in {found.checked} records", ExitCode.UNVERIFIED)


@app.command()
@with_client
def records(
    client: Client,
    name: Name,
    limit: Annotated[int, typer.Option(min=0, help="Maximum number of records to list; 0: all.")] = 100,
    where: Where = None,
    with_vectors: WithVectors = False,
    as_json: AsJson = False,
) -> None:
    """List records of a collection in byte order of their ids; with --json as JSON Lines that `upsert` reads."""
    found = itertools.islice(client.records(name, where=where, with_vectors=with_vectors), limit or None)
    if as_json:
        print_json(found)
    else:
        rows = [(record.id, record.label, record.text) for record in found]
        print_table([Column("id"), Column("label"), Column("text", wide=True)], rows)
    if limit and (total := client.count(name, where=where)) > limit:
        note(f"{limit} of {total} records; --limit 0 lists all")


@app.command()
@with_client
def duplicates(
    client: Client,
    name: Name,
    min_score: Annotated[float, typer.Option(help="Minimum cosine similarity of a pair, above 0.")] = 0.95,
    limit: Annotated[int, typer.Option(min=1, help="Maximum number of pairs to show.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Show the pairs of records with the most similar vectors, by cosine, most similar first."""
    if min_score == 0:  # the API takes 0 for the default
        raise CliError("--min-score is 0; it must be above 0 and at most 1")
    every = client.duplicates(name, min_score=min_score, timeout=GROUPS_TIMEOUT)
    pairs = list(itertools.islice(every, limit + 1))
    shown = pairs[:limit]
    if as_json:
        print_json(shown)
    elif shown:
        ids = list({record_id for pair in shown for record_id in (pair.first_id, pair.second_id)})
        texts = {record.id: record.text for record in client.get(name, ids)}
        print_table(
            [Column("score", "right"), Column("id"), Column("text", wide=True)],
            [
                row
                for pair in shown
                for row in (
                    (f"{pair.score:.3f}", pair.first_id, texts.get(pair.first_id, "")),
                    ("", pair.second_id, texts.get(pair.second_id, "")),
                )
            ],
        )
    if not pairs:
        note(f"no pair of records of {name} has a similarity of at least {min_score}")
    elif len(pairs) > limit:
        note(f"there are more than {limit} pairs; --limit shows more")


@app.command()
@with_client
def clusters(
    client: Client,
    name: Name,
    count: Annotated[int, typer.Option("--count", "-k", min=2, max=1000, help="Number of clusters.")] = 10,
    examples: Annotated[int, typer.Option(min=1, max=100, help="Number of example records of each cluster.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Group the records of a collection into clusters of similar vectors, largest first, with examples of each."""
    found = client.clusters(name, count, examples=examples, timeout=GROUPS_TIMEOUT)
    if as_json:
        print_json(found)
        return
    print_table(
        [Column("cluster", "right"), Column("records", "right"), Column("id"), Column("text", wide=True)],
        [
            (number, cluster.record_count if not i else "", record.id, record.text)
            for number, cluster in enumerate(found, 1)
            for i, record in enumerate(cluster.examples)
        ],
    )
    if len(found) < count:
        note(f"{len(found)} of {count} clusters: {name} has no more different records")


app.command("map")(draw_map)


@app.command()
@with_client
def count(client: Client, name: Name, where: Where = None, as_json: AsJson = False) -> None:
    """Count the records of a collection, or those that match --where."""
    found = client.count(name, where=where)
    if as_json:
        print_json([{"count": found}])
    else:
        print_fields({"count": found})


app.command("backup")(backups.backup)
app.command("restore")(backups.restore)
app.command("export")(import_export.export_collection)
app.command("import")(import_export.import_records)


def _followed(client: Client, collection: Collection, done: Progress) -> Collection:
    """Wait until the reembedding of a collection is done or cancelled, and return the collection in its new state.

    `done` is called repeatedly with the number of records with new vectors, and at the end, also after a
    cancellation, with the number of all records. A new problem of the reembedding is printed to stderr.

    Raises:
        EmberpcError: a request failed, such as with NotFound after the collection was deleted.
    """
    reported = ""
    while (job := collection.reembedding) is not None:
        done(job.done)
        if job.problem and job.problem != reported:
            note(job.problem)
        reported = job.problem
        time.sleep(_FOLLOW_SECONDS)
        collection = client.get_collection(collection.name)
    done(collection.record_count)
    return collection


def _show(collection: Collection, as_json: bool) -> None:
    if as_json:
        print_json([collection])
    else:
        print_fields(vars(collection))
