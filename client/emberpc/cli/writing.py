"""Records of a source on their way into a collection: how many there are, and which of them failed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from emberpc.cli.errors import CliError, ExitCode, exit_code
from emberpc.cli.output import note, plain, print_fields, print_json
from emberpc.cli.progress import progress
from emberpc.cli.sources import RecordError, Source
from emberpc.cli.wording import reworded
from emberpc.client import Client, FailedRecord
from emberpc.client.types import Truncation, UpsertResult


class Failures:
    """Tells of the records that fail, each in a line with its place, and keeps count.

    Args:
        source: where the records come from.
        collection: name of the collection that they are written to.

    Attributes:
        unread: how many were no records.
        unwritten: how many were, and were not written.
        code: what the first of them exits with.
    """

    def __init__(self, source: Source, collection: str) -> None:
        self._collection = collection
        self.unread = 0
        self.unwritten = 0
        self.code = ExitCode.OK
        self._source = source

    def unreadable(self, error: RecordError) -> None:
        """Take note of something that is no record."""
        self.unread += 1
        self._tell(str(error), error)

    def failed(self, failure: FailedRecord) -> None:
        """Take note of a record that was not written."""
        self.unwritten += 1
        # The client names a record that it cannot send by its number; the place says more.
        problem = re.sub(rf"\brecords\[{failure.index}\](?:\.|: | )?", "", str(failure.error))
        self._tell(f"{self._source.place(failure.index)}: {problem}", failure.error)

    def _tell(self, message: str, error: Exception) -> None:
        note(reworded(message, self._collection))
        self.code = self.code or exit_code(error) or ExitCode.INTERNAL


def write_stream(
    client: Client,
    collection: str,
    source: Source,
    records: Iterator[dict[str, Any]],
    failures: Failures,
    *,
    truncation: Truncation | None = None,
    batch_size: int,
    as_json: bool,
) -> None:
    """Write the records of a source in a stream, tell of those that fail, and print what it came to.

    Args:
        client: the client.
        collection: name of the collection.
        source: where the records come from.
        records: the records, as the source gives them with `failures.unreadable`.
        failures: those that were found so far.
        truncation: how over-long texts are truncated; None: as the collection says.
        batch_size: records of one request.
        as_json: whether to print JSON.

    Raises:
        CliError: a record failed, or the source cannot be read; what came before is written.
        EmberpcError: the stream as a whole failed.
    """
    total = UpsertResult(0, 0, 0)
    given = 0
    with progress("writing", source.count()) as done:
        for checkpoint in client.upsert_stream(collection, records, truncation=truncation, batch_size=batch_size):
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
