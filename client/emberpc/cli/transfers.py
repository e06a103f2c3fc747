"""The commands that copy a collection into a file, and records from files and folders into a collection."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from emberpc.cli.column_types import Types
from emberpc.cli.connection import with_client
from emberpc.cli.errors import CliError, ExitCode, require
from emberpc.cli.files import JSON_LINES, LINE_FILES, LineFile
from emberpc.cli.folders import Split, TextFolder
from emberpc.cli.options import AsJson, Name, Overwrite, Where
from emberpc.cli.output import json_line, note, print_json
from emberpc.cli.progress import progress
from emberpc.cli.remaking import Settings
from emberpc.cli.sources import RECORD_KEYS, Source
from emberpc.cli.vector_origins import with_vectors_of
from emberpc.cli.whole_files import check_place, whole_file
from emberpc.cli.writing import Failures, write_stream
from emberpc.client import Client, Collection, NotFound, Record
from emberpc.client.types import Distance, Progress, Truncation

_PARQUET = ".parquet"
#: Bytes that a page of records should have at most, and records that it may have.
_PAGE_BYTES = 4 * 2**20
_PAGE_RECORDS = 1000


@with_client
def export_collection(
    client: Client,
    name: Name,
    output: Annotated[
        str,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Where to: JSON Lines (.jsonl, .ndjson, or - for stdout), or .parquet.",
        ),
    ],
    where: Where = None,
    vectors: Annotated[
        bool, typer.Option(help="Whether the vectors go too, so that nothing is embedded again.")
    ] = True,
    overwrite: Overwrite = False,
) -> None:
    """Copy a collection's records into a file, which `import` reads; it is whole or not there."""
    path = None if output == "-" else _target(output, overwrite)
    collection = client.get_collection(name)
    settings = Settings.of(collection)
    total = collection.record_count if where is None else client.count(name, where=where)
    records = _records(client, collection, where, vectors)
    if path is None:
        print_json(fields_of(record) for record in records)
        note(f"to make the collection again: {settings.command(name)}")
        return
    with whole_file(path) as file, progress("exporting", total) as done:
        counted = _Counted(records, done)
        if path.suffix.lower() == _PARQUET:
            from emberpc.cli.parquet import write_records

            write_records(file, counted, settings, with_vectors=vectors)
        else:
            file.writelines(json_line(fields_of(record)).encode() for record in counted)
    note(f"wrote {counted.count} records to {path}")
    if path.suffix.lower() != _PARQUET:
        note(f"to make the collection again: {settings.command(name)}")


@with_client
def import_records(
    client: Client,
    name: Name,
    source: Annotated[
        str,
        typer.Argument(
            metavar="FILE|FOLDER",
            help="What `export` wrote and `upsert` reads: JSON Lines (.jsonl, .ndjson, or - for stdin), a table (.csv, "
            ".tsv), .parquet; or a folder of *.txt and *.md.",
        ),
    ],
    create: Annotated[bool, typer.Option("--create", help="Create the collection if there is none.")] = False,
    model: Annotated[str | None, typer.Option(help="With --create: the model that embeds its texts.")] = None,
    distance: Annotated[Distance | None, typer.Option(help="With --create: how vectors compare.")] = None,
    truncation: Annotated[
        Truncation | None, typer.Option(help="With --create: what happens to over-long texts.")
    ] = None,
    text_only: Annotated[
        bool, typer.Option("--text-only", help="Leave out the file's vectors; the server embeds the texts.")
    ] = False,
    split: Annotated[
        Split, typer.Option(help="Of a folder: whether a file is a record, or each paragraph (up to an empty line).")
    ] = "files",
    types: Types = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Records of one request.")] = 256,
    as_json: AsJson = False,
) -> None:
    """Insert the records of a file or folder of any size, or replace those of the same id; a bad one fails alone.

    Doing it again does no harm. If the server is restarted meanwhile, it goes on
    where it was.
    """
    opened, told = _opened(source, split, types or ())
    failures = Failures(opened, name)
    records = opened.records(failures.unreadable)
    if text_only:
        records = (_without_vector(record) for record in records)
    wanted = {"model": model, "distance": distance, "truncation": truncation}
    chosen = {option: value for option, value in wanted.items() if value is not None}
    settings = _settings(told, chosen, text_only)
    try:
        collection = client.get_collection(name)
    except NotFound as error:
        if not create:
            message = f"there is no collection {name!r}; make it with --create, and --model to have texts embedded"
            raise CliError(f"{message}, or first with `emberpc collection create`", ExitCode.NOT_FOUND) from error
        records = _create(client, name, settings, records, opened.name)
    else:
        _check_wanted(collection, chosen)
        records = with_vectors_of(
            client,
            records,
            opened.name,
            settings.model_fingerprint,
            model=collection.model,
            fingerprint=collection.model_fingerprint,
            truncation=Settings.of(collection).truncation,
        )
    write_stream(client, name, opened, records, failures, batch_size=batch_size, as_json=as_json)


def _records(client: Client, collection: Collection, where: str | None, vectors: bool) -> Iterator[Record]:
    """Walk over a collection's records.

    Raises:
        CliError: at the end, if it was put under another model meanwhile, so that the vectors do not compare.
    """
    # Pages of a few MiB, if the records are about alike.
    stored = collection.size_bytes // max(collection.record_count, 1)
    page_size = max(1, min(_PAGE_RECORDS, _PAGE_BYTES // max(stored, 4 * collection.dimensions, 1)))
    yield from client.records(collection.name, where=where, with_vectors=vectors, page_size=page_size)
    if vectors and client.get_collection(collection.name).model_fingerprint != collection.model_fingerprint:
        message = f"{collection.name!r} was put under another model meanwhile; export it again"
        raise CliError(message, ExitCode.CONFLICT)


class _Counted:
    """Records as they are taken, counted.

    Attributes:
        count: how many were.
    """

    def __init__(self, records: Iterable[Record], done: Progress) -> None:
        self.count = 0
        self._records = records
        self._done = done

    def __iter__(self) -> Iterator[Record]:
        for record in self._records:
            yield record
            self.count += 1
            if self.count % 100 == 0:
                self._done(self.count)


def _target(output: str, overwrite: bool) -> Path:
    """Return the file to write to.

    Raises:
        CliError: it cannot be written there, or not in the form that its name says.
    """
    path = Path(output)
    if path.suffix.lower() == _PARQUET:
        require(["pyarrow"], "parquet", "emberpc collection export -o FILE.parquet")
    elif path.suffix.lower() not in JSON_LINES:
        known = ", ".join((*JSON_LINES, _PARQUET))
        raise CliError(f"--output: {path} does not say in which form to write; name it with one of {known}")
    check_place(path, overwrite)
    return path


def fields_of(record: Record) -> dict[str, Any]:
    """Return what of a record is to be written: neither what is empty nor what the server sets anew."""
    fields = {key: getattr(record, key) for key in RECORD_KEYS}
    return {key: value for key, value in fields.items() if value is not None and (key == "vector" or value)}


def _without_vector(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != "vector"}


def _opened(name: str, split: Split, types: Sequence[str]) -> tuple[Source, Settings]:
    """Return what records come from, and what it tells of their collection.

    Raises:
        CliError: it cannot be read, or holds no records by its name.
    """
    path = Path(name)
    if types and path.suffix.lower() not in LINE_FILES:
        raise CliError(f"--types is for tables (.csv, .tsv), and {name} is none; leave it out")
    if name != "-" and path.is_dir():
        return TextFolder(name, split), Settings()
    if split != "files":
        raise CliError(f"--split is for a folder of texts, and {name} is none")
    if path.suffix.lower() == _PARQUET:
        require(["pyarrow"], "parquet", "emberpc collection import FILE.parquet")
        from emberpc.cli.parquet import ParquetRecords

        source = ParquetRecords(name)
        return source, source.settings
    if name != "-" and path.suffix.lower() not in LINE_FILES:
        known = ", ".join((*LINE_FILES, _PARQUET))
        raise CliError(f"{name}: cannot tell what it holds by its name; give a folder, or a file named with {known}")
    return LineFile(name, types), Settings()


def _settings(told: Settings, chosen: Mapping[str, Any], text_only: bool) -> Settings:
    """Return what a new collection is to be made with: as the file tells, but for what the user chose."""
    settings = dataclasses.replace(told, **chosen)
    if not text_only:
        return settings
    # The vectors that the file tells of are left out; another model has its own dimensions.
    dimensions = settings.dimensions if settings.model and settings.model == told.model else 0
    return dataclasses.replace(settings, model_fingerprint="", dimensions=dimensions)


def _create(
    client: Client, name: str, settings: Settings, records: Iterator[dict[str, Any]], source: str
) -> Iterator[dict[str, Any]]:
    """Create the collection that records are to go into, and return the records.

    Raises:
        CliError: it is not known how many dimensions it is to have; or the vectors were made by another model than the
            server has.
    """
    first = next(records, None)
    vector = (first or {}).get("vector")
    if not settings.dimensions and isinstance(vector, (list, np.ndarray)):
        settings = dataclasses.replace(settings, dimensions=len(vector))
    if not (settings.model or settings.dimensions):
        raise CliError(f"the first record of {source} has no vector to go by; give --model to have texts embedded")
    if first is not None:
        records = itertools.chain([first], records)
    if settings.model and settings.model_fingerprint:
        records = with_vectors_of(
            client,
            records,
            source,
            settings.model_fingerprint,
            model=settings.model,
            fingerprint=client.get_model(settings.model).fingerprint,
            truncation=settings.truncation,
        )
    made = settings.create(client, name)
    what = f"model {made.model}" if made.model else "vectors only"
    note(f"created the collection {name}: {what}, {made.dimensions} dimensions, {made.distance}")
    if not made.model and (first or {}).get("text"):
        note(
            f"{name} has no model, so a query in words finds its texts by --mode lexical only; if a model of the "
            "server made the vectors, delete the collection, and import it with --create --model NAME"
        )
    return records


def _check_wanted(collection: Collection, chosen: Mapping[str, Any]) -> None:
    """Raise CliError if the collection that there is is not as the user wants it."""
    for option, value in chosen.items():
        if (found := getattr(collection, option)) != value:
            message = f"the collection {collection.name!r} is there, and its {option} is {found or 'none'}"
            raise CliError(f"{message}; leave out --{option}, or choose another name", ExitCode.CONFLICT)
