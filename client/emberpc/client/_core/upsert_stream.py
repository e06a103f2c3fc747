"""State of one call of `Client.upsert_stream`: which records are read, sent and acknowledged. Nothing here does I/O."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from emberpc.client._core import checks
from emberpc.client._core.enums import DURABILITIES, word_of
from emberpc.client._core.record_messages import NewRecord, block, new_record
from emberpc.client._core.records import truncation_of
from emberpc.client._core.request_chunks import chunks
from emberpc.client._core.rpc_call import Call, Method
from emberpc.client._core.streams import StreamState
from emberpc.client.exceptions import FailedPrecondition, InputError, InputTypeError, Internal, from_status
from emberpc.client.types import FailedRecord, Record, Truncation, UpsertCheckpoint
from emberpc.v1 import index_pb2 as pb

UPSERT_RECORDS_STREAM = Method("/emberpc.v1.IndexService/UpsertRecordsStream", pb.UpsertRecordsStreamResponse)

RecordItem: TypeAlias = "Record | Mapping[str, Any]"

#: Stop reading records while this many bytes or more are read and not yet acknowledged, so that memory stays bounded.
_WINDOW_BYTES = 2**25


@dataclass
class _Batch:
    """Records of one request, each with its index among all records of the stream.

    Attributes:
        records: the records, each with another id.
        repeated: records with the id of an earlier record of the batch. They fail, and are not sent: the server names a
            failed record by its id only.
        number: batch number of the latest request with these records; 0: they were not sent.
    """

    records: list[tuple[int, NewRecord]]
    repeated: list[tuple[int, NewRecord]]
    number: int = 0

    @classmethod
    def of(cls, items: Sequence[tuple[int, NewRecord]]) -> _Batch:
        """Return a batch of `items`, records with their indexes in ascending order, at least one."""
        first = {record.message.id: place for place, record in reversed(items)}
        batch = cls([], [])
        for place, record in items:
            (batch.records if first[record.message.id] == place else batch.repeated).append((place, record))
        return batch

    def __len__(self) -> int:
        return len(self.records) + len(self.repeated)


class UpsertStreamState(
    StreamState[RecordItem, pb.UpsertRecordsStreamRequest, pb.UpsertRecordsStreamResponse, UpsertCheckpoint]
):
    """The records of one stream that are read and not yet acknowledged, and the requests that send them.

    Args:
        records: the caller's records. The constructor only checks that this is an iterable, and reads no record; `add`
            takes each record.
        collection: name of the collection.
        truncation: how texts with too many tokens are truncated; None: the setting of the collection.
        batch_size: maximum number of records of a request.
        window: maximum number of records that are read and not yet acknowledged.

    Raises:
        InputTypeError: `records` is no iterable, or is a str, bytes, a mapping or one Record; or another argument has
            the wrong type.
        InputError: an argument is wrong.
    """

    def __init__(
        self,
        records: Iterable[RecordItem] | AsyncIterable[RecordItem],
        *,
        collection: str,
        truncation: Truncation | None,
        batch_size: int,
        window: int,
    ) -> None:
        if isinstance(records, (*checks.SINGLE, Record)) or not isinstance(records, (Iterable, AsyncIterable)):
            raise InputTypeError(
                f"records is of type {type(records).__name__}; it must be an iterable of Record or dict"
            )
        super().__init__(batch_size, window)
        self._collection = checks.text(collection, "collection")
        self._truncation = truncation_of(truncation)
        self.call = Call(
            UPSERT_RECORDS_STREAM, pb.UpsertRecordsStreamRequest(collection=self._collection), self._checkpoints
        )
        self._count = 0
        self._bytes = 0
        self._number = 0
        self._unsent: list[tuple[int, NewRecord]] = []
        #: Batches that are not acknowledged, oldest first; the first `_sent` of them were sent on this connection.
        self._batches: deque[_Batch] = deque()
        self._sent = 0
        self._refused: list[FailedRecord] = []
        #: Fingerprint of the collection's model when the stream began; None before the first response.
        self._fingerprint: str | None = None
        self._has_vectors = False

    @property
    def waiting(self) -> int:
        """Number of records that are read and not acknowledged, without those that cannot be sent."""
        return len(self._unsent) + sum(map(len, self._batches))

    @property
    def full(self) -> bool:
        """Whether the records that are read and not acknowledged have 32 MiB or more together."""
        return self._bytes >= _WINDOW_BYTES

    @property
    def unsent(self) -> int:
        """Number of records that are read and not yet divided into batches.

        Records that cannot be sent count until `refused` returns them. Batches that must be sent again over a new
        connection do not count.
        """
        return len(self._unsent) + len(self._refused)

    def add(self, item: RecordItem) -> None:
        """Add a record of the caller. A record that cannot be sent becomes a failure, which `refused` returns."""
        place = self._count
        self._count += 1
        try:
            record = new_record(item, f"records[{place}]")
        except (InputError, InputTypeError) as error:
            self._refused.append(FailedRecord(place, _id_of(item), error))
        else:
            self._unsent.append((place, record))
            self._has_vectors |= record.vector is not None
            self._bytes += record.size

    def refused(self) -> list[UpsertCheckpoint]:
        """Return a list of one checkpoint, whose failures are the records that cannot be sent; [] if there are none.

        These are the records that `new_record` refuses, for example since a field has the wrong type. A record is not
        refused for its size; the server checks that. Only records that were added since the last call of this method
        count.
        """
        refused, self._refused = self._refused, []
        return [UpsertCheckpoint(self._done, tuple(refused))] if refused else []

    def first_message(self) -> pb.UpsertRecordsStreamRequest:
        """Return the first request of a connection, without records; mark all unacknowledged records as not sent."""
        self._sent = 0
        self._number += 1
        return pb.UpsertRecordsStreamRequest(collection=self._collection, batch_number=self._number)

    def further_messages(self) -> Iterator[pb.UpsertRecordsStreamRequest]:
        """Yield the requests of all batches that are not sent over the present connection.

        When the first request is read, the records that are not in a batch yet are divided into batches. A batch is
        marked as sent when its request is read.
        """
        self._cut()
        for batch in list(self._batches)[self._sent :]:
            self._sent += 1
            self._number += 1
            batch.number = self._number
            records = [record for _, record in batch.records]
            yield pb.UpsertRecordsStreamRequest(
                batch_number=batch.number,
                records=[record.message for record in records],
                vectors=block(records, batch.records[0][0]),
                truncation=self._truncation,
            )

    def _cut(self) -> None:
        """Divide the records that are not in a batch yet, in their order, into batches.

        A batch has at most `batch_size` records and 8 MiB, or is a single larger record. All its records have vectors
        of the same length, or none has a vector, since a request has one block of vectors for all its records.
        """
        alike: list[list[tuple[int, NewRecord]]] = []
        for item in self._unsent:
            if not alike or _shape(alike[-1][0][1]) != _shape(item[1]):
                alike.append([])
            alike[-1].append(item)
        self._unsent = []
        for run in alike:
            parts = chunks(run, self.batch_size, lambda item: item[1].size)
            self._batches.extend(_Batch.of(part) for _, part in parts)

    def _checkpoints(self, response: pb.UpsertRecordsStreamResponse) -> Sequence[UpsertCheckpoint]:
        if not self.greeted:
            # This is the response to the first request of the connection, which had no records.
            self._check_model(response.model_fingerprint)
            self.greeted = self.accepted = True
            return []
        #: Index of each sent record, by id.
        places: dict[str, int] = {}
        repeated: list[FailedRecord] = []
        while self._batches and self._sent and self._batches[0].number <= response.batch_number:
            batch = self._batches.popleft()
            self._sent -= 1
            for place, record in batch.records:
                places[record.message.id] = place
                self._bytes -= record.size
            for place, record in batch.repeated:
                error = InputError(
                    f"records[{place}].id is {record.message.id!r}, the id of an earlier record of the same request; "
                    "give each record its own id"
                )
                repeated.append(FailedRecord(place, record.message.id, error))
                self._bytes -= record.size
        for failure in response.failures:
            if failure.id not in places:
                raise Internal(f"the server refused a record {failure.id!r} that it was not sent; it is broken")
        failures = [
            FailedRecord(places[failure.id], failure.id, from_status(failure.error)) for failure in response.failures
        ]
        return [
            UpsertCheckpoint(
                self._done,
                (*failures, *repeated),
                response.inserted_count,
                response.updated_count,
                response.receipt.sequence,
                word_of(response.receipt.durability, DURABILITIES),
            )
        ]

    def _check_model(self, fingerprint: str) -> None:
        """Keep the fingerprint of the first connection of the stream, and compare that of a later connection with it.

        `fingerprint` is that of the collection's model, as the first response of a connection states it.

        Raises:
            FailedPrecondition: the fingerprints differ, and a record that was read has a vector: it is of the old
                model, and does not belong to the collection any more.
        """
        if self._fingerprint is None:
            self._fingerprint = fingerprint
        elif self._has_vectors and fingerprint != self._fingerprint:
            raise FailedPrecondition(
                f"collection {self._collection!r} has another model than when the stream began, so the vectors of the "
                "stream do not belong to it; begin again with vectors of the new model, or with texts",
                reason="MODEL_MISMATCH",
                metadata={"collection": self._collection},
            )

    @property
    def _done(self) -> int:
        """Number of records, counted from the start of the stream, that are all acknowledged or have failed."""
        if self._batches:
            return self._batches[0].records[0][0]
        return self._unsent[0][0] if self._unsent else self._count


def _shape(record: NewRecord) -> int:
    return -1 if record.vector is None else len(record.vector)


def _id_of(item: object) -> str:
    """Return the id of an item that may not be a record; empty if it has no id that is a str."""
    found = item.get("id") if isinstance(item, Mapping) else getattr(item, "id", "")
    return found if isinstance(found, str) else ""
