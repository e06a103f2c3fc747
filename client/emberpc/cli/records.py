"""The commands about records: upsert, get, delete, search."""

from __future__ import annotations

from typing import Annotated

import typer

from emberpc.cli.column_types import Types
from emberpc.cli.connection import with_client
from emberpc.cli.errors import CliError, ExitCode
from emberpc.cli.files import LineFile
from emberpc.cli.options import AsJson, Where
from emberpc.cli.output import Column, note, plain, print_fields, print_gap, print_json, print_table
from emberpc.cli.progress import progress
from emberpc.cli.writing import Failures, write_stream
from emberpc.client import Client, FailedPrecondition, RecordId
from emberpc.client.types import Fusion, Query, SearchMode, Truncation

CollectionName = Annotated[str, typer.Argument(metavar="COLLECTION", help="Name of the collection.")]
Ids = Annotated[list[str], typer.Argument(metavar="ID", help="Ids of records.")]
WithVectors = Annotated[bool, typer.Option("--vectors", help="With --json: the vectors too.")]


@with_client
def upsert(
    client: Client,
    collection: CollectionName,
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="JSON Lines (.jsonl, .ndjson, or - for stdin) with the fields id, text, metadata, label, vector; or a "
            "table (.csv, .tsv) with the columns id, text, label, metadata (JSON), others being metadata fields.",
        ),
    ],
    batch_size: Annotated[int, typer.Option(min=1, help="Records of one request.")] = 256,
    truncation: Annotated[
        Truncation | None,
        typer.Option(help="How over-long texts are truncated; default: as the collection says."),
    ] = None,
    stream: Annotated[
        bool,
        typer.Option("--stream", help="For a file of any size: a bad record fails alone, connections are mended."),
    ] = False,
    types: Types = None,
    as_json: AsJson = False,
) -> None:
    """Insert the records of a file, or replace those of the same id.

    If it fails on the way, the requests before are written; doing it all again
    does no harm.
    """
    source = LineFile(file, types or ())
    if stream:
        failures = Failures(source, collection)
        records = source.records(failures.unreadable)
        write_stream(
            client,
            collection,
            source,
            records,
            failures,
            truncation=truncation,
            batch_size=batch_size,
            as_json=as_json,
        )
        return
    with source.locating("records", collection), progress("upserting") as done:
        result = client.upsert(
            collection, source.records(), truncation=truncation, batch_size=batch_size, progress=done
        )
    if not source.lines:
        note(f"{source.name} holds no records")
    if as_json:
        print_json([result])
    else:
        print_fields(plain(result))


@with_client
def get(
    client: Client, collection: CollectionName, ids: Ids, with_vectors: WithVectors = False, as_json: AsJson = False
) -> None:
    """Show records."""
    records = client.get(collection, ids, with_vectors=with_vectors)
    if as_json:
        print_json(records)
    else:
        for i, record in enumerate(records):
            if i:
                print_gap()
            print_fields({name: value for name, value in vars(record).items() if name != "vector"})
    found = {record.id for record in records}
    missing = [record_id for record_id in ids if record_id not in found]
    if missing:
        raise CliError(f"there is no record {', '.join(map(repr, missing))} in {collection!r}", ExitCode.NOT_FOUND)


@with_client
def delete(
    client: Client,
    collection: CollectionName,
    ids: Annotated[list[str] | None, typer.Argument(metavar="ID", help="Ids of records.")] = None,
    where: Where = None,
    as_json: AsJson = False,
) -> None:
    """Delete records by id or, with --where, all that match. An id that no record has is no error."""
    if bool(ids) == (where is not None):
        raise CliError("give ids, or a filter with --where; one of the two")
    deleted = client.delete(collection, ids or None, where=where)
    if as_json:
        print_json([{"deleted": deleted}])
    else:
        print_fields({"deleted": deleted})


@with_client
def search(
    client: Client,
    collection: CollectionName,
    query: Annotated[str | None, typer.Argument(metavar="QUERY", help="What to look for, in words.")] = None,
    record_id: Annotated[
        str | None, typer.Option("--id", metavar="ID", help="Look for the neighbours of this record instead.")
    ] = None,
    top_k: Annotated[int, typer.Option("--top-k", "-k", min=1, help="Most hits.")] = 10,
    ef: Annotated[int, typer.Option(min=0, help="Candidates of the graph search; 0: the server chooses.")] = 0,
    min_recall: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the true nearest to find, instead of --ef; 0: no target.")
    ] = 0,
    where: Where = None,
    mode: Annotated[
        SearchMode, typer.Option(help="By likeness (dense), by words in common (lexical), or by both (hybrid).")
    ] = "dense",
    dense_weight: Annotated[
        float | None, typer.Option(min=0, max=1, help="Of hybrid: the weight of likeness against words.")
    ] = None,
    fusion: Annotated[
        Fusion | None,
        typer.Option(help="Of hybrid: what the rankings are fused by, scores (the default) or ranks."),
    ] = None,
    truncation: Annotated[Truncation, typer.Option(help="How an over-long query is truncated.")] = "end",
    with_vectors: WithVectors = False,
    as_json: AsJson = False,
) -> None:
    """Find the records nearest to a query, nearest first."""
    wanted: Query
    if query is not None and record_id is None:
        wanted = query
    elif record_id is not None and query is None:
        wanted = RecordId(record_id)
    else:
        raise CliError("give a query in words, or a record with --id; one of the two")
    try:
        (result,) = client.search_batch(
            collection,
            [wanted],
            top_k=top_k,
            ef=ef,
            min_recall=min_recall,
            where=where,
            mode=mode,
            dense_weight=dense_weight,
            fusion=fusion,
            truncation=truncation,
            with_vectors=with_vectors,
        )
    except FailedPrecondition as error:
        if error.reason != "COLLECTION_WITHOUT_MODEL":
            raise
        message = f"{collection!r} has no model that could embed the query; give --mode lexical to search by words"
        raise CliError(f"{message}, or --id ID for the neighbours of a record", ExitCode.CONFLICT) from error
    if as_json:
        print_json({"score": hit.score, **plain(hit.record)} for hit in result.hits)
    else:
        rows = [(f"{hit.score:.4f}", hit.record.id, hit.record.text) for hit in result.hits]
        print_table([Column("score", "right"), Column("id"), Column("text", wide=True)], rows)
    if result.truncated:
        note("the query has more tokens than the model takes; it was truncated")
    if result.plan.shortfall_reason:
        note(f"{len(result.hits)} hits: {result.plan.shortfall_reason}")
