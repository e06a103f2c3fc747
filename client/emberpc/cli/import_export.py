"""The commands `emberpc collection export` and `emberpc collection import`."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from emberpc.cli.collection_settings import CollectionSettings
from emberpc.cli.column_types import Types
from emberpc.cli.connection import with_client
from emberpc.cli.errors import CliError, ExitCode, require
from emberpc.cli.input_files import JSON_LINES, LINE_FILES, LineFile
from emberpc.cli.options import DEFAULT_BATCH, AsJson, BatchSize, Name, Overwrite, Where
from emberpc.cli.output import json_line, note, print_json
from emberpc.cli.output_files import atomic_file, check_output_path
from emberpc.cli.progress import progress
from emberpc.cli.record_sources import RECORD_KEYS, RecordSource
from emberpc.cli.record_stream import FailureReport, write_stream
from emberpc.cli.text_folder import Split, TextFolder
from emberpc.cli.vector_check import check_vectors
from emberpc.client import Client, Collection, NotFound, Record
from emberpc.client.types import Distance, Progress, Truncation

_PARQUET = ".parquet"
#: Target size in bytes of a page of records that an export requests.
_PAGE_BYTES = 4 * 2**20
#: Maximum number of records of a page that an export requests.
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
            help="File to write: JSON Lines (.jsonl, .ndjson, or - for stdout), or .parquet.",
        ),
    ],
    where: Where = None,
    vectors: Annotated[
        bool, typer.Option(help="Also write the vectors, so that an import embeds nothing again.")
    ] = True,
    overwrite: Overwrite = False,
) -> None:
    """Write the records of a collection to a file that `import` reads. If the export fails, FILE stays as it was."""
    path = None if output == "-" else _target(output, overwrite)
    collection = client.get_collection(name)
    settings = CollectionSettings.of(collection)
    total = collection.record_count if where is None else client.count(name, where=where)
    records = _records(client, collection, where, vectors)
    if path is None:
        print_json(fields_of(record) for record in records)
        note(f"to make the collection again: {settings.command(name)}")
        return
    with atomic_file(path) as file, progress("exporting", total) as done:
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
            help="A file of `collection export` or for `upsert`: JSON Lines (.jsonl, .ndjson, or - for stdin), a table "
            "(.csv, .tsv) or .parquet; or a folder of *.txt and *.md files.",
        ),
    ],
    create: Annotated[bool, typer.Option("--create", help="Create the collection if it does not exist.")] = False,
    model: Annotated[str | None, typer.Option(help="With --create: the model that embeds its texts.")] = None,
    distance: Annotated[Distance | None, typer.Option(help="With --create: how vectors are compared.")] = None,
    truncation: Annotated[
        Truncation | None, typer.Option(help="With --create: treatment of texts with too many tokens.")
    ] = None,
    text_only: Annotated[
        bool, typer.Option("--text-only", help="Ignore the vectors of the file; the server embeds the texts.")
    ] = False,
    split: Annotated[
        Split, typer.Option(help="For a folder: whether each file or each paragraph (up to an empty line) is a record.")
    ] = "files",
    types: Types = None,
    batch_size: BatchSize = DEFAULT_BATCH,
    as_json: AsJson = False,
) -> None:
    """Upsert the records of a file or folder in a stream. Invalid records are reported; the others are written.

    It is safe to repeat the command. If the server restarts within --timeout,
    the import resumes.
    """
    opened, stored = _opened(source, split, types or ())
    failures = FailureReport(opened, name)
    records = opened.records(failures.unreadable)
    if text_only:
        records = (_without_vector(record) for record in records)
    wanted = {"model": model, "distance": distance, "truncation": truncation}
    chosen = {option: value for option, value in wanted.items() if value is not None}
    settings = _settings(stored, chosen, text_only)
    try:
        collection = client.get_collection(name)
    except NotFound as error:
        if not create:
            message = f"there is no collection {name!r}; make it with --create, and --model to have texts embedded"
            raise CliError(f"{message}, or first with `emberpc collection create`", ExitCode.NOT_FOUND) from error
        records = _create(client, name, settings, records, opened.name)
    else:
        _check_wanted(collection, chosen)
        records = check_vectors(
            client,
            records,
            opened.name,
            settings.model_fingerprint,
            model=collection.model,
            fingerprint=collection.model_fingerprint,
            truncation=CollectionSettings.of(collection).truncation,
        )
    write_stream(client, name, opened, records, failures, batch_size=batch_size, as_json=as_json)


def _records(client: Client, collection: Collection, where: str | None, vectors: bool) -> Iterator[Record]:
    """Yield the records of a collection.

    Args:
        client: the client.
        collection: the state of the collection at the start.
        where: only records that match this filter; None: all records.
        vectors: whether to read the vectors too.

    Raises:
        CliError: with `vectors`, after the last record: the fingerprint of the collection's model is no longer that of
            `collection`, so the vectors may be of two models.
        EmberpcError: a request failed.
    """
    # Choose the number of records of a page by the average size of a record, so that a page has at most about 4 MiB.
    stored = collection.size_bytes // max(collection.record_count, 1)
    page_size = max(1, min(_PAGE_RECORDS, _PAGE_BYTES // max(stored, 4 * collection.dimensions, 1)))
    yield from client.records(collection.name, where=where, with_vectors=vectors, page_size=page_size)
    if vectors and client.get_collection(collection.name).model_fingerprint != collection.model_fingerprint:
        message = f"{collection.name!r} was embedded with another model meanwhile; export it again"
        raise CliError(message, ExitCode.CONFLICT)


class _Counted:
    """Iterable over records, for one iteration. It counts them, and calls `done` with the number after every 100.

    Attributes:
        count: number of records that the reader is done with.
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
    """Return the path that --output names, after checks; it is not `-`.

    Raises:
        CliError: the name has an unknown extension, pyarrow is missing for .parquet, or `check_output_path` refuses the
            path: for example, its folder does not exist, or the file exists and `overwrite` is false.
    """
    path = Path(output)
    if path.suffix.lower() == _PARQUET:
        require(["pyarrow"], "parquet", "emberpc collection export -o FILE.parquet")
    elif path.suffix.lower() not in JSON_LINES:
        known = ", ".join((*JSON_LINES, _PARQUET))
        raise CliError(f"--output: {path} does not say in which form to write; name it with one of {known}")
    check_output_path(path, overwrite)
    return path


def fields_of(record: Record) -> dict[str, Any]:
    """Return the fields of a record to write to a file, without empty fields and without those that the server sets.

    A `time_to_live` below a millisecond becomes a millisecond. As 0, it would be left out as empty, and after an import
    the record would never expire.
    """
    fields = {key: getattr(record, key) for key in RECORD_KEYS}
    if fields["time_to_live"] is not None:
        fields["time_to_live"] = max(fields["time_to_live"], 0.001)
    return {key: value for key, value in fields.items() if value is not None and (key == "vector" or value)}


def _without_vector(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != "vector"}


def _opened(name: str, split: Split, types: Sequence[str]) -> tuple[RecordSource, CollectionSettings]:
    """Return the source of records that a name states, and the collection's settings that the source has stored.

    Args:
        name: a file, a folder, or `-` for stdin.
        split: for a folder: what makes a record.
        types: values of --types, for a table.

    Returns:
        The source, and the settings; only Parquet files have stored settings, for others they are the defaults.

    Raises:
        CliError: the name has an unknown extension, an option is invalid or does not fit the source, pyarrow is missing
            for .parquet, or a Parquet file cannot be read. Other files and folders are not read here.
    """
    path = Path(name)
    if types and path.suffix.lower() not in LINE_FILES:
        raise CliError(f"--types is for tables (.csv, .tsv), and {name} is none; leave it out")
    if name != "-" and path.is_dir():
        return TextFolder(name, split), CollectionSettings()
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
    return LineFile(name, types), CollectionSettings()


def _settings(stored: CollectionSettings, chosen: Mapping[str, Any], text_only: bool) -> CollectionSettings:
    """Return the settings `stored` in the file, with those that the user has `chosen` by options in their place.

    With `text_only`, the vectors of the file are ignored, so the fingerprint is left out. The dimensions are left out
    too, unless the result has the model of the file.
    """
    settings = dataclasses.replace(stored, **chosen)
    if not text_only:
        return settings
    # The vectors of the file are ignored; another model has its own dimensions.
    dimensions = settings.dimensions if settings.model and settings.model == stored.model else 0
    return dataclasses.replace(settings, model_fingerprint="", dimensions=dimensions)


def _create(
    client: Client, name: str, settings: CollectionSettings, records: Iterator[dict[str, Any]], source: str
) -> Iterator[dict[str, Any]]:
    """Create a collection for records, and return an iterator over all the records, those read here included.

    Args:
        client: the client.
        name: name of the collection.
        settings: settings of the collection. Without dimensions, those of the first record's vector are used.
        records: the records; the first ones are read here.
        source: name of the file or folder, for messages.

    Raises:
        CliError: there is no model, and neither `settings` nor the first record gives dimensions; the records cannot be
            read; or `check_vectors` refuses the vectors. No collection is created.
        EmberpcError: a call failed.
        InputError: the client does not know the distance or the truncation.
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
        records = check_vectors(
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
    """Raise CliError if a setting of an existing collection differs from the value that the user chose by an option."""
    for option, value in chosen.items():
        if (found := getattr(collection, option)) != value:
            message = f"the collection {collection.name!r} is there, and its {option} is {found or 'none'}"
            raise CliError(f"{message}; leave out --{option}, or choose another name", ExitCode.CONFLICT)
