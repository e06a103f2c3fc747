"""Reads of a collection in Milvus."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from emberpc.server import cancellation
from emberpc.server.collections.filters import Filter, matches
from emberpc.server.collections.types import CollectionSpec, Matrix
from emberpc.server.errors import ServiceError
from emberpc.server.milvus import schema, terms
from emberpc.server.milvus.connection import NOT_LOADED, Connection

#: Ids in one expression.
_IDS_AT_ONCE = 1000
#: Rows that one call to Milvus reads when `Reader.walk` reads all records in order.
_ROWS_AT_ONCE = 1000

Result = TypeVar("Result")


class Reader:
    """Reads a collection, including all acknowledged writes. Safe to use from several threads.

    Args:
        connection: the connection to Milvus.
        spec: the spec of the collection.
    """

    def __init__(self, connection: Connection, spec: CollectionSpec) -> None:
        self.spec = spec
        self._connection = connection
        self._name = schema.milvus_name(spec.name)

    def call(self, method: str, **arguments: Any) -> Any:
        """Call a method of `MilvusClient` about the collection; see `Connection.call`."""
        return self._connection.call(f"collection {self.spec.name!r}", method, collection_name=self._name, **arguments)

    def by_id(self, ids: Sequence[str], output: list[str]) -> Iterator[dict[str, Any]]:
        """Yield some fields of the existing records among the ids."""
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
            output: the fields.
            condition: the filter; None: all records.
            after: the id after which to begin.
            batch: rows of one call.
            among: an expression of Milvus that the records must meet too.
        """
        clause = clause_of(condition)
        while True:
            rows = self._query(
                filter=terms.both(schema.behind(after), clause.expression, among),
                output_fields=[*output, "metadata"] if clause.doubtful else output,
                limit=batch,
                # As pymilvus's own iterator does: the first rows by primary key, of all segments.
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
        """Return the number of records that meet a condition."""
        clause = clause_of(condition)
        if not clause.doubtful:
            return self.count_expression(clause.expression)
        certain = self.count_expression(terms.both(clause.expression, f"not ({clause.doubtful})"))
        return certain + sum(1 for _ in self.walk([schema.ID], condition, among=clause.doubtful))

    def count_expression(self, expression: str) -> int:
        """Return the number of records that meet an expression of Milvus."""
        return int(self._query(filter=expression, output_fields=["count(*)"])[0]["count(*)"])

    def nearest(self, queries: Matrix, limit: int, ef: int, expression: str, output: list[str]) -> list[Any]:
        """Search in Milvus; return its hits for each query, nearest first."""
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
        """Run a read; if Milvus no longer has the collection loaded, as after a restart, load it and retry.

        Raises:
            ServiceError: besides those of Milvus, DEADLINE_EXCEEDED if the call of this thread is cancelled.
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
    """Compile a filter to Milvus's expressions."""
    return terms.EVERYTHING if condition is None else terms.compile_filter(condition)


def _id(row: dict[str, Any]) -> str:
    return str(row[schema.ID])
