"""Lexical search, and hybrid search: lexical and dense search joined by fusion."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace

from emberpc.server import cancellation
from emberpc.server.collections.types import Fusion, Plan, SearchOutcome, SearchStrategy, StoredRecord
from emberpc.server.index.search.dense import DenseRequest, DenseSearcher
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

#: Offset of reciprocal rank fusion, which is added to a rank (from 1) before its reciprocal is taken. It is that of the
#: original paper (Cormack, Clarke and Büttcher, 2009), and common since.
_RANK_OFFSET = 60

Hits = Sequence[tuple[StoredRecord, float]]


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
    """

    def __init__(self, store: Store, searcher: DenseSearcher, write_lock: threading.Lock) -> None:
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
        with self._store.snapshot():
            return [
                self._search_lexical(text, k, condition or EVERYTHING, with_vectors=request.with_vectors)
                for text, k, condition in zip(request.texts, request.top_k, request.conditions, strict=True)
            ]

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
        words = self.search_lexical(LexicalRequest(texts, request.top_k, request.conditions, request.with_vectors))
        outcomes = []
        for dense_outcome, lexical_outcome, depth, k in zip(dense, words, request.top_k, top_k, strict=True):
            all_lexical = len(lexical_outcome.hits) < depth
            hits = fused(dense_outcome.hits, lexical_outcome.hits, dense_weight, fusion, all_lexical=all_lexical)[:k]
            reason = "" if len(hits) >= k else _shortfall_reason(len(hits), dense_outcome)
            plan = replace(dense_outcome.plan, lexical_count=len(lexical_outcome.hits), shortfall_reason=reason)
            outcomes.append(SearchOutcome(hits, plan))
        return outcomes

    def _search_lexical(self, text: str, k: int, condition: Clause, *, with_vectors: bool) -> SearchOutcome:
        cancellation.check()
        words = self._distinctive_words(words_of(text))
        hits = self._lexical_hits(expression(words), k, condition, with_vectors=with_vectors) if words else []
        count = len(hits)
        reason = ""
        if count < k:
            what = f"{count} record{'' if count == 1 else 's'} ha{'s' if count == 1 else 've'} a word of the query"
            reason = what if condition is EVERYTHING else f"{what} and match{'es' if count == 1 else ''} the filter"
        return SearchOutcome(hits, Plan(SearchStrategy.LEXICAL, 0, 0, reason, count))

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

    def _distinctive_words(self, words: list[str]) -> list[str]:
        """Return the words of a query that are in the texts of at least one and at most half of the records.

        Returns all words if none of them is, or if the collection has fewer than `_LARGE` records.
        """
        total = self._store.count()
        if total < _LARGE:
            return words
        counts = {}
        for word in words:
            cancellation.check()
            counts[word] = self._store.count_lexical_matches(expression([word]))
        return [word for word, count in counts.items() if 0 < count <= _COMMON * total] or words


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


def fused(
    dense: Hits, lexical: Hits, dense_weight: float, fusion: Fusion, *, all_lexical: bool
) -> list[tuple[StoredRecord, float]]:
    """Fuse two rankings.

    Args:
        dense: hits of the dense search, best first.
        lexical: hits of the lexical search, best first.
        dense_weight: weight of `dense`, 0 to 1.
        fusion: SCORES: by scores, scaled so that the best of a ranking is 1 and the last is 0. RANKS: by reciprocal
            ranks. Measured on SciFact's training queries: nDCG@10 of 0.745 by scores, and of 0.730 by ranks with the
            best of many settings.
        all_lexical: whether `lexical` has all records with a word of the query; read only under SCORES. If true, the
            BM25 score 0, which all other records have, is scaled to 0, instead of the score of the last lexical hit.

    Returns:
        Each record that is in one or both rankings, with its fused score, greatest first; equal scores in the order of
        ids. The fused score is the weighted sum of a record's scaled scores or reciprocal ranks; a ranking without the
        record counts 0.
    """
    if fusion is Fusion.RANKS:
        worths = [_by_rank(dense), _by_rank(lexical)]
    else:
        worths = [_scaled(dense), _scaled(lexical, 0.0 if all_lexical else None)]
    records: dict[str, StoredRecord] = {}
    scores: dict[str, float] = {}
    for hits, worth, weight in zip((dense, lexical), worths, (dense_weight, 1 - dense_weight), strict=True):
        for (record, _), each in zip(hits, worth, strict=True):
            records[record.id] = record
            scores[record.id] = scores.get(record.id, 0.0) + weight * each
    return [(records[key], score) for key, score in sorted(scores.items(), key=lambda item: (-item[1], item[0]))]


def _by_rank(hits: Hits) -> list[float]:
    return [1 / (_RANK_OFFSET + rank) for rank in range(1, len(hits) + 1)]


def _scaled(hits: Hits, minimum: float | None = None) -> list[float]:
    """Return the scores of hits, best first, scaled linearly: the best score becomes 1, and the score `minimum` 0.

    If `minimum` is None, the score of the last hit becomes 0. All are 1 if the best score is not greater than the score
    that would become 0.
    """
    if not hits:
        return []
    best, low = hits[0][1], hits[-1][1] if minimum is None else minimum
    return [(score - low) / (best - low) if best > low else 1.0 for _, score in hits]
