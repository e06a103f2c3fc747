"""Upsert the records of a source in a stream, and report the records that failed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from emberpc.cli.error_messages import in_cli_terms
from emberpc.cli.errors import CliError, ExitCode, exit_code
from emberpc.cli.output import note, plain, print_fields, print_json
from emberpc.cli.progress import progress
from emberpc.cli.record_sources import RecordError, RecordSource
from emberpc.client import Client, FailedRecord
from emberpc.client.details import Details, ResponseDetails
from emberpc.client.types import Truncation, UpsertResult


class FailureReport:
    """Prints each record that failed to stderr, in a line with its place in the source, and counts the failures.

    A failure is an item of the source that is not a valid record, or a record that was read and not written.

    Args:
        source: the source of the records.
        collection: name of the collection that the records are written to.

    Attributes:
        unread: number of items that the source refused as records.
        unwritten: number of records that were read, and not written.
        code: exit code of the first failure that was printed; OK if there is none.
    """

    def __init__(self, source: RecordSource, collection: str) -> None:
        self._collection = collection
        self.unread = 0
        self.unwritten = 0
        self.code = ExitCode.OK
        self._source = source

    def unreadable(self, error: RecordError) -> None:
        """Count and print an item that the source refused as a record. To be passed to `RecordSource.records`."""
        self.unread += 1
        self._report(str(error), error)

    def failed(self, failure: FailedRecord) -> None:
        """Count and print a record that was read, and not written."""
        self.unwritten += 1
        # The client names the record by its index, such as `records[3]`. The user knows only the place of the record in
        # the source, so the index is removed, and the place is put before the message.
        problem = re.sub(rf"\brecords\[{failure.index}\](?:\.|: | )?", "", str(failure.error))
        self._report(f"{self._source.place(failure.index)}: {problem}", failure.error)

    def _report(self, message: str, error: Exception) -> None:
        note(in_cli_terms(message, self._collection))
        self.code = self.code or exit_code(error) or ExitCode.INTERNAL


def write_stream(
    client: Client,
    collection: str,
    source: RecordSource,
    records: Iterator[dict[str, Any]],
    failures: FailureReport,
    *,
    truncation: Truncation | None = None,
    batch_size: int,
    details: Details | None = None,
    as_json: bool,
) -> None:
    """Upsert the records of a source in a stream, report those that fail, and print the totals to stdout.

    Args:
        client: the client.
        collection: name of the collection.
        source: the source of the records.
        records: iterator over the records of `source`, which must report invalid items to `failures.unreadable`.
        failures: prints and counts the failures, also those of reading.
        truncation: treatment of texts with too many tokens; None: the setting of the collection.
        batch_size: maximum number of records of one request; values above 1024 count as 1024.
        details: called with the details of each write: `first` and `count` say which of the records that were read are
            written or have failed since the last call, and the write has a sequence number and a durability; None: no
            calls.
        as_json: whether to print the totals as JSON.

    Raises:
        CliError: at the end, after the totals, if a record failed, with the exit code of the first failure; the other
            records are written. Or the source cannot be read further; the records before may be written. Or stdout
            cannot be written.
        EmberpcError: the stream as a whole failed; some records may be written.
    """
    total = UpsertResult(0, 0, 0)
    given = 0
    with progress("writing", source.count()) as done:
        for checkpoint in client.upsert_stream(collection, records, truncation=truncation, batch_size=batch_size):
            if details and checkpoint.sequence:
                details(
                    ResponseDetails(
                        given,
                        checkpoint.done - given,
                        sequence=checkpoint.sequence,
                        durability=checkpoint.durability,
                    )
                )
            given = checkpoint.done
            done(given + failures.unread)
            total = UpsertResult(
                total.inserted + checkpoint.inserted,
                total.updated + checkpoint.updated,
                max(total.sequence, checkpoint.sequence),
            )
            for failure in checkpoint.failures:
                failures.failed(failure)
    if not given + failures.unread:
        note(f"{source.name} holds no records")
    if as_json:
        print_json([total])
    else:
        print_fields(plain(total))
    if failed := failures.unread + failures.unwritten:
        message = f"{failed} of {given + failures.unread} records were not written; the lines above say why"
        raise CliError(message, failures.code)
