"""Read and write records in Parquet files; needs pyarrow."""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq

from emberpc.cli.collection_settings import CollectionSettings
from emberpc.cli.errors import CliError
from emberpc.cli.input_files import json_object
from emberpc.cli.output import json_line
from emberpc.cli.record_sources import RECORD_KEYS, OnRejected, RecordError, raise_error
from emberpc.client import Record

#: Key of the schema metadata that stores the settings of the collection.
_SETTINGS_KEY = b"emberpc.collection"
#: Number of rows at which a row group ends. A row group is in memory until it is written as a whole.
_GROUP_ROWS = 4096
#: Bytes of vectors and texts, counted as 4 bytes for each character, at which a row group ends with fewer rows.
_GROUP_BYTES = 32 * 2**20
#: Number of rows that are decoded at a time, to limit the memory.
_BATCH_ROWS = 256
#: Bytes of the file that are read at a time.
_BUFFER_BYTES = 2**20
#: Errors of pyarrow for a file that cannot be read, is damaged or is not Parquet.
_DAMAGE = (OSError, ValueError, pa.ArrowException)


def write_records(
    file: BinaryIO, records: Iterable[Record], settings: CollectionSettings, *, with_vectors: bool
) -> None:
    """Write records as rows of `id`, `text`, `label`, `metadata` (JSON), `time_to_live` (seconds) and maybe `vector`.

    A time to live or a vector that is None becomes a null.

    Args:
        file: the file to write to.
        records: the records, read as needed; one row group of them is in memory.
        settings: settings of the collection of the records, stored in the file.
        with_vectors: whether to write the column `vector`.

    Raises:
        OSError: the file cannot be written.
    """
    fields = [*((name, pa.string()) for name in ("id", "text", "label", "metadata")), ("time_to_live", pa.float64())]
    if with_vectors:
        fields.append(("vector", pa.list_(pa.float32())))
    schema = pa.schema(fields, metadata={_SETTINGS_KEY: settings.to_json()})
    # Values of the other columns seldom repeat, so a dictionary would not save space.
    with pq.ParquetWriter(file, schema, compression="zstd", use_dictionary=["label"]) as writer:
        for group in _groups(records):
            columns = {
                "id": [record.id for record in group],
                "text": [record.text for record in group],
                "label": [record.label for record in group],
                "metadata": [json_line(record.metadata).rstrip("\n") for record in group],
                "time_to_live": [record.time_to_live for record in group],
                "vector": [record.vector for record in group],
            }
            writer.write_table(pa.table({name: columns[name] for name in schema.names}, schema=schema))


def _groups(records: Iterable[Record]) -> Iterator[list[Record]]:
    group: list[Record] = []
    size = 0
    for record in records:
        group.append(record)
        size += 4 * len(record.text) + (0 if record.vector is None else record.vector.nbytes)
        if len(group) == _GROUP_ROWS or size >= _GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


class ParquetRecords:
    """The rows of a Parquet file, which emberpc or another program wrote, as a source of records.

    The file must have the column `id` (text). It may have `text`, `label`, `metadata` (a JSON object as text, a struct
    or a map), `vector` (a list of numbers) and `time_to_live` (seconds). Every other column becomes the metadata field
    of its name.

    Args:
        path: the file.

    Attributes:
        name: the path, for messages.
        settings: settings of the collection that the file was exported from; defaults for those that it does not state.
            The fingerprint is empty if the file has no column `vector`.

    Raises:
        CliError: the file cannot be read, lacks the column `id`, has two columns of a name or one of these columns with
            another type, or the stored settings are damaged.
    """

    def __init__(self, path: str) -> None:
        self.name = path
        self._rows = array("q")
        with self._opened() as file:
            self._count = int(file.metadata.num_rows)
            schema = file.schema_arrow
        self._check(schema)
        self._has_vectors = "vector" in schema.names
        self.settings = CollectionSettings.from_json((schema.metadata or {}).get(_SETTINGS_KEY, "{}"), path)
        if not self._has_vectors:
            self.settings = dataclasses.replace(self.settings, model_fingerprint="")

    def records(self, refused: OnRejected = raise_error) -> Iterator[dict[str, Any]]:
        """Yield the rows as records, read lazily. A null, except in a metadata field, is left out of the record.

        Args:
            refused: called with the error of each row that is not a record: it has no id, `metadata` is no JSON object,
                or `metadata` and another column have the same metadata field. If it returns, reading continues. By
                default the first error is raised.

        Raises:
            CliError: the file cannot be read or is damaged.
        """
        number = 0
        with self._opened() as file:
            batches = file.iter_batches(batch_size=_BATCH_ROWS, use_threads=False)
            while (rows := self._next(batches)) is not None:
                for row in rows:
                    number += 1
                    try:
                        record = self._record(number, row)
                    except RecordError as error:
                        refused(error)
                        continue
                    self._rows.append(number)
                    yield record

    def count(self) -> int | None:
        """Return the number of rows of the file, those that are not records included; never None."""
        return self._count

    def place(self, item: int) -> str:
        """Return the file and the row, from 1, of a record, such as `records.parquet: row 3`.

        `item`: number of the record among those that `records` has yielded, from 0; refused rows do not count.
        """
        return self._place(self._rows[item])

    def _place(self, number: int) -> str:
        return f"{self.name}: row {number}"

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        try:
            # A row group that another program wrote may be larger than the memory. So the file is read in pieces of
            # `buffer_size` bytes, and without `pre_buffer` nothing is read in advance.
            file = pq.ParquetFile(self.name, buffer_size=_BUFFER_BYTES, pre_buffer=False)
        except FileNotFoundError as error:
            raise CliError(f"{self.name} cannot be read: there is no such file; check the path") from error
        except _DAMAGE as error:
            raise CliError(f"{self.name} cannot be read as Parquet; write it again") from error
        with file:
            yield file

    def _next(self, batches: Iterator[Any]) -> list[dict[str, Any]] | None:
        """Return the rows of the next batch as dicts by column; None: there are no more rows.

        A vector is an array of one dimension, or None if the row has none.

        Raises:
            CliError: the rows cannot be read, or are damaged.
        """
        try:
            batch = next(batches, None)
            if batch is None or not self._has_vectors:
                return None if batch is None else batch.to_pylist()
            rows: list[dict[str, Any]] = batch.drop_columns(["vector"]).to_pylist()
            for row, vector in zip(rows, batch.column("vector"), strict=True):
                # Converting a vector to an array is several times as fast as converting it to a list of Python numbers.
                row["vector"] = vector.values.to_numpy(zero_copy_only=False) if vector.is_valid else None
        except _DAMAGE as error:
            raise CliError(
                f"{self.name} is damaged; write it again. Records before the damage may be stored already"
            ) from error
        return rows

    def _record(self, number: int, row: dict[str, Any]) -> dict[str, Any]:
        metadata = row.pop("metadata", None) or {}
        if isinstance(metadata, str):
            metadata = json_object(metadata, "metadata", lambda problem: self._refuse(number, problem))
        # A null in the column of a record's field means that the record does not have the field.
        record = {key: value for key in RECORD_KEYS if (value := row.pop(key, None)) is not None}
        if "id" not in record:
            self._refuse(number, "there is no id; give each record one")
        metadata = dict(metadata)
        if both := next((key for key in metadata if key in row), None):
            self._refuse(number, f"metadata has a field {both!r}, and there is a column of that name; keep one")
        return {**record, "metadata": {**row, **metadata}}

    def _refuse(self, number: int, problem: str) -> NoReturn:
        raise RecordError(f"{self._place(number)}: {problem}")

    def _check(self, schema: Any) -> None:
        if "id" not in schema.names:
            raise CliError(f"{self.name}: there is no column id; rename one of {', '.join(schema.names)} to id")
        for name in schema.names:
            if schema.names.count(name) > 1:
                raise CliError(f"{self.name}: the column {name!r} is there twice; give each its own name")
        for name, (fits, wanted) in _COLUMNS.items():
            if name in schema.names and not fits(schema.field(name).type):
                kind = schema.field(name).type
                raise CliError(f"{self.name}: the column {name} is of type {kind}; it must be {wanted}")


def _is_text(kind: Any) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind))


def _is_object(kind: Any) -> bool:
    return bool(_is_text(kind) or pa.types.is_struct(kind) or pa.types.is_map(kind))


def _is_number(kind: Any) -> bool:
    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind))


def _is_vector(kind: Any) -> bool:
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(is_list(kind) for is_list in lists) and _is_number(kind.value_type)


_COLUMNS = {
    "id": (_is_text, "text"),
    "text": (_is_text, "text"),
    "label": (_is_text, "text"),
    "metadata": (_is_object, "JSON objects as text, or a struct or map"),
    "vector": (_is_vector, "a list of numbers"),
    "time_to_live": (_is_number, "numbers, of seconds"),
}
