"""Read the records of a collection in Milvus: by id, in the order of ids, by number and by vector."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from emberpc.server import cancellation
from emberpc.server.collections.filters import Filter, matches
from emberpc.server.collections.types import CollectionSpec, Matrix
from emberpc.server.errors import ServiceError
from emberpc.server.milvus import schema, terms
from emberpc.server.milvus.connection import NOT_LOADED, Connection

#: Limit of the ids in one filter expression of Milvus; more ids take several calls.
_IDS_AT_ONCE = 1000
#: Default number of rows that one call to Milvus returns in `Reader.walk`, with or without a filter.
_ROWS_AT_ONCE = 1000

Result = TypeVar("Result")


class Reader:
    """Reads a collection in Milvus. Reads include all acknowledged writes. Safe to use from several threads.

    Every method raises the `ServiceError` of `Connection.call`. The reads also raise DEADLINE_EXCEEDED if the call that
    this thread runs is cancelled.

    Args:
        connection: the connection to Milvus.
        spec: the spec of the collection.
    """

    def __init__(self, connection: Connection, spec: CollectionSpec) -> None:
        self.spec = spec
        self._connection = connection
        self._name = schema.milvus_name(spec.name)

    def call(self, method: str, **arguments: Any) -> Any:
        """Call a method of `MilvusClient` with the collection's name and other arguments; see `Connection.call`."""
        return self._connection.call(f"collection {self.spec.name!r}", method, collection_name=self._name, **arguments)

    def by_id(self, ids: Sequence[str], output: list[str]) -> Iterator[dict[str, Any]]:
        """Yield the fields `output` of the records with the given ids, in no particular order.

        Ids without a record are left out. A repeated id yields one record.
        """
        distinct = list(dict.fromkeys(ids))
        for start in range(0, len(distinct), _IDS_AT_ONCE):
            yield from self._query(filter=schema.one_of(distinct[start : start + _IDS_AT_ONCE]), output_fields=output)

    def walk(
        self,
        output: list[str],
        condition: Filter | None = None,
        *,
        after: str = "",
        batch: int = _ROWS_AT_ONCE,
        among: str = "",
    ) -> Iterator[dict[str, Any]]:
        """Yield some fields of the records that meet a filter, in byte order of ids.

        Args:
            output: names of the fields. `metadata` may be yielded too if the filter needs it.
            condition: the filter; None: all records.
            after: only records with greater ids are yielded; empty: all records.
            batch: rows that one call to Milvus returns.
            among: a filter expression of Milvus that the records must meet too; empty: none.
        """
        clause = clause_of(condition)
        while True:
            rows = self._query(
                filter=terms.both(schema.behind(after), clause.expression, among),
                output_fields=[*output, "metadata"] if clause.doubtful else output,
                limit=batch,
                # As pymilvus's own iterator does. Milvus then returns the rows with the least ids of all segments.
                iterator="True",
                reduce_stop_for_best=True,
            )
            rows.sort(key=_id)
            for row in rows:
                if condition is None or not clause.doubtful or matches(condition, schema.metadata(row)):
                    yield row
            if len(rows) < batch:
                return
            after = rows[-1][schema.ID]

    def count(self, condition: Filter | None = None) -> int:
        """Return the number of records that meet the filter `condition`; None: of all records."""
        clause = clause_of(condition)
        if not clause.doubtful:
            return self.count_expression(clause.expression)
        certain = self.count_expression(terms.both(clause.expression, f"not ({clause.doubtful})"))
        return certain + sum(1 for _ in self.walk([schema.ID], condition, among=clause.doubtful))

    def count_expression(self, expression: str) -> int:
        """Return the number of records that meet a filter expression of Milvus; empty: of all records."""
        return int(self._query(filter=expression, output_fields=["count(*)"])[0]["count(*)"])

    def nearest(self, queries: Matrix, limit: int, ef: int, expression: str, output: list[str]) -> list[Any]:
        """Search the HNSW index of Milvus for the records nearest to each query.

        Args:
            queries: float32 (queries, dimensions); under COSINE prepared by `metric.prepare`.
            limit: most hits of each query, at most 16,384.
            ef: number of candidates that the search keeps.
            expression: a filter expression of Milvus that hits must meet; empty: none.
            output: names of the fields that hits have.

        Returns:
            For each query the hits of pymilvus, nearest first.
        """
        return self._loaded(
            lambda: list(
                self.call(
                    "search",
                    data=list(queries),
                    anns_field=schema.VECTOR,
                    limit=limit,
                    filter=expression,
                    search_params={"params": {"ef": ef}},
                    output_fields=output,
                    consistency_level="Strong",
                )
            )
        )

    def _query(self, **arguments: Any) -> list[dict[str, Any]]:
        return self._loaded(lambda: list(self.call("query", consistency_level="Strong", **arguments)))

    def _loaded(self, read: Callable[[], Result]) -> Result:
        """Run a read. If the collection is not loaded, as after a restart of Milvus, load it and run the read again.

        Raises:
            ServiceError: the error of the read; DEADLINE_EXCEEDED if the call that this thread runs is cancelled before
            the read begins.
        """
        cancellation.check()
        try:
            return read()
        except ServiceError as error:
            if error.reason != NOT_LOADED:
                raise
        self.call("load_collection")
        return read()


def clause_of(condition: Filter | None) -> terms.Clause:
    """Compile a filter to filter expressions of Milvus. None, no filter, becomes the clause that all records meet."""
    return terms.EVERYTHING if condition is None else terms.compile_filter(condition)


def _id(row: dict[str, Any]) -> str:
    return str(row[schema.ID])
