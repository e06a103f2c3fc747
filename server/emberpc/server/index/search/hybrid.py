"""Lexical search, and hybrid search: lexical and dense search joined by fusion."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace

from emberpc.server import cancellation
from emberpc.server.collections.types import Fusion, Plan, SearchOutcome, StoredRecord, Strategy
from emberpc.server.index.search.dense import DenseRequest, DenseSearcher
from emberpc.server.index.storage.filter_sql import EVERYTHING, Clause
from emberpc.server.index.storage.lexical_terms import words_of
from emberpc.server.index.storage.store import Store

#: Number of dense hits, and of lexical hits, that are fused: at least the first value, and at least the second value
#: times top_k.
_MIN_DEPTH, _DEPTH_PER_HIT = 100, 2
#: A word in more than this share of the texts is left out of lexical queries: it hardly changes the score of BM25, but
#: takes most of the time.
_COMMON = 0.5
#: In collections with fewer records, lexical queries keep common words too, since there is little time to save.
_LARGE = 1000
#: Attempts of a search that concurrent writes disturb, before it blocks writes.
_TRIES = 2

#: Offset of reciprocal rank fusion, as in the original paper (Cormack, Clarke and Büttcher, 2009) and common since.
_RANK_OFFSET = 60

Hits = Sequence[tuple[StoredRecord, float]]


@dataclass(frozen=True)
class LexicalRequest:
    """Texts to search for, and for each its top_k and filter."""

    texts: Sequence[str]
    top_k: Sequence[int]
    conditions: Sequence[Clause | None]
    with_vectors: bool


class HybridSearcher:
    """Answers lexical and hybrid requests.

    Args:
        store: the records and their word index.
        searcher: the dense searcher.
        write_lock: held by every write.
    """

    def __init__(self, store: Store, searcher: DenseSearcher, write_lock: threading.Lock) -> None:
        self._store = store
        self._searcher = searcher
        self._write_lock = write_lock

    def by_words(self, request: LexicalRequest) -> list[SearchOutcome]:
        """Search the records for the words of each text, ranked by BM25; all texts see one state of the store."""
        with self._store.snapshot():
            return [
                self._by_words(text, k, condition or EVERYTHING, with_vectors=request.with_vectors)
                for text, k, condition in zip(request.texts, request.top_k, request.conditions, strict=True)
            ]

    def by_both(
        self, request: DenseRequest, texts: Sequence[str], top_k: Sequence[int], dense_weight: float, fusion: Fusion
    ) -> list[SearchOutcome]:
        """Search by vectors and by words, and fuse the two rankings.

        Args:
            request: the queries' vectors; its top_k is `fusion_depths(top_k)`, and it leaves no id out.
            texts: the text of each query.
            top_k: limit of the hits of each query.
            dense_weight: weight of the dense ranking, 0 to 1.
            fusion: the fusion rule.
        """
        # Both rankings must see the same state of the store.
        for _ in range(_TRIES):
            sequence = self._searcher.catch_up()
            outcomes = self._by_both(request, texts, top_k, dense_weight, fusion)
            if self._store.sequence() == sequence:
                return outcomes
        with self._write_lock:
            return self._by_both(request, texts, top_k, dense_weight, fusion, settled=True)

    def _by_both(
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
        words = self.by_words(LexicalRequest(texts, request.top_k, request.conditions, request.with_vectors))
        return [
            SearchOutcome(
                fused(by_vector.hits, by_words.hits, dense_weight, fusion, all_lexical=len(by_words.hits) < depth)[:k],
                replace(
                    by_vector.plan,
                    lexical_count=len(by_words.hits),
                    # There are at least as many hits as in the dense ranking.
                    shortfall_reason=by_vector.plan.shortfall_reason if len(by_vector.hits) < k else "",
                ),
            )
            for by_vector, by_words, depth, k in zip(dense, words, request.top_k, top_k, strict=True)
        ]

    def _by_words(self, text: str, k: int, condition: Clause, *, with_vectors: bool) -> SearchOutcome:
        cancellation.check()
        words = self._distinctive_words(words_of(text))
        hits = self._lexical_hits(expression(words), k, condition, with_vectors=with_vectors) if words else []
        count = len(hits)
        reason = ""
        if count < k:
            what = f"{count} record{'' if count == 1 else 's'} ha{'s' if count == 1 else 've'} a word of the query"
            reason = what if condition is EVERYTHING else f"{what} and match{'es' if count == 1 else ''} the filter"
        return SearchOutcome(hits, Plan(Strategy.LEXICAL, 0, 0, reason, count))

    def _lexical_hits(
        self, query: str, k: int, condition: Clause, *, with_vectors: bool
    ) -> list[tuple[StoredRecord, float]]:
        """Return the best hits of an FTS5 query: k, or all if there are fewer."""
        most = k
        while True:
            found = self._store.lexical_matches(query, most, condition)
            records = self._store.by_label([label for label, _ in found], with_vectors=with_vectors)
            hits = [(records[label], score) for label, score in found if label in records][:k]
            if len(hits) == k or len(found) < most:
                return hits
            most += k - len(hits)  # one more for each hit whose record turned out to be damaged

    def _distinctive_words(self, words: list[str]) -> list[str]:
        """Drop words that most texts of a large collection contain, unless no other word is found."""
        total = self._store.count()
        if total < _LARGE:
            return words
        counts = {}
        for word in words:
            cancellation.check()
            counts[word] = self._store.count_lexical_matches(expression([word]))
        return [word for word, count in counts.items() if 0 < count <= _COMMON * total] or words


def fusion_depths(top_k: Sequence[int]) -> list[int]:
    """Return how many dense and lexical hits to fetch for each query so that top_k remain after fusion."""
    return [max(_MIN_DEPTH, _DEPTH_PER_HIT * k) for k in top_k]


def expression(words: Sequence[str]) -> str:
    """Return the FTS5 query for texts that contain any of the words."""
    # Quotes keep FTS5 from reading a word as an operator.
    return " OR ".join(f'"{word}"' for word in words)


def fused(
    dense: Hits, lexical: Hits, dense_weight: float, fusion: Fusion, *, all_lexical: bool
) -> list[tuple[StoredRecord, float]]:
    """Fuse two rankings.

    Args:
        dense: hits of the dense search, best first.
        lexical: hits of the lexical search, best first.
        dense_weight: weight of `dense`, 0 to 1.
        fusion: by scores, scaled to 0 for the least and 1 for the best, or by reciprocal ranks. Measured on SciFact's
            training queries: nDCG@10 of 0.745 by scores, and of 0.730 by ranks at best.
        all_lexical: whether `lexical` has all records with a word of the query. Then the least score is that of a
            record without these words, 0.

    Returns:
        The hits of both, best first, with the weighted sums of scaled scores or reciprocal ranks.
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


def _scaled(hits: Hits, least: float | None = None) -> list[float]:
    """Return the scores of hits scaled to 1 for the best, and to 0 for the last or for `least`."""
    if not hits:
        return []
    best, low = hits[0][1], hits[-1][1] if least is None else least
    return [(score - low) / (best - low) if best > low else 1.0 for _, score in hits]
