"""The search methods of a collection: validate the arguments, and pass requests to the searchers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from emberpc.server.collections.filters import Filter
from emberpc.server.collections.metric import prepare_queries
from emberpc.server.collections.types import WHOLE_RECORD, CollectionSpec, Fusion, Matrix, RecordParts, SearchOutcome
from emberpc.server.collections.validation import check_search
from emberpc.server.errors import invalid, items_of
from emberpc.server.index.call_gate import CallGate
from emberpc.server.index.jobs.graph_maintenance import GraphMaintenance
from emberpc.server.index.search.dense import DenseRequest, DenseSearcher
from emberpc.server.index.search.hybrid import HybridSearcher, LexicalRequest, fusion_depths
from emberpc.server.index.search.probe import Probe
from emberpc.server.index.storage.store import Store

#: Function that returns the path of the vector of query i for error messages, such as `queries[0].vector`.
_VECTOR = items_of("queries", "vector")


class CollectionSearchMethods:
    """Mixin of `Collection` with the methods for dense, lexical and hybrid search; `Collection` sets the attributes.

    Every method may also raise the errors that `Collection` lists.
    """

    spec: CollectionSpec
    _calls: CallGate
    _store: Store
    _searcher: DenseSearcher
    _hybrid: HybridSearcher
    _graph_maintenance: GraphMaintenance
    _probe: Probe
    #: Requests maintenance of the collection as soon as possible; maintenance repeats probed searches.
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
        """Search for the records nearest to each query.

        Args:
            queries: float32 (queries, dimensions).
            top_k: maximum number of hits of a query, 1 to 10,000: a number for all queries, or a sequence with a number
                for each.
            ef: number of candidates that the search of the graph keeps, at most 1,000,000; 0: chosen by the greatest
                `top_k`, `min_recall`, and measurements of the graph, or every vector is compared. More are kept if `ef`
                is not greater than the greatest `top_k`; more may be kept with a filter.
            min_recall: share of the true nearest records to be found, in (0, 1], as measured on this collection; 0: no
                target. Every vector is compared if this is 1, the recall of the graph is not measured, or no measured
                `ef` reaches it. Must be 0 if `ef` is not 0.
            exclude_ids: for each query an id to leave out of its hits, or None; empty: no ids.
            with_vectors: whether the hits contain their vectors, not prepared.
            conditions: for each query the validated filter that its hits must meet, or None; empty: no filters.
            parts: parts of a record that the hits must contain; they may contain more.

        Returns:
            For each query, in order, the hits, best first, and the plan; an empty list if there are no queries.

        Raises:
            ServiceError: INVALID_ARGUMENT if an argument is invalid, RESOURCE_EXHAUSTED if the records to read from the
                database, without their vectors, have too many bytes for one response, DEADLINE_EXCEEDED if the call is
                cancelled, UNAVAILABLE after the collection is closed for good or deleted.
        """
        prepared = prepare_queries(queries, self.spec.dimensions, self.spec.distance, _VECTOR)
        sizes = [top_k] * len(queries) if isinstance(top_k, int) else list(top_k)
        excluded = list(exclude_ids) or [None] * len(queries)
        check_search(len(queries), sizes, len(excluded), ef, min_recall)
        if not len(queries):
            return []
        with self._calls.enter(), self._store.response_bytes.limited(parts):
            request = self._request(prepared, sizes, excluded, ef, with_vectors, conditions, min_recall)
            # Only searches without filters are probed: the figures are to show the recall of plain graph searches.
            probed = not any(request.conditions) and self._probe.should_sample()
            sequence = self._store.sequence() if probed else 0
            outcomes = self._searcher.search(request)
        if probed and self._probe.offer(request, outcomes, sequence):
            self._wake()
        return outcomes

    def search_lexical(
        self,
        texts: Sequence[str],
        top_k: Sequence[int],
        *,
        with_vectors: bool = False,
        conditions: Sequence[Filter | None] = (),
        parts: RecordParts = WHOLE_RECORD,
    ) -> list[SearchOutcome]:
        """Search for records whose text contains at least one word of a query; rank them by BM25.

        `HybridSearcher.search_lexical` says which common words are left out.

        Args:
            texts: the text of each query.
            top_k: maximum number of hits of each query, 1 to 10,000.
            with_vectors: as in `search`.
            conditions: as in `search`.
            parts: as in `search`.

        Returns:
            For each query, in order, the hits, best first, and the plan.

        Raises:
            ServiceError: INVALID_ARGUMENT if `top_k` is invalid, DATA_LOSS if the word index is damaged, INTERNAL if a
                rebuild of the damaged index has failed, RESOURCE_EXHAUSTED, DEADLINE_EXCEEDED and UNAVAILABLE as by
                `search`.
            ValueError: `conditions` is not empty and has not one item for each text.
        """
        check_search(len(texts), top_k, len(texts), 0)
        with self._calls.enter(), self._store.response_bytes.limited(parts):
            clauses = [self._store.compile(condition) for condition in conditions] or [None] * len(texts)
            return self._hybrid.search_lexical(LexicalRequest(texts, top_k, clauses, with_vectors))

    def search_hybrid(
        self,
        queries: Matrix,
        texts: Sequence[str],
        top_k: Sequence[int],
        *,
        dense_weight: float,
        fusion: Fusion = Fusion.BOUNDS,
        ef: int = 0,
        min_recall: float = 0,
        with_vectors: bool = False,
        conditions: Sequence[Filter | None] = (),
        parts: RecordParts = WHOLE_RECORD,
    ) -> list[SearchOutcome]:
        """Search for records by vectors and by words, and fuse both rankings.

        Args:
            queries: vector of each query, float32 (queries, dimensions); at least one.
            texts: text of each query.
            top_k: maximum number of hits of each query, 1 to 10,000.
            dense_weight: weight of the dense ranking, 0 to 1 (not checked here); the lexical ranking has 1 minus this.
            fusion: the rule that joins the rankings.
            ef: as in `search`, but with the number of dense hits that are fused (`fusion_depths`) in place of `top_k`.
            min_recall: as in `search`, for the dense ranking.
            with_vectors: as in `search`.
            conditions: as in `search`.
            parts: as in `search`.

        Returns:
            For each query, in order, the hits, best first, and the plan.

        Raises:
            ServiceError: INVALID_ARGUMENT if an argument is invalid, DATA_LOSS if the word index is damaged, INTERNAL
                if a rebuild of the damaged index has failed, RESOURCE_EXHAUSTED, DEADLINE_EXCEEDED and UNAVAILABLE as
                by `search`. The bytes are those of the records to read for both rankings, before fusion.
        """
        prepared = prepare_queries(queries, self.spec.dimensions, self.spec.distance, _VECTOR)
        if len(texts) != len(queries):
            raise invalid("queries", f"has {len(texts)} texts for {len(queries)} vectors; give one for each")
        check_search(len(queries), top_k, len(queries), ef, min_recall)
        with self._calls.enter(), self._store.response_bytes.limited(parts):
            return self._hybrid.search_hybrid(
                self._request(
                    prepared, fusion_depths(top_k), [None] * len(queries), ef, with_vectors, conditions, min_recall
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
    ) -> DenseRequest:
        if conditions and len(conditions) != len(queries):
            raise invalid("conditions", f"has {len(conditions)} items for {len(queries)} queries; give one for each")
        maximum = max(top_k)
        keep = self._graph_maintenance.ef_chooser.ef(maximum, ef, min_recall)
        return DenseRequest(
            queries,
            top_k,
            excluded,
            max(keep or 0, maximum + 1),
            with_vectors,
            [self._store.compile(condition) for condition in conditions] or [None] * len(queries),
            exact=keep is None,
        )
