"""Read the records of a collection in Milvus by id, in byte order of ids or nearest to a vector, and count them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from emberpc.server import cancellation
from emberpc.server.collections.filters import Filter, matches
from emberpc.server.collections.types import CollectionSpec, Matrix
from emberpc.server.errors import ServiceError
from emberpc.server.milvus import schema, terms
from emberpc.server.milvus.connection import NOT_LOADED, Connection

#: Maximum number of ids in one call of `Reader.by_id` to Milvus: the filter expression lists them. More ids take
#: several calls.
_IDS_AT_ONCE = 1000
#: Default of the maximum number of rows that one call to Milvus returns in `Reader.walk`, so that a response stays
#: small.
_ROWS_AT_ONCE = 1000

Result = TypeVar("Result")


class Reader:
    """Reads a collection in Milvus. Safe to use from several threads.

    Each read sees every write that was acknowledged before the read. A method that calls Milvus several times may see
    several states of the collection.

    Every method may raise the errors of `Connection.call`. Every method except `call` also raises DEADLINE_EXCEEDED if
    the call that this thread runs is cancelled; this is checked before each read of Milvus.

    Args:
        connection: the connection to Milvus.
        spec: the spec of the collection.
    """

    def __init__(self, connection: Connection, spec: CollectionSpec) -> None:
        self.spec = spec
        self._connection = connection
        self._name = schema.milvus_name(spec.name)

    def call(self, method: str, **arguments: Any) -> Any:
        """Call `method` of `MilvusClient` with `arguments` and the collection's name in Milvus; return its result."""
        return self._connection.call(f"collection {self.spec.name!r}", method, collection_name=self._name, **arguments)

    def by_id(self, ids: Sequence[str], output: list[str]) -> Iterator[dict[str, Any]]:
        """Yield a dict of the fields `output` for each record with one of the given ids, in no particular order.

        Ids without a record are left out. A repeated id yields its record once.
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
        """Yield a dict of some fields for each record that meets a filter, in byte order of ids.

        Args:
            output: names of the fields; must contain `id`. If Milvus cannot decide for some records whether they meet
                the filter (doubtful records, see `terms.MilvusFilter`), the dicts have `metadata` too: this method
                evaluates the filter on it.
            condition: the filter; None: all records.
            after: only records with greater ids are yielded; empty: all records.
            batch: maximum number of rows that one call to Milvus returns.
            among: a further filter expression of Milvus; a record must meet both it and `condition`; empty: none.
        """
        compiled = milvus_filter(condition)
        while True:
            rows = self._query(
                filter=terms.both(schema.behind(after), compiled.expression, among),
                output_fields=[*output, "metadata"] if compiled.doubtful else output,
                limit=batch,
                # pymilvus's own iterator sets these two options too. Without them, Milvus may return any `limit` rows
                # that meet the filter; with them, it returns the rows with the smallest ids.
                iterator="True",
                reduce_stop_for_best=True,
            )
            rows.sort(key=_id)
            for row in rows:
                if condition is None or not compiled.doubtful or matches(condition, schema.metadata(row)):
                    yield row
            if len(rows) < batch:
                return
            after = rows[-1][schema.ID]

    def count(self, condition: Filter | None = None) -> int:
        """Return the number of records that meet the filter `condition`; None: of all records.

        Milvus counts the records for which it can decide whether they meet the filter. For the others, the doubtful
        records (see `terms.MilvusFilter`), this method reads the metadata and evaluates the filter.
        """
        compiled = milvus_filter(condition)
        if not compiled.doubtful:
            return self.count_expression(compiled.expression)
        certain = self.count_expression(terms.both(compiled.expression, f"not ({compiled.doubtful})"))
        return certain + sum(1 for _ in self.walk([schema.ID], condition, among=compiled.doubtful))

    def count_expression(self, expression: str) -> int:
        """Return the number of records that meet a filter expression of Milvus; empty: of all records."""
        return int(self._query(filter=expression, output_fields=["count(*)"])[0]["count(*)"])

    def nearest(self, queries: Matrix, limit: int, ef: int, expression: str, output: list[str]) -> list[Any]:
        """Search the HNSW index of Milvus for the records nearest to each query.

        Args:
            queries: float32 (queries, dimensions); under COSINE prepared by `metric.prepare`, else not prepared.
            limit: maximum number of hits of each query, at most 16,384.
            ef: number of candidates that the search keeps, `limit` to 32,768.
            expression: a filter expression of Milvus that hits must meet; empty: none.
            output: names of the fields that hits have.

        Returns:
            For each query its hits, nearest first. A hit is a mapping: `entity` has the fields, and `distance` is the
            value that `schema.score` converts.
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
            ServiceError: the error of the read or of loading; DEADLINE_EXCEEDED if the call that this thread runs is
                cancelled before the first attempt.
        """
        cancellation.check()
        try:
            return read()
        except ServiceError as error:
            if error.reason != NOT_LOADED:
                raise
        self.call("load_collection")
        return read()


def milvus_filter(condition: Filter | None) -> terms.MilvusFilter:
    """Compile a filter to filter expressions of Milvus. None, no filter, becomes the filter that all records meet."""
    return terms.EVERYTHING if condition is None else terms.compile_filter(condition)


def _id(row: dict[str, Any]) -> str:
    return str(row[schema.ID])
