"""Searches of a collection: their arguments checked, and made into what the searchers take."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from emberpc.server.collections.filters import Filter
from emberpc.server.collections.metric import prepare_queries
from emberpc.server.collections.types import WHOLE_RECORD, CollectionSpec, Fusion, Matrix, RecordParts, SearchOutcome
from emberpc.server.collections.validation import check_search
from emberpc.server.errors import invalid, items_of
from emberpc.server.index.call_gate import CallGate
from emberpc.server.index.jobs.graph_maintenance import GraphMaintenance
from emberpc.server.index.search.dense import DenseSearcher, Request
from emberpc.server.index.search.hybrid import HybridSearcher, WordsRequest, fused_from
from emberpc.server.index.search.probe import Probe
from emberpc.server.index.storage.filter_sql import Clause, compile_filter
from emberpc.server.index.storage.store import Store

#: What a request calls the vector of query i.
_VECTOR = items_of("queries", "vector")


class SearchMethods:
    """The part of `Collection` that searches."""

    spec: CollectionSpec
    _calls: CallGate
    _store: Store
    _searcher: DenseSearcher
    _hybrid: HybridSearcher
    _graph_maintenance: GraphMaintenance
    _probe: Probe
    #: Asks for maintenance.
    _wake: Callable[[], None]

    def search(
        self,
        queries: Matrix,
        top_k: int | Sequence[int],
        *,
        ef: int = 0,
        min_recall: float = 0,
        exclude_ids: Sequence[str | None] = (),
        with_vectors: bool = False,
        conditions: Sequence[Filter | None] = (),
        parts: RecordParts = WHOLE_RECORD,
    ) -> list[SearchOutcome]:
        """Find the records nearest to each query.

        Args:
            queries: float32 (queries, dimensions).
            top_k: most hits, 1 to 10,000; of all queries, or of each.
            ef: candidates that the graph search keeps, up to 1,000,000; 0: chosen by `top_k` and `min_recall`.
            min_recall: share of the true nearest to be found, in (0, 1], as measured of this collection; where that is
                not measured yet, or too much for the graph, every vector is compared. 0: no target. Not beside `ef`.
            exclude_ids: an id to leave out of each query's hits, or None; empty: nothing to leave out.
            with_vectors: whether the hits have their vectors.
            conditions: what the hits of each query must meet, or None; empty: nothing.
            parts: what the records of the hits must have; they may have more.
        """
        prepared = prepare_queries(queries, self.spec.dimensions, self.spec.distance, _VECTOR)
        sizes = [top_k] * len(queries) if isinstance(top_k, int) else list(top_k)
        excluded = list(exclude_ids) or [None] * len(queries)
        check_search(len(queries), sizes, len(excluded), ef, min_recall)
        if not len(queries):
            return []
        with self._calls.one(), self._store.response_bytes.limited(parts):
            request = self._request(prepared, sizes, excluded, ef, with_vectors, conditions, min_recall)
            # Filtered ones have ways of their own to be exact.
            probed = not any(request.conditions) and self._probe.wants_one()
            sequence = self._store.sequence() if probed else 0
            outcomes = self._searcher.search(request)
        if probed and self._probe.offer(request, outcomes, sequence):
            self._wake()
        return outcomes

    def search_words(
        self,
        texts: Sequence[str],
        top_k: Sequence[int],
        *,
        with_vectors: bool = False,
        conditions: Sequence[Filter | None] = (),
        parts: RecordParts = WHOLE_RECORD,
    ) -> list[SearchOutcome]:
        """Find the records with words of each text, best first by BM25; the other arguments are those of `search`."""
        check_search(len(texts), top_k, len(texts), 0)
        clauses = [clause_of(condition) for condition in conditions] or [None] * len(texts)
        with self._calls.one(), self._store.response_bytes.limited(parts):
            return self._hybrid.by_words(WordsRequest(texts, top_k, clauses, with_vectors))

    def search_both(
        self,
        queries: Matrix,
        texts: Sequence[str],
        top_k: Sequence[int],
        *,
        dense_weight: float,
        fusion: Fusion = Fusion.SCORES,
        ef: int = 0,
        min_recall: float = 0,
        with_vectors: bool = False,
        conditions: Sequence[Filter | None] = (),
        parts: RecordParts = WHOLE_RECORD,
    ) -> list[SearchOutcome]:
        """Find records by vectors and by words, fused.

        Args:
            queries: float32 (queries, dimensions).
            texts: the text of each query.
            top_k: most hits of each.
            dense_weight: weight of the ranking by vectors, 0 to 1; that by words has the rest.
            fusion: how the two become one.
            ef: as in `search`.
            min_recall: as in `search`, of the candidates by vectors.
            with_vectors: as in `search`.
            conditions: as in `search`.
            parts: as in `search`.
        """
        prepared = prepare_queries(queries, self.spec.dimensions, self.spec.distance, _VECTOR)
        if len(texts) != len(queries):
            raise invalid("queries", f"has {len(texts)} texts for {len(queries)} vectors; give one for each")
        check_search(len(queries), top_k, len(queries), ef, min_recall)
        with self._calls.one(), self._store.response_bytes.limited(parts):
            return self._hybrid.by_both(
                self._request(
                    prepared, fused_from(top_k), [None] * len(queries), ef, with_vectors, conditions, min_recall
                ),
                texts,
                top_k,
                dense_weight,
                fusion,
            )

    def _request(
        self,
        queries: Matrix,
        top_k: Sequence[int],
        excluded: Sequence[str | None],
        ef: int,
        with_vectors: bool,
        conditions: Sequence[Filter | None],
        min_recall: float,
    ) -> Request:
        if conditions and len(conditions) != len(queries):
            raise invalid("conditions", f"has {len(conditions)} items for {len(queries)} queries; give one for each")
        most = max(top_k)
        keep = self._graph_maintenance.effort.ef(most, ef, min_recall)
        return Request(
            queries,
            top_k,
            excluded,
            max(keep or 0, most + 1),
            with_vectors,
            [clause_of(condition) for condition in conditions] or [None] * len(queries),
            exact=keep is None,
        )


def clause_of(condition: Filter | None) -> Clause | None:
    """Return a condition as SQL; None for none."""
    return None if condition is None else compile_filter(condition)
