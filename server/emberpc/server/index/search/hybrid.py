"""Lexical search, and hybrid search: lexical and dense search joined by fusion."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from emberpc.server import cancellation
from emberpc.server.collections.metric import greatest_score
from emberpc.server.collections.types import Distance, Fusion, Plan, SearchOutcome, SearchStrategy, StoredRecord
from emberpc.server.index.search.dense import DenseRequest, DenseSearcher
from emberpc.server.index.search.fusion import ScoreLimits, fused
from emberpc.server.index.storage.filter_sql import EVERYTHING, Clause
from emberpc.server.index.storage.lexical_terms import words_of
from emberpc.server.index.storage.store import Store

#: Maximum number of dense hits, and maximum number of lexical hits, that are fused for a query: the greater of the
#: first value and the second value times top_k.
_MIN_DEPTH, _DEPTH_PER_HIT = 100, 2
#: Greatest share of the records whose texts may contain a word of a lexical query. More common words are left out if
#: the query has rarer words that texts contain: common words hardly change the scores, but take most of the time.
_COMMON = 0.5
#: Minimum number of records of a collection whose lexical queries leave out common words. With fewer there is little
#: time to save.
_LARGE = 1000
#: Attempts of a hybrid search without the write lock. If writes disturb all of them, one more attempt holds the lock.
_TRIES = 2

#: Constants of BM25 in FTS5 (https://sqlite.org/fts5.html#the_bm25_function): what a frequency cannot exceed after its
#: saturation (k1 + 1), and the least weight of a word.
_BM25_FREQUENCY, _BM25_LEAST = 2.2, 1e-6


@dataclass(frozen=True)
class LexicalRequest:
    """Queries of a lexical search: the text, the top_k, and the filter (None: no filter) of each query.

    `with_vectors` is whether the hits contain their vectors.
    """

    texts: Sequence[str]
    top_k: Sequence[int]
    conditions: Sequence[Clause | None]
    with_vectors: bool


class HybridSearcher:
    """Runs lexical and hybrid searches of a collection.

    Args:
        store: the records and their word index.
        searcher: the dense searcher of the same collection.
        write_lock: held by every write, from before the write changes the store until the write has changed memory.
        distance: the distance of the collection's vectors.
    """

    def __init__(self, store: Store, searcher: DenseSearcher, write_lock: threading.Lock, distance: Distance) -> None:
        self._greatest_dense = greatest_score(distance)
        self._store = store
        self._searcher = searcher
        self._write_lock = write_lock

    def search_lexical(self, request: LexicalRequest) -> list[SearchOutcome]:
        """Return for each text at most top_k records that contain a word of the text, best first by BM25.

        The records meet the filter of the text. Words in the texts of more than half of the records can be left out
        (`_distinctive_words`). A text without words has no hits. All texts are searched for in one snapshot of the
        store. If a text has fewer hits than its top_k, the plan of the outcome states why.

        Raises:
            ServiceError: DATA_LOSS if the word index is damaged, INTERNAL if a rebuild of the damaged index has failed;
                DEADLINE_EXCEEDED if the call of this thread is cancelled; the errors of reading the store.
        """
        return [outcome for outcome, _ in self._search_words(request, bounded=False)]

    def search_hybrid(
        self, request: DenseRequest, texts: Sequence[str], top_k: Sequence[int], dense_weight: float, fusion: Fusion
    ) -> list[SearchOutcome]:
        """Search by vectors and by words, and fuse the two rankings; return an outcome for each query, in order.

        The last attempt takes the write lock, so the caller must not hold this lock.

        Args:
            request: the vectors and filters of the queries; `request.top_k` must be `fusion_depths(top_k)`, and each
                item of `request.exclude` None.
            texts: the text of each query.
            top_k: limit of the hits of each query after fusion.
            dense_weight: weight of the dense ranking, 0 to 1; the lexical ranking has 1 minus this weight.
            fusion: the fusion rule.

        Raises:
            ServiceError: the errors of `search_lexical` and of the dense search.
        """
        # Dense and lexical search must see the same state of the store. If a write changed the store during an attempt,
        # both are repeated. The attempt after the loop holds the write lock, so no write can disturb it.
        for _ in range(_TRIES):
            sequence = self._searcher.catch_up()
            outcomes = self._search_hybrid(request, texts, top_k, dense_weight, fusion)
            if self._store.sequence() == sequence:
                return outcomes
        with self._write_lock:
            return self._search_hybrid(request, texts, top_k, dense_weight, fusion, settled=True)

    def _search_hybrid(
        self,
        request: DenseRequest,
        texts: Sequence[str],
        top_k: Sequence[int],
        dense_weight: float,
        fusion: Fusion,
        *,
        settled: bool = False,
    ) -> list[SearchOutcome]:
        dense = self._searcher.search(request, settled=settled)
        words = self._search_words(
            LexicalRequest(texts, request.top_k, request.conditions, request.with_vectors),
            bounded=fusion is Fusion.BOUNDS,
        )
        outcomes = []
        for dense_outcome, (lexical_outcome, greatest), depth, k in zip(
            dense, words, request.top_k, top_k, strict=True
        ):
            limits = ScoreLimits(self._greatest_dense, greatest, all_lexical=len(lexical_outcome.hits) < depth)
            hits = fused(dense_outcome.hits, lexical_outcome.hits, dense_weight, fusion, limits)[:k]
            reason = "" if len(hits) >= k else _shortfall_reason(len(hits), dense_outcome)
            plan = replace(dense_outcome.plan, lexical_count=len(lexical_outcome.hits), shortfall_reason=reason)
            outcomes.append(SearchOutcome(hits, plan))
        return outcomes

    def _search_words(self, request: LexicalRequest, *, bounded: bool) -> list[tuple[SearchOutcome, float]]:
        """Return for each text the outcome, as `search_lexical`, and the greatest score that a text can have for it.

        Without `bounded`, the greatest score is not computed and 0.
        """
        with self._store.snapshot():
            return [
                self._search_text(text, k, condition or EVERYTHING, with_vectors=request.with_vectors, bounded=bounded)
                for text, k, condition in zip(request.texts, request.top_k, request.conditions, strict=True)
            ]

    def _search_text(
        self, text: str, k: int, condition: Clause, *, with_vectors: bool, bounded: bool
    ) -> tuple[SearchOutcome, float]:
        cancellation.check()
        words, total = words_of(text), self._store.count()
        counts = self._counts(words) if bounded or total >= _LARGE else {}
        if total >= _LARGE:
            words = _distinctive_words(counts, total)
        hits = self._lexical_hits(expression(words), k, condition, with_vectors=with_vectors) if words else []
        count = len(hits)
        reason = ""
        if count < k:
            what = f"{count} record{'' if count == 1 else 's'} ha{'s' if count == 1 else 've'} a word of the query"
            reason = what if condition is EVERYTHING else f"{what} and match{'es' if count == 1 else ''} the filter"
        greatest = (
            greatest_bm25([counts[word] for word in words], self._store.count_lexical_matches()) if bounded else 0.0
        )
        return SearchOutcome(hits, Plan(SearchStrategy.LEXICAL, 0, 0, reason, count)), greatest

    def _lexical_hits(
        self, query: str, k: int, condition: Clause, *, with_vectors: bool
    ) -> list[tuple[StoredRecord, float]]:
        """Return the best k records that match an FTS5 query and meet a filter, best first, with their BM25 scores.

        All are returned if there are fewer than k. Damaged records are left out.
        """
        maximum = k
        while True:
            found = self._store.lexical_matches(query, maximum, condition)
            records = self._store.by_label([label for label, _ in found], with_vectors=with_vectors)
            hits = [(records[label], score) for label, score in found if label in records][:k]
            if len(hits) == k or len(found) < maximum:
                return hits
            maximum += k - len(hits)  # one more for each hit whose record turned out to be damaged

    def _counts(self, words: list[str]) -> dict[str, int]:
        """Return the number of records whose text has a word, by word."""
        counts = {}
        for word in words:
            cancellation.check()
            counts[word] = self._store.count_lexical_matches(expression([word]))
        return counts


def _distinctive_words(counts: Mapping[str, int], total: int) -> list[str]:
    """Return the words of a query that are in the texts of at least one and at most half of the records.

    Returns all words if none of them is.

    Args:
        counts: number of records whose text has a word, by word.
        total: number of records.
    """
    return [word for word, count in counts.items() if 0 < count <= _COMMON * total] or list(counts)


def greatest_bm25(counts: Sequence[int], total: int) -> float:
    """Return a BM25 score that no text can exceed: that of a text that has each word infinitely often.

    Args:
        counts: for each word of the query, the number of records whose text has the word. Words that no text has do not
            count.
        total: number of texts in the word index.
    """
    weights = (math.log((total - count + 0.5) / (count + 0.5)) for count in counts if 0 < count <= total)
    return _BM25_FREQUENCY * sum(max(weight, _BM25_LEAST) for weight in weights)


def fusion_depths(top_k: Sequence[int]) -> list[int]:
    """Return for each query the number of dense hits, and of lexical hits, to fetch for fusion; greater than its top_k.

    A record that is below the top_k of one ranking can be among the top_k after fusion.
    """
    return [max(_MIN_DEPTH, _DEPTH_PER_HIT * k) for k in top_k]


def expression(words: Sequence[str]) -> str:
    """Return the FTS5 query that matches the texts with at least one of the words.

    `words` has at least one word; the words are results of `words_of`.
    """
    # Quotes keep FTS5 from reading a word as an operator.
    return " OR ".join(f'"{word}"' for word in words)


def _shortfall_reason(count: int, dense: SearchOutcome) -> str:
    """Return why a fused ranking has only `count` hits, fewer than its top_k.

    The dense ranking then has every record that meets the filter, so its reason applies. A record with a damaged vector
    is an exception: only the lexical ranking has it.
    """
    if count <= len(dense.hits):
        return dense.plan.shortfall_reason
    return f"{count} records have an undamaged vector or a word of the query, and match the filter if there is one"
