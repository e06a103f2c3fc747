"""A collection in Milvus."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any, TypeVar

import numpy as np

from emberpc.server.errors import ServiceError, invalid, items_of
from emberpc.server.index.backend import unsupported
from emberpc.server.index.clusters import Cluster
from emberpc.server.index.collection import check_search
from emberpc.server.index.duplicates import DuplicatePair
from emberpc.server.index.metric import check_vectors, prepare
from emberpc.server.index.types import (
    CollectionInfo,
    CollectionSpec,
    Distance,
    Matrix,
    NewRecord,
    Plan,
    SearchOutcome,
    StoredRecord,
    Strategy,
    WriteResult,
    check_page_size,
)
from emberpc.server.index.validation import check_records
from emberpc.server.milvus import schema
from emberpc.server.milvus.connection import NOT_LOADED, Connection
from emberpc.server.paging import decode_token, encode_token

BACKEND = "milvus"
_COPY = "copy the collection, or a part of it, to an embedded index and ask that"
#: Ids asked for in one expression.
_IDS_AT_ONCE = 1000
#: Hits asked for in one call of Milvus, which answers with at most 100 MB.
_HITS_AT_ONCE = 10_000
#: As the embedded index has them.
_MIN_EF, _EF_PER_HIT = 200, 2
#: Milvus takes no more.
_MAX_EF = 32_768

Result = TypeVar("Result")


class MilvusCollection:
    """A collection in Milvus, as `emberpc.server.index.Collection` documents it. Safe to use from several threads.

    What is different: a write is as durable as Milvus's own log; revisions cannot be expected, since Milvus has no
    conditional write; numbers of writes are microseconds since 1970, so that they grow over restarts without being
    kept; how many ids were new, and when a record was created, is read just before a write.

    Args:
        connection: to Milvus.
        spec: what it is.
        created: since when.
    """

    def __init__(self, connection: Connection, spec: CollectionSpec, created: datetime) -> None:
        self.spec = spec
        self.created = created
        self._connection = connection
        self._name = schema.milvus_name(spec.name)
        self._write_lock = threading.Lock()
        self._sequence = 0

    def info(self) -> CollectionInfo:
        """Say how it stands; the sequence is that of this server's last write, and bytes on disk are not known."""
        return CollectionInfo(self.count(), self._sequence, self.created, 0)

    def load(self) -> None:
        """Have Milvus load it; nothing else can be asked of it before."""
        self._call("load_collection")

    def upsert(
        self, records: Sequence[NewRecord], vectors: Matrix, expected_revisions: Sequence[int] | None = None
    ) -> WriteResult:
        """Insert records or replace those of the same id: one message to Milvus."""
        documents = check_records(records)
        check_vectors(vectors, self.spec.dimensions, self.spec.distance, items_of("vectors"))
        if len(vectors) != len(records):
            raise invalid("vectors", f"has {len(vectors)} vectors for {len(records)} records; give one for each")
        if expected_revisions is not None:
            raise unsupported("expected_revisions", BACKEND, "leave it unset, or use the embedded index")
        schema.check_fit(records, vectors, self.spec.distance)
        with self._write_lock:
            created = {
                found[schema.ID]: found["created"]
                for found in self._by_id([record.id for record in records], [schema.ID, "created"])
            }
            sequence, now = self._next_sequence(), _now()
            rows = [
                schema.row(record, document, vector, sequence, created.get(record.id, now), now)
                for record, document, vector in zip(records, documents, vectors, strict=True)
            ]
            self._call("upsert", data=rows)
            self._sequence = sequence
        return WriteResult(sequence, len(records) - len(created), len(created), synced=False)

    def delete(self, ids: Sequence[str]) -> WriteResult:
        """Delete records by id: one message to Milvus; ids that are not there are no error."""
        with self._write_lock:
            present = [found[schema.ID] for found in self._by_id(ids, [schema.ID])]
            if present:
                self._call("delete", filter=schema.one_of(present))
                self._sequence = self._next_sequence()
            return WriteResult(self._sequence, deleted=len(present), synced=False)

    def get(self, ids: Sequence[str], *, with_vectors: bool = False) -> list[StoredRecord]:
        """Return the records of those ids that are there, in the order asked for."""
        rows = self._by_id(ids, schema.fields(with_vectors=with_vectors))
        found = {record.id: record for record in map(schema.stored, rows)}
        return [found[record_id] for record_id in ids if record_id in found]

    def page(self, page_size: int, page_token: str, *, with_vectors: bool = False) -> tuple[list[StoredRecord], str]:
        """Return a page of records by id in byte order, and the token of the next page, empty after the last."""
        check_page_size(page_size)
        after = decode_token(page_token)
        rows = self._query(
            filter=f"{schema.ID} > {schema.quoted(after)}",
            output_fields=schema.fields(with_vectors=with_vectors),
            limit=page_size + 1,
            # As pymilvus's own iterator asks: the first so many by primary key, of all segments.
            iterator="True",
            reduce_stop_for_best=True,
        )
        records = sorted(map(schema.stored, rows), key=lambda record: record.id)
        more = len(records) > page_size
        return records[:page_size], encode_token(records[page_size - 1].id) if more else ""

    def count(self) -> int:
        """Return the number of records."""
        return int(self._query(filter="", output_fields=["count(*)"])[0]["count(*)"])

    def search(
        self,
        queries: Matrix,
        top_k: int | Sequence[int],
        *,
        ef: int = 0,
        exclude_ids: Sequence[str | None] = (),
        with_vectors: bool = False,
    ) -> list[SearchOutcome]:
        """Find the records nearest to each query.

        The plan says HNSW always: what Milvus did with its segments, some of which have no graph yet, it does not tell.
        """
        check_vectors(queries, self.spec.dimensions, self.spec.distance, items_of("queries", "vector"))
        sizes = [top_k] * len(queries) if isinstance(top_k, int) else list(top_k)
        excluded = list(exclude_ids) or [None] * len(queries)
        check_search(len(queries), sizes, len(excluded), ef)
        if self.spec.distance is Distance.COSINE and len(queries):
            queries = prepare(queries, self.spec.distance)
        output = schema.fields(with_vectors=with_vectors)
        outcomes: dict[int, SearchOutcome] = {}
        for rows in _blocks(sizes):
            wanted = max(sizes[row] for row in rows) + 1
            keep = min(max(ef or max(_MIN_EF, _EF_PER_HIT * wanted), wanted), _MAX_EF)
            found = self._loaded(
                lambda rows=rows, wanted=wanted, keep=keep: self._call(  # type: ignore[misc]
                    "search",
                    data=list(queries[rows]),
                    anns_field=schema.VECTOR,
                    limit=wanted,
                    search_params={"params": {"ef": keep}},
                    output_fields=output,
                    consistency_level="Strong",
                )
            )
            for row, hits in zip(rows, found, strict=True):
                outcomes[row] = self._outcome(hits, sizes[row], excluded[row], keep)
        return [outcomes[row] for row in range(len(queries))]

    def duplicates(self, min_score: float, stop: Callable[[], bool]) -> list[DuplicatePair]:
        """Raise UNIMPLEMENTED: all vectors would have to be here."""
        raise unsupported("FindDuplicates", BACKEND, _COPY)

    def clusters(self, count: int, examples: int, stop: Callable[[], bool]) -> list[Cluster]:
        """Raise UNIMPLEMENTED: all vectors would have to be here."""
        raise unsupported("ClusterRecords", BACKEND, _COPY)

    def _outcome(self, found: Sequence[Any], k: int, exclude: str | None, ef: int) -> SearchOutcome:
        """Turn what Milvus found for a query, nearest first, into hits."""
        hits = [
            (schema.stored(hit["entity"]), schema.score(self.spec.distance, hit["distance"]))
            for hit in found
            if hit["id"] != exclude
        ][:k]
        plan = Plan(Strategy.HNSW, ef, 0)
        if len(hits) < k:
            plan = replace(plan, shortfall_reason=self._shortfall(len(hits), left_out=len(hits) < len(found)))
        return SearchOutcome(hits, plan)

    def _shortfall(self, hits: int, *, left_out: bool) -> str:
        """Say why there are no more hits."""
        total = self.count()
        if hits + left_out < total:
            return f"the graph led to {hits} of {total} records; raise ef"
        reason = f"the collection holds {total} record{'' if total == 1 else 's'}"
        return f"{reason}, the record asked about left out" if left_out else reason

    def _by_id(self, ids: Sequence[str], output: list[str]) -> Iterator[dict[str, Any]]:
        """Read some fields of the records of those ids that are there."""
        distinct = list(dict.fromkeys(ids))
        for start in range(0, len(distinct), _IDS_AT_ONCE):
            yield from self._query(filter=schema.one_of(distinct[start : start + _IDS_AT_ONCE]), output_fields=output)

    def _query(self, **arguments: Any) -> list[dict[str, Any]]:
        return self._loaded(lambda: list(self._call("query", consistency_level="Strong", **arguments)))

    def _loaded(self, read: Callable[[], Result]) -> Result:
        """Read; if Milvus has the collection no longer loaded, as after its restart, have it loaded first."""
        try:
            return read()
        except ServiceError as error:
            if error.reason != NOT_LOADED:
                raise
        self.load()
        return read()

    def _call(self, method: str, **arguments: Any) -> Any:
        return self._connection.call(f"collection {self.spec.name!r}", method, collection_name=self._name, **arguments)

    def _next_sequence(self) -> int:
        return max(self._sequence + 1, _now())


def _now() -> int:
    """Return microseconds since 1970."""
    return time.time_ns() // 1000


def _blocks(sizes: Sequence[int]) -> Iterator[list[int]]:
    """Put the rows of queries together that can go in one call: of like sizes, and not too many hits."""
    order = np.argsort(np.array(sizes), kind="stable").tolist()
    block: list[int] = []
    for row in order:
        # One that asks for many would make all the others of its call as costly.
        if block and ((len(block) + 1) * sizes[row] > _HITS_AT_ONCE or sizes[row] > 2 * sizes[block[0]]):
            yield block
            block = []
        block.append(row)
    if block:
        yield block
