"""Fusion of a dense and a lexical ranking: scores of known hits, and the greatest BM25 score."""

from __future__ import annotations

import sqlite3
from contextlib import closing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emberpc.server.collections import Fusion, NewRecord
from emberpc.server.collections.types import StoredRecord
from emberpc.server.index import Collection
from emberpc.server.index.search.fusion import ScoreLimits, fused
from emberpc.server.index.search.hybrid import greatest_bm25
from index.support import gaussian

Records = tuple[StoredRecord, StoredRecord, StoredRecord]


@pytest.fixture
def records(collection: Collection) -> Records:
    """Three records with the ids a, b and c."""
    collection.upsert([NewRecord(key, f"text {key}") for key in "abc"], gaussian(3, 16))
    first, second, third = sorted(
        (record for record, _ in collection.search(gaussian(1, 16), 3)[0].hits), key=lambda record: record.id
    )
    return first, second, third


def limits(dense: float | None = 1.0, lexical: float = 4.0, all_lexical: bool = True) -> ScoreLimits:
    return ScoreLimits(dense, lexical, all_lexical)


def test_scores_are_scaled_by_those_of_their_ranking(records: Records) -> None:
    first, second, third = records
    dense_hits, lexical_hits = [(first, 9.0), (second, 8.0), (third, 5.0)], [(third, 2.0), (second, 1.0)]
    mixed = fused(dense_hits, lexical_hits, 0.5, Fusion.SCORES, limits())
    assert [record for record, _ in mixed] == [second, *sorted([first, third], key=lambda record: record.id)]
    assert [score for _, score in mixed] == pytest.approx([0.375 + 0.25, 0.5, 0.5])
    assert fused(dense_hits, lexical_hits, 0.5, Fusion.SCORES, limits(all_lexical=False))[-1][1] == pytest.approx(0.375)
    assert fused([(first, 1.0)], [(first, 1.0)], 0.5, Fusion.SCORES, limits(all_lexical=False)) == [(first, 1.0)]


def test_scores_are_scaled_by_their_bounds(records: Records) -> None:
    first, second, third = records
    dense_hits, lexical_hits = [(first, 0.8), (second, 0.6), (third, 0.5)], [(third, 2.0), (second, 1.0)]

    def scores(dense: float | None) -> list[float]:
        mixed = dict(fused(dense_hits, lexical_hits, 0.75, Fusion.BOUNDS, limits(dense)))
        return [mixed[record] for record in (first, second, third)]

    assert scores(1.0) == pytest.approx([0.75 * 0.6, 0.75 * 0.2 + 0.25 * 0.25, 0.25 * 0.5])
    # Without a greatest score, as for dot products, or if rounding exceeds it, the best score becomes 1.
    for dense in (None, 0.7):
        assert scores(dense) == pytest.approx([0.75, 0.75 / 3 + 0.25 * 0.25, 0.25 * 0.5])


@pytest.mark.parametrize(
    ("fusion", "dense_score", "lexical_score"),
    [(Fusion.BOUNDS, 0.0, 0.125), (Fusion.SCORES, 0.5, 0.5), (Fusion.RANKS, 0.5 / 61, 0.5 / 61)],
)
def test_rankings_without_hits_or_with_one_can_be_fused(
    records: Records, fusion: Fusion, dense_score: float, lexical_score: float
) -> None:
    record, *_ = records
    one = [(record, 0.5)]
    assert fused([], [], 0.5, fusion, limits(lexical=0.0)) == []
    for (dense, lexical), expected in {(1, 0): dense_score, (0, 1): lexical_score}.items():
        ((found, score),) = fused(one * dense, one * lexical, 0.5, fusion, limits(lexical=2.0))
        assert found is record
        assert score == pytest.approx(expected)


@pytest.mark.parametrize("fusion", [Fusion.BOUNDS, Fusion.SCORES])
def test_scores_that_differ_by_rounding_are_equal(records: Records, fusion: Fusion) -> None:
    """For example, records that are equal to the query; they had scores of 0.7 and 0.0."""
    first, second, _ = records
    mixed = fused([(first, 1.0), (second, 1 - 2**-23)], [], 1.0, fusion, limits())
    assert [score for _, score in mixed] == [1.0, 1.0]


@given(
    st.lists(st.lists(st.sampled_from(["red", "green", "blue", "the"]), max_size=9), min_size=1, max_size=9),
    st.lists(st.sampled_from(["red", "green", "blue", "the", "black"]), min_size=1, max_size=4),
)
def test_no_text_exceeds_the_greatest_bm25_score(texts: list[list[str]], query: list[str]) -> None:
    with closing(sqlite3.connect(":memory:")) as database:
        database.execute("CREATE VIRTUAL TABLE words USING fts5(text)")
        database.executemany("INSERT INTO words VALUES (?)", [(" ".join(text),) for text in texts])
        distinct = sorted(set(query))
        scores = database.execute(
            "SELECT -bm25(words) FROM words WHERE words MATCH ?", (" OR ".join(distinct),)
        ).fetchall()
    counts = [sum(word in text for text in texts) for word in distinct]
    assert all(0 < score <= greatest_bm25(counts, len(texts)) for (score,) in scores)
