"""Search in a collection in Milvus: by Milvus's graph, or by comparing vectors in the emberpc server."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from emberpc.server.collections.filters import Filter, matches
from emberpc.server.collections.metric import nearest, prepare
from emberpc.server.collections.types import Distance, Matrix, Plan, SearchOutcome, SearchStrategy, StoredRecord
from emberpc.server.milvus import schema
from emberpc.server.milvus.reading import Reader, milvus_filter

#: Limit of the number of queries of one call to Milvus times their greatest `top_k`, since a response of Milvus may
#: have at most 100 MB. Milvus is asked for one hit more of each query, and for `_DOUBT` times as many if the filter may
#: have records for which Milvus cannot decide (doubtful records).
_HITS_AT_ONCE = 10_000
#: If a request sets no ef: minimum ef, and ef for each wanted hit of a query. The ef is the greater of the two, as in
#: the embedded backend before it measures a graph. A filter makes ef greater, see `Searcher._ask`.
_MIN_EF, _EF_PER_HIT = 200, 2
#: Milvus's limits of ef, and of the hits of one query.
_MAX_EF, _MAX_LIMIT = 32_768, 16_384
#: If a filter may have doubtful records, for which Milvus cannot decide whether they meet the filter (see
#: `terms.MilvusFilter`), Milvus is asked for this many times the wanted hits, since the server drops those that do not
#: meet the filter.
_DOUBT = 4
#: If there is a filter and at most this many records may meet it, the server compares all their vectors with the query.
#: The result is then exact, while a search of Milvus's graph may find only some of these records.
_FEW = 2000
#: If Milvus found too few hits (see `Searcher._hits`), and at most this many records meet the filter (without a filter:
#: exist), the server compares their vectors. With more records that would take too long.
_MANY = 100_000
#: Maximum number of vectors that the server compares at a time, to save memory.
_BATCH = 1000


@dataclass(frozen=True)
class Request:
    """Queries with the same ef.

    Attributes:
        queries: float32 (queries, dimensions), not prepared.
        top_k: for each query the maximum number of hits.
        exclude: for each query the id of a record that must be no hit, or None.
        ef: candidates that a search of the graph keeps; 0: chosen by `top_k`. The searcher raises ef for a filter, and
            to the number of hits that it asks Milvus for, and lowers it to at most 32,768.
        with_vectors: whether hits have their vectors.
    """

    queries: Matrix
    top_k: Sequence[int]
    exclude: Sequence[str | None]
    ef: int
    with_vectors: bool

    def only(self, rows: Sequence[int]) -> Request:
        """Return a copy of the request with only the queries whose indexes are in `rows`, in the order of `rows`."""
        rows = list(rows)
        return replace(
            self,
            queries=self.queries[rows],
            top_k=[self.top_k[i] for i in rows],
            exclude=[self.exclude[i] for i in rows],
        )


class Searcher:
    """Answers queries on one collection that have the same filter. Create one for each search: it caches a count.

    Args:
        reader: reads the collection.
        condition: the filter; None: no filter.
    """

    def __init__(self, reader: Reader, condition: Filter | None) -> None:
        self._reader = reader
        self._distance = reader.spec.distance
        self._condition = condition
        self._filter = milvus_filter(condition)

    def search(self, request: Request) -> list[SearchOutcome]:
        """Return the outcome of each query of a request, in the order of the queries; errors are those of `Reader`.

        If there is a filter and at most 2,000 records may meet it, the server compares their vectors. Otherwise Milvus
        searches, with a greater ef the fewer records may meet the filter. If Milvus finds fewer than `top_k` hits of a
        query and not all records that meet the filter (without a filter: all records), and these records are at most
        100,000, the server compares their vectors for this query.
        """
        widening = 1.0
        if self._condition is not None:
            matching = self._reader.count_expression(self._filter.expression)
            if matching <= _FEW:
                return self._compare(request)
            widening = self._reader.count() / matching
        outcomes: dict[int, SearchOutcome] = {}
        for rows in _blocks(request.top_k):
            for row, outcome in zip(rows, self._ask(request.only(rows), widening), strict=True):
                if outcome is not None:
                    outcomes[row] = outcome
        short = [row for row in range(len(request.queries)) if row not in outcomes]
        outcomes.update(zip(short, self._compare(request.only(short)) if short else [], strict=True))
        return [outcomes[row] for row in range(len(request.queries))]

    def _ask(self, request: Request, widening: float) -> list[SearchOutcome | None]:
        """Search in Milvus; return the outcome of each query, or None where the server should compare vectors instead.

        Args:
            request: the queries, all for one call to Milvus.
            widening: factor of ef, also of an ef that the request sets: the number of all records, divided by that of
                the records that may meet the filter; 1 without a filter.
        """
        wanted = max(request.top_k) + 1
        keep = max(int((request.ef or max(_MIN_EF, _EF_PER_HIT * wanted)) * widening), wanted)
        limit = min(wanted * _DOUBT if self._filter.doubtful else wanted, _MAX_LIMIT)
        keep = min(max(keep, limit), _MAX_EF)
        cosine = self._distance is Distance.COSINE
        queries = prepare(request.queries, self._distance) if cosine else request.queries
        output = schema.fields(with_vectors=request.with_vectors)
        found = self._reader.nearest(queries, limit, keep, self._filter.expression, output)
        return [
            self._hits(hits, k, exclude, Plan(SearchStrategy.HNSW, keep, 0))
            for hits, k, exclude in zip(found, request.top_k, request.exclude, strict=True)
        ]

    def _hits(self, found: Sequence[Any], k: int, exclude: str | None, plan: Plan) -> SearchOutcome | None:
        """Convert the hits of Milvus for one query to an outcome.

        Args:
            found: hits of pymilvus, nearest first.
            k: maximum number of hits of the outcome.
            exclude: id of a record that must be no hit; None: none.
            plan: how Milvus searched.

        Returns:
            The outcome; with fewer than `k` hits, its plan states a reason. None, so that the server compares vectors,
            if there are fewer than `k` hits, Milvus did not find all records that meet the filter (without a filter:
            all records), and these records are at most 100,000.
        """
        candidates = [(schema.stored(hit["entity"]), schema.score(self._distance, hit["distance"])) for hit in found]
        if self._condition is not None and self._filter.doubtful:
            candidates = [each for each in candidates if matches(self._condition, each[0].metadata)]
        hits = [each for each in candidates if each[0].id != exclude][:k]
        if len(hits) < k and len(candidates) < self._total:
            if self._total <= _MANY:
                return None
            reason = f"the graph led to {len(hits)} of {self._total} records; raise ef"
            return SearchOutcome(hits, replace(plan, shortfall_reason=reason))
        return self._outcome(hits, k, plan, left_out=len(hits) < len(candidates))

    def _compare(self, request: Request) -> list[SearchOutcome]:
        """Compare the queries with the vectors of all records that meet the filter; return the outcome of each query.

        This is slow, but exact unless records change meanwhile: a hit that is deleted after its vector was read is left
        out, and a hit that is replaced has its new content and its old score.
        """
        k = max(request.top_k) + 1
        prepared = prepare(request.queries, self._distance)
        best: list[list[tuple[float, str]]] = [[] for _ in prepared]
        total = 0
        for batch in self._batches():
            total += len(batch)
            vectors = prepare(np.array([row[schema.VECTOR] for row in batch], dtype=np.float32), self._distance)
            rows, scores = nearest(prepared, vectors, k, self._distance)
            for i, (of_query, scored) in enumerate(zip(rows.tolist(), scores.tolist(), strict=True)):
                new = [(score, batch[row][schema.ID]) for row, score in zip(of_query, scored, strict=True)]
                best[i] = sorted([*best[i], *new], key=_score, reverse=True)[:k]
        records = self._records(sorted({each for found in best for _, each in found}), request.with_vectors)
        outcomes = []
        for found, size, exclude in zip(best, request.top_k, request.exclude, strict=True):
            there = [(records[each], score) for score, each in found if each in records]
            hits = [each for each in there if each[0].id != exclude][:size]
            plan = Plan(SearchStrategy.EXACT, 0, total)
            outcomes.append(self._outcome(hits, size, plan, left_out=len(hits) < len(there)))
        return outcomes

    def _batches(self) -> Iterator[list[dict[str, Any]]]:
        batch: list[dict[str, Any]] = []
        for row in self._reader.walk([schema.ID, schema.VECTOR], self._condition):
            batch.append(row)
            if len(batch) == _BATCH:
                yield batch
                batch = []
        if batch:
            yield batch

    def _records(self, ids: Sequence[str], with_vectors: bool) -> dict[str, StoredRecord]:
        rows = self._reader.by_id(ids, schema.fields(with_vectors=with_vectors))
        return {record.id: record for record in map(schema.stored, rows)}

    @cached_property
    def _total(self) -> int:
        """Number of records that meet the filter; of all records without a filter. Counted once, at the first use."""
        return self._reader.count(self._condition)

    def _outcome(self, hits: list[tuple[StoredRecord, float]], k: int, plan: Plan, *, left_out: bool) -> SearchOutcome:
        if len(hits) == k:
            return SearchOutcome(hits, plan)
        records = f"{self._total} record{'' if self._total == 1 else 's'}"
        matching = f"{records} match{'es' if self._total == 1 else ''} the filter"
        reason = f"the collection holds {records}" if self._condition is None else matching
        return SearchOutcome(
            hits, replace(plan, shortfall_reason=f"{reason}, the record asked about left out" if left_out else reason)
        )


def _score(found: tuple[float, str]) -> float:
    return found[0]


def _blocks(sizes: Sequence[int]) -> Iterator[list[int]]:
    """Group queries, each group for one call to Milvus; yield each group as a list of indexes of `sizes`.

    In a group, the greatest top_k is at most twice the smallest, and the number of queries times the greatest top_k is
    at most 10,000.

    Args:
        sizes: top_k of each query, at most 10,000.
    """
    order = np.argsort(np.array(sizes), kind="stable").tolist()
    block: list[int] = []
    for row in order:
        # All queries of a call to Milvus have the same limit of hits, the greatest top_k. So a query with a small top_k
        # would get many hits in vain.
        if block and ((len(block) + 1) * sizes[row] > _HITS_AT_ONCE or sizes[row] > 2 * sizes[block[0]]):
            yield block
            block = []
        block.append(row)
    if block:
        yield block
