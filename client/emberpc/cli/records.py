"""The commands `emberpc upsert`, `get`, `delete` and `search`, which write and read records."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

import typer

from emberpc.cli.column_types import Types
from emberpc.cli.connection import with_client
from emberpc.cli.errors import CliError, ExitCode
from emberpc.cli.input_files import LineFile
from emberpc.cli.options import DEFAULT_BATCH, AsJson, BatchSize, Where, WithDetails
from emberpc.cli.output import (
    Column,
    counted,
    details_printer,
    flush,
    note,
    plain,
    print_blank_line,
    print_fields,
    print_json,
    print_table,
    to_terminal,
)
from emberpc.cli.progress import progress
from emberpc.cli.queries import QueryFile
from emberpc.cli.record_stream import FailureReport, write_stream
from emberpc.client import Client, FailedPrecondition, RecordId
from emberpc.client.types import Fusion, Hit, Priority, SearchMode, SearchResult, Truncation

CollectionName = Annotated[str, typer.Argument(metavar="COLLECTION", help="Name of the collection.")]
Ids = Annotated[list[str], typer.Argument(metavar="ID", help="Ids of records.")]
WithVectors = Annotated[bool, typer.Option("--vectors", help="With --json: also print the vectors.")]

#: Default of `search --batch-size`. The client sends at most 100 queries in a request, and two requests at a time.
_QUERIES = 200


@with_client
def upsert(
    client: Client,
    collection: CollectionName,
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="JSON Lines (.jsonl, .ndjson, or - for stdin) with the fields id, text, metadata, label, vector; or a "
            "table (.csv, .tsv) with the columns id, text, label and metadata (JSON); others are metadata fields. In a "
            "table without the column id, each id is made of the text.",
        ),
    ],
    batch_size: BatchSize = DEFAULT_BATCH,
    truncation: Annotated[
        Truncation | None,
        typer.Option(help="Treatment of texts with too many tokens; default: the setting of the collection."),
    ] = None,
    stream: Annotated[
        bool,
        typer.Option(
            "--stream",
            help="For a file of any size: an invalid record fails alone, and a lost connection is restored. --details "
            "prints a line for each write.",
        ),
    ] = False,
    types: Types = None,
    check_revisions: Annotated[
        bool,
        typer.Option(
            "--check-revisions",
            help="Write a record only if the stored record has the `revision` of the file, 0 for a new record; "
            "otherwise its request fails. For JSON Lines, where `collection records --json` writes that field.",
        ),
    ] = False,
    with_details: WithDetails = False,
    as_json: AsJson = False,
) -> None:
    """Insert the records of a file. A record replaces the stored record with the same id.

    If a request fails, the records of earlier requests are written. It is safe
    to repeat the command, except with --check-revisions: the written records
    then have newer revisions than the file.
    """
    source = LineFile(file, types or (), with_revisions=check_revisions)
    if stream:
        if check_revisions:
            raise CliError("--check-revisions cannot be combined with --stream; leave out one of the two")
        failures = FailureReport(source, collection)
        records = source.records(failures.unreadable)
        write_stream(
            client,
            collection,
            source,
            records,
            failures,
            truncation=truncation,
            batch_size=batch_size,
            details=details_printer(with_details),
            as_json=as_json,
        )
        return
    with source.locating("records", collection), progress("upserting") as done:
        # The client needs all of `source.revisions` before the first request, so all records are read first. Without
        # revisions, they are read as needed.
        given = list(source.records()) if check_revisions else source.records()
        result = client.upsert(
            collection,
            given,
            truncation=truncation,
            expected_revisions=source.revisions if check_revisions else None,
            batch_size=batch_size,
            progress=done,
            details=details_printer(with_details),
        )
    if not source.lines:
        note(f"{source.name} holds no records")
    if as_json:
        print_json([result])
    else:
        print_fields(plain(result))


@with_client
def get(
    client: Client,
    collection: CollectionName,
    ids: Ids,
    with_vectors: WithVectors = False,
    with_details: WithDetails = False,
    as_json: AsJson = False,
) -> None:
    """Show the records with the given ids. Exit code 4: an id has no record; the others are shown."""
    records = client.get(collection, ids, with_vectors=with_vectors, details=details_printer(with_details))
    if as_json:
        print_json(records)
    else:
        for i, record in enumerate(records):
            if i:
                print_blank_line()
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
    with_details: WithDetails = False,
    as_json: AsJson = False,
) -> None:
    """Delete records by id or, with --where, all records that match. An unknown id is not an error."""
    if bool(ids) == (where is not None):
        raise CliError("give ids, or a filter with --where; one of the two")
    deleted = client.delete(collection, ids or None, where=where, details=details_printer(with_details))
    if as_json:
        print_json([{"deleted": deleted}])
    else:
        print_fields({"deleted": deleted})


@with_client
def search(
    client: Client,
    collection: CollectionName,
    query: Annotated[str | None, typer.Argument(metavar="QUERY", help="Text of the query.")] = None,
    record_id: Annotated[
        str | None, typer.Option("--id", metavar="ID", help="Search for the neighbours of this record instead.")
    ] = None,
    file: Annotated[
        str | None,
        typer.Option(
            "--file",
            metavar="FILE",
            help="Search for each query of a JSON Lines file of any size; - is stdin. A line has text, vector or id, "
            "and may have where, top_k and ef instead of the options. Hits are printed batch by batch. An error ends "
            "the command and states the last line that was answered.",
        ),
    ] = None,
    top_k: Annotated[int, typer.Option("--top-k", "-k", min=1, help="Maximum number of hits.")] = 10,
    ef: Annotated[int, typer.Option(min=0, help="Candidates of the graph search; 0: the server chooses.")] = 0,
    min_recall: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            help="Target recall: share of the true nearest records to find, instead of --ef; 0: no target.",
        ),
    ] = 0,
    where: Where = None,
    mode: Annotated[
        SearchMode, typer.Option(help="Search by vectors (dense), by words (lexical), or by both (hybrid).")
    ] = "dense",
    dense_weight: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="For hybrid: weight of the dense ranking, against the lexical ranking."),
    ] = None,
    fusion: Annotated[
        Fusion | None,
        typer.Option(
            help="For hybrid: fuse the rankings by scores that are scaled by their bounds (the default), by scores "
            "that are scaled to the range of the ranking, or by ranks."
        ),
    ] = None,
    truncation: Annotated[Truncation, typer.Option(help="Treatment of a query with too many tokens.")] = "end",
    with_vectors: WithVectors = False,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="With --file: limit of queries in a batch, whose hits are printed together; of about 20,000 hits too. "
            f"Default: {_QUERIES}.",
            show_default=False,
        ),
    ] = None,
    priority: Annotated[
        Priority | None,
        typer.Option(
            help="Urgency of embedding the query: the server may run interactive texts before bulk texts. Default: "
            "interactive for a single query, bulk for --file.",
            show_default=False,
        ),
    ] = None,
    show_plan: Annotated[
        bool,
        typer.Option("--plan", help="Also print on stderr how the server ran the search, such as strategy and ef."),
    ] = False,
    with_details: WithDetails = False,
    as_json: AsJson = False,
) -> None:
    """Find the records nearest to a query, nearest first."""
    if [query, record_id, file].count(None) != 2:
        raise CliError("give a query in words, a record with --id, or a file of queries with --file; one of the three")
    if batch_size is not None and file is None:
        raise CliError("--batch-size goes with --file; leave it out")
    ask = partial(
        client.search_batch,
        collection,
        top_k=top_k,
        ef=ef,
        min_recall=min_recall,
        where=where,
        mode=mode,
        dense_weight=dense_weight,
        fusion=fusion,
        truncation=truncation,
        with_vectors=with_vectors,
        priority=priority or ("interactive" if file is None else "bulk"),
    )
    details = details_printer(with_details)
    if file is None:
        wanted = RecordId(record_id) if record_id is not None else query or ""
        with _model_remedy(collection, "--id ID for the neighbours of a record"):
            results = ask([wanted], details=details)
        _print_results(results, None, as_json, show_plan)
        return
    source = QueryFile(file)
    # On a terminal, the hits show the progress.
    with source.locating(), nullcontext() if to_terminal() else progress("searching", source.count) as done:
        for batch in source.batches(batch_size or _QUERIES, top_k):
            with _model_remedy(collection, "queries with vector or id"):
                results = ask(batch, details=_numbered_from(source.answered, details))
            _print_results(results, source.lines, as_json, show_plan, titles=not source.answered)
            flush()
            if done:
                done(source.lines[-1])


@contextmanager
def _model_remedy(collection: str, other: str) -> Iterator[None]:
    """Context manager that converts the error for a collection without a model to a CliError with remedies.

    `other`: words for searches that need no model.
    """
    try:
        yield
    except FailedPrecondition as error:
        if error.reason != "COLLECTION_WITHOUT_MODEL":
            raise
        message = f"{collection!r} has no model that could embed the query; give --mode lexical for a lexical search"
        raise CliError(f"{message}, or {other}", ExitCode.CONFLICT) from error


def _numbered_from(first: int, details: Callable[[Any], None] | None) -> Callable[[Any], None] | None:
    """Return `details` for a batch of queries whose first query is number `first` of the file; None for None."""
    return details and (lambda found: details(replace(found, first=first + found.first)))


def _print_results(
    results: Sequence[SearchResult],
    lines: Sequence[int] | None,
    as_json: bool,
    show_plan: bool,
    *,
    titles: bool = True,
) -> None:
    """Print hits to stdout, and notes on the queries to stderr.

    Args:
        results: the result of each query.
        lines: the line of each query in its file, which is printed with each hit; None: there is no file.
        as_json: whether to print JSON Lines.
        show_plan: whether the notes have the plan of each search.
        titles: whether a table starts with the titles of its columns.
    """
    places = [""] * len(results) if lines is None else list(map(str, lines))
    hits = [(place, hit) for place, result in zip(places, results, strict=True) for hit in result.hits]
    if as_json:
        print_json(
            {**({"line": int(place)} if place else {}), "score": hit.score, **plain(hit.record)} for place, hit in hits
        )
    else:
        _print_hits(hits, with_lines=lines is not None, titles=titles)
    for place, result in zip(places, results, strict=True):
        _print_notes(result, f"line {place}: " if place else "", show_plan)


def _print_notes(result: SearchResult, place: str, show_plan: bool) -> None:
    """Print to stderr that a query was truncated, or why there are few hits; and with `show_plan`, the plan.

    `place` is put before each note: the line of the query in its file.
    """
    if show_plan:
        plan = {name: value for name, value in vars(result.plan).items() if name != "shortfall_reason"}
        note(f"{place}plan: " + ", ".join(f"{name} {value}" for name, value in plan.items()))
    if result.truncated:
        note(f"{place}the query has more tokens than the model takes; it was truncated")
    if result.plan.shortfall_reason:
        note(f"{place}{counted(len(result.hits), 'hit')}: {result.plan.shortfall_reason}")


def _print_hits(hits: Sequence[tuple[str, Hit]], *, with_lines: bool, titles: bool) -> None:
    """Print hits as a table with score, id, label and text.

    On a terminal, the column of labels is left out for a single query if no hit has a label.

    Args:
        hits: each hit with the line of its query in the file of queries.
        with_lines: whether the table begins with a column of these lines.
        titles: whether to print the titles of the columns.
    """
    # The hits of a file are printed in batches, and later ones may have labels.
    with_labels = not to_terminal() or with_lines or any(hit.record.label for _, hit in hits)
    line = [Column("line", "right")] if with_lines else []
    label = [Column("label")] if with_labels else []
    print_table(
        [*line, Column("score", "right"), Column("id"), *label, Column("text", wide=True)],
        [
            (
                *([place] if with_lines else []),
                f"{hit.score:.4f}",
                hit.record.id,
                *([hit.record.label] if with_labels else []),
                hit.record.text,
            )
            for place, hit in hits
        ],
        titles=titles,
    )
