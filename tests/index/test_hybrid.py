"""Lexical and hybrid search: any text is a valid query, and writes are found immediately."""

from __future__ import annotations

import sqlite3
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emberpc.server.collections import CollectionSpec, Fusion, NewRecord, SearchStrategy
from emberpc.server.collections.filters import Comparison, Filter, Operator
from emberpc.server.errors import Code
from emberpc.server.index import Collection, Index
from emberpc.server.index.search import hybrid
from emberpc.server.index.storage.lexical_terms import _folded, search_text, words_of
from index.support import gaussian, make_older, refused

TEXTS = {
    "whale": "A captain hunts a white whale across the oceans",
    "ring": "A small folk carries a ring to a volcano",
    "bees": "How to keep bees and harvest honey",
    "honey": "Honey, honey, honey: recipes with HONEY",
    "empty": "",
}


@pytest.fixture
def books(collection: Collection) -> Collection:
    new = [NewRecord(key, text, {"long": len(text) > 36}) for key, text in TEXTS.items()]
    collection.upsert(new, gaussian(len(new), 16))
    return collection


def words(collection: Collection, text: str, k: int = 10, conditions: Sequence[Filter] = ()) -> list[str]:
    (outcome,) = collection.search_lexical([text], [k], conditions=conditions)
    assert [score for _, score in outcome.hits] == sorted((score for _, score in outcome.hits), reverse=True)
    return [record.id for record, _ in outcome.hits]


def test_words_are_found_in_any_case_and_inflection(books: Collection) -> None:
    assert words(books, "HONEY") == ["honey", "bees"]
    assert words(books, "hunting whales") == ["whale"]
    assert set(words(books, "ring, or whale?")) == {"ring", "whale"}
    assert words(books, "honey", 1) == ["honey"]
    assert words(books, "zebra") == []


def test_the_plan_of_a_lexical_search_states_strategy_and_counts(books: Collection) -> None:
    one, none = books.search_lexical(["volcano", "…"], [3, 3])
    assert (one.plan.strategy, one.plan.ef, one.plan.compared_count) == (SearchStrategy.LEXICAL, 0, 0)
    assert one.plan.shortfall_reason == "1 record has a word of the query"
    assert one.plan.lexical_count == 1
    assert none.plan.shortfall_reason == "0 records have a word of the query"


def test_filters_apply_to_lexical_and_hybrid_searches(books: Collection) -> None:
    long = Comparison("long", Operator.EQUAL, True)
    assert set(words(books, "honey whale", conditions=[long])) == {"whale", "honey"}
    (outcome,) = books.search_hybrid(gaussian(1, 16), ["honey"], [10], dense_weight=0.5, conditions=[long])
    assert {record.id for record, _ in outcome.hits} == {"whale", "ring", "honey"}
    assert outcome.plan.shortfall_reason == "3 records match the filter"


def test_words_of_every_write_are_found_immediately(books: Collection) -> None:
    books.upsert([NewRecord("bees", "Wax")], gaussian(1, 16))
    assert words(books, "honey") == ["honey"]
    assert words(books, "wax") == ["bees"]
    books.delete(["honey", "empty"])
    assert words(books, "honey") == []
    books.delete_matching(Comparison("long", Operator.EQUAL, True))
    assert words(books, "whale ring wax") == ["bees"]


@pytest.mark.parametrize("fusion", [Fusion.BOUNDS, Fusion.SCORES])
def test_hybrid_search_has_the_hits_of_both_rankings(books: Collection, fusion: Fusion) -> None:
    query = gaussian(1, 16)  # the vector of `whale`
    (dense,) = books.search(query, 5)
    (both,) = books.search_hybrid(query, ["honey"], [5], dense_weight=0.5, fusion=fusion)
    assert {record.id for record, _ in both.hits} == set(TEXTS)
    assert both.plan.lexical_count == 2
    (only_dense,) = books.search_hybrid(query, ["honey"], [5], dense_weight=1, fusion=fusion)
    assert [record.id for record, _ in only_dense.hits] == [record.id for record, _ in dense.hits]
    (lexical,) = books.search_hybrid(query, ["honey"], [2], dense_weight=0, fusion=fusion)
    assert [record.id for record, _ in lexical.hits] == ["honey", "bees"]


def test_the_lexical_share_depends_on_the_words_and_not_on_records_without_text(books: Collection) -> None:
    def shares(query: str) -> dict[str, float]:
        (outcome,) = books.search_hybrid(gaussian(1, 16), [query], [9], dense_weight=0)
        return {record.id: score for record, score in outcome.hits if score}

    before = shares("honey")
    assert before["honey"] > before["bees"] > 0.3
    # Half of the words, and a word that no text has, which does not count.
    assert shares("honey volcano")["honey"] < 0.6 * before["honey"]
    assert shares("honey zebra") == pytest.approx(before)
    books.upsert([NewRecord(f"empty{i}", "") for i in range(50)], gaussian(50, 16))
    assert shares("honey") == pytest.approx(before)


def test_hybrid_search_joins_rankings_by_ranks(books: Collection) -> None:
    query = gaussian(1, 16)
    (dense,), (lexical,) = books.search(query, 5), books.search_lexical(["honey"], [5])
    places = [{record.id: rank for rank, (record, _) in enumerate(each.hits, 1)} for each in (dense, lexical)]
    for weight in (0.0, 0.3, 1.0):
        (both,) = books.search_hybrid(query, ["honey"], [5], dense_weight=weight, fusion=Fusion.RANKS)
        expected = {
            key: sum(
                share / (60 + ranks[key])
                for share, ranks in zip((weight, 1 - weight), places, strict=True)
                if key in ranks
            )
            for key in TEXTS
        }
        assert {record.id: score for record, score in both.hits} == pytest.approx(expected)
        assert [score for _, score in both.hits] == pytest.approx(sorted(expected.values(), reverse=True))


def test_words_of_most_texts_are_ignored_in_large_collections_unless_alone(
    books: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hybrid, "_LARGE", 10)
    books.upsert([NewRecord(f"the{i}", f"the {i}") for i in range(10)], gaussian(10, 16))
    (both,) = books.search_lexical(["the volcano, zebra"], [20])
    assert [record.id for record, _ in both.hits] == ["ring"]
    (common,) = books.search_lexical(["the"], [20])
    assert len(common.hits) == 11


def test_hybrid_search_needs_a_text_for_each_vector(books: Collection) -> None:
    with refused(Code.INVALID_ARGUMENT, "one for each"):
        books.search_hybrid(gaussian(2, 16), ["honey"], [5, 5], dense_weight=0.5)


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Collection]:
    opened = Index(tmp_path_factory.mktemp("words"))
    collection = opened.create(CollectionSpec("c", 16))
    collection.upsert([NewRecord("a", 'AND "near" NOT* (x OR) col:umn ^y -z')], gaussian(1, 16))
    yield collection
    opened.close()


@given(st.text(max_size=40) | st.text("\"'*():^-+ ANDORTE{}\\\0é", max_size=20))
def test_any_text_is_accepted_as_a_lexical_query(searched: Collection, text: str) -> None:
    (outcome,) = searched.search_lexical([text], [5])
    assert len(outcome.hits) <= 1
    (found,) = searched.search_lexical([f'{text} "near"'], [5])
    assert len(found.hits) == 1


@pytest.mark.parametrize("version", [0, 4, 6])
def test_texts_of_an_older_database_are_found(tmp_path: Path, version: int) -> None:
    index = Index(tmp_path)
    collection = index.create(CollectionSpec("c", 16))
    texts = {**TEXTS, "foot": "Auf dem Fuß", "city": "北京大学"}
    collection.upsert([NewRecord(key, text) for key, text in texts.items()], gaussian(len(texts), 16))
    index.close()
    (database,) = tmp_path.glob("collections/*/records.db")
    with closing(sqlite3.connect(database)) as connection:
        make_older(connection, version)
    index = Index(tmp_path)
    collection = index.get("c")
    assert words(collection, "honey") == ["honey", "bees"]
    assert words(collection, "fuß") == ["foot"]
    assert words(collection, "大学") == ["city"]
    collection.delete(["empty", "honey", "city"])
    assert words(collection, "honey") == ["bees"]
    assert words(collection, "大学") == []
    assert [problem for step in collection.verify() for problem in step.problems] == []
    index.close()


#: Texts, the words that version 6 indexed of them (None: the text itself), and a query that finds them now.
_FORMER = {
    "shy": ("Der Bundes\u00adkanzler sprach", "der bundes kanzler sprach", "Bundeskanzler"),
    "variation": ("葛\U000e0100城市", " 葛 \U000e0100 城 城市 市 ", "葛城"),
    "forms": ("Kapitel Ⅷ, 20 m²", "kapitel ⅷ  20 m²", "viii"),
    "same": ("Der Fuß", "der fuss", "Fuß"),
    "ascii": ("how to keep bees", None, "bees"),
}


def test_words_indexed_by_the_former_rule_are_converted(tmp_path: Path) -> None:
    with closing(Index(tmp_path)) as index:
        new = [NewRecord(key, text) for key, (text, _, _) in _FORMER.items()]
        index.create(CollectionSpec("c", 16)).upsert(new, gaussian(len(new), 16))
    (database,) = tmp_path.glob("collections/*/records.db")
    with closing(sqlite3.connect(database)) as connection:
        connection.executemany(
            "UPDATE records SET search_text = ? WHERE id = ?", [(was, key) for key, (_, was, _) in _FORMER.items()]
        )
        connection.execute("INSERT INTO words (words) VALUES ('delete-all')")
        connection.execute("INSERT INTO words (rowid, text) SELECT label, coalesce(search_text, text) FROM records")
        assert connection.execute("SELECT count(*) FROM words WHERE words MATCH 'kanzler'").fetchone() == (1,)
        make_older(connection, 6)
        connection.commit()
    with closing(Index(tmp_path)) as index:
        collection = index.get("c")
        assert {key: words(collection, query) for key, (_, _, query) in _FORMER.items()} == {
            key: [key] for key in _FORMER
        }
        assert words(collection, "kanzler") == []
        assert [problem for step in collection.verify() for problem in step.problems] == []
        collection.delete(list(_FORMER))
        writer = collection._store._writer
        writer.execute("INSERT INTO words (words) VALUES ('optimize')")
        assert writer.execute("SELECT count(*) FROM words_docsize").fetchone() == (0,)
        assert writer.execute("SELECT count(*) FROM words WHERE words MATCH 'bundes OR kanzler'").fetchone() == (0,)


def test_the_index_text_has_at_most_twice_the_length_of_a_long_text() -> None:
    """One character can be replaced by up to 18, and runs without spaces are indexed by characters and pairs."""
    for form in "\ufdfa\u3316\u337f":
        whole = form * 5000
        assert len(_folded(whole)) <= 2 * len(whole) + 1000
        assert search_text(whole)
    assert words_of("\u337f") == ["株式", "式会", "会社"]


def test_compatibility_forms_of_letters_and_digits_are_replaced() -> None:
    """All compatibility forms of NFKC are replaced, except for fractions and Hangul letters outside of syllables.

    The forms that Unicode added after version 14 are not replaced: words stored before would not be found any more.
    """
    added = {*range(0x1CCD6, 0x1CCFA), *range(0x1E030, 0x1E06E)}
    left = set[str]()
    for code in [each for each in range(0x80, 0x20000) if each not in added]:
        form = chr(code)
        usual = unicodedata.normalize("NFKC", form)
        if usual == unicodedata.normalize("NFC", form) or not any(unicodedata.category(c)[0] in "LN" for c in usual):
            continue
        if _folded(f"x{form}y").split() not in (_folded(f"x{usual}y").split(), _folded(f"x {usual} y").split()):
            left.add(form)
    assert {form for form in left if "\u2044" not in unicodedata.normalize("NFKC", form)} == {
        chr(code) for code in range(0x3131, 0x318F) if code != 0x3164
    }


_MARKS = [
    "\u0301\u0327",
    "\u0301",
    "\u0f73",
    "\u0f71\u0f72",
    "a\u0301" + "\u0345" * 90,
    "\U0001d165\u0315",
    "\uff9e\u0301",
]


@pytest.mark.parametrize("piece", _MARKS)
def test_normalization_is_never_called_with_a_long_run_of_marks(piece: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of a normalization grows with the square of the length of a run."""
    seen: list[str] = []
    normalize = unicodedata.normalize

    def watched(form: Literal["NFC", "NFD", "NFKC"], text: str) -> str:
        seen.append(text)
        return normalize(form, text)

    with monkeypatch.context() as patched:
        patched.setattr(unicodedata, "normalize", watched)
        words_of("word " + piece * 500)
        search_text("word " + piece * 500)
    assert len(seen) >= 4
    longest = run = 0
    for character in normalize("NFD", " ".join(seen)):
        run = run + 1 if unicodedata.combining(character) else 0
        longest = max(longest, run)
    assert longest <= 3 * 30  # a mark decomposes into at most three characters


@given(st.lists(st.sampled_from("aéßІ中\u0301\u0323\u3099カ가 ")).map("".join).filter(lambda text: len(text) < 30))
def test_words_do_not_depend_on_the_unicode_normal_form(text: str) -> None:
    composed = unicodedata.normalize("NFC", text)
    assert words_of(text) == words_of(composed) == words_of(unicodedata.normalize("NFD", text))


#: Texts, and queries that find them.
_FOUND = {
    "Gib der Hund der Fuß": ["Fuß", "FUSS", "fuss", "fuß"],
    "Die STRASSE ist lang": ["Straße", "strasse", "straße"],
    "Die Straße ist lang": ["STRASSE", "Strasse", "straße"],
    "Tiếng Việt đẹp": ["tieng", "Tiếng", "TIẾNG", "viet", unicodedata.normalize("NFD", "Tiếng"), "dep"],
    "Crème brûlée à la carte": ["creme", "BRULEE", "brûlée"],
    "Ødegård på Łódź": ["odegard", "lodz", "Łódź"],
    "İstanbul'da ılık": ["istanbul", "ISTANBUL", "ilik"],
    "Ἀθήνα, ΟΔΟΣ": ["Αθηνα", "οδός", "οδοσ"],
    "Всё ещё там": ["все", "ЕЩЁ", "еще"],
    "שָׁלוֹם": ["שלום"],
    "السَّلَامُ عليكم": ["السلام"],
    "我在北京大学学习": ["北京", "大学", "北京大学", "学"],
    "東京都に住んでいます": ["東京", "京都", "住ん", "都"],
    "ｶﾞﾗｽとガラス ＡＢＣ": ["ガラス", "がらす ガラ", "abc"],
    "กำลังทำงานที่บ้าน": ["ทำงาน", "บ้าน", "ที่"],
    "학교에서 공부합니다": ["학교", "공부", unicodedata.normalize("NFD", "학교"), "교"],
    "हिन्दी में लिखना": ["हिन्दी", "लिखना"],
    "the ﬁrst iPhone手机 of 2024年": ["first", "iphone", "手机", "2024", "年"],
    "naïve “quotes” don’t": ["naive", "quotes", "NAÏVE"],
    "Der Bundes\u00adkanzler, zero\u200bwidth, co\u2060operate": ["Bundeskanzler", "zerowidth", "cooperate"],
    "\ufeffBeginning \u2067left\u200e\u2069 right\u200f": ["beginning", "left", "right", "le\u00adft"],
    "葛\U000e0100城市 क्\u200dष 1\ufe0f\u20e3 می\u200cخواهم": ["葛城", "葛\U000e0101城", "क्ष", "1", "میخواهم"],
    "ﻣﺮﺣﺒﺎ محـــمد ﷺ ﹱ": ["مرحبا", "محمد", "م\u0640حمد", "ﻣﺤﻤﺪ", "صلى"],
    "Ⅷ m² ①番 𝐁𝐨𝐥𝐝 Ĳssel ǅungla ſtop": ["viii", "m2", "M²", "1", "bold", "ijssel", "džungla", "stop"],
    "τῷ λόγῳ": ["τω", "λογω", "τῷ", "ΤῼΙ τω"],
    "Foo™ 20℃ 2½ ⽇本 トヨタ㍿": ["foo", "tm", "20", "2½", "日本", "株式会社", "タ株"],
    "ㅋㅋㅏ ﾊﾝ": ["ㅋㅏ", "ハン"],
}
#: Texts, and queries that must not find them.
_NOT_FOUND = {
    "我在北京大学学习": ["京北", "上海", "北学"],
    "ガラス": ["カ", "カナ"],
    "हिन्दी": ["हद", "न्द"],
    "학교에서": ["교학"],
    "กำลัง": ["ลง"],
    "2½": ["21"],
}


def test_words_are_found_in_many_scripts_and_spellings(collection: Collection) -> None:
    texts = [*_FOUND, *_NOT_FOUND]
    collection.upsert([NewRecord(str(i), text) for i, text in enumerate(texts)], gaussian(len(texts), 16))
    missed = [
        (text, query) for text, queries in _FOUND.items() for query in queries if text not in found(collection, query)
    ]
    assert missed == []
    wrong = [
        (text, query) for text, queries in _NOT_FOUND.items() for query in queries if text in found(collection, query)
    ]
    assert wrong == []
    # Words that a deletion did not remove would be found for other records.
    collection.delete([str(i) for i in range(len(texts))])
    words_left = collection._store._writer.execute("SELECT count(*) FROM words_docsize").fetchone()
    assert words_left == (0,)
    for query in ("Fuß", "北京", "tieng"):
        assert found(collection, query) == []


def found(collection: Collection, query: str) -> list[str]:
    (outcome,) = collection.search_lexical([query], [100])
    return [record.text for record, _ in outcome.hits]


@given(st.text(max_size=12) | st.text("aß İÅ我是ガがｶﾞ학교กำที่é\u0301 हिन्दी_'", max_size=12))
def test_every_word_of_a_text_finds_it(searched: Collection, text: str) -> None:
    searched.upsert([NewRecord("b", text)], gaussian(1, 16, seed=1))
    for word in words_of(text):
        # The Unicode version of SQLite may have fewer letters than that of Python.
        if all(each in _KNOWN or each.isascii() for each in word):
            assert "b" in {record.id for record, _ in searched.search_lexical([word], [5])[0].hits}


_KNOWN = set("ßå我是ガが학교กำที่é हिन्दी")


def test_a_long_query_is_read_up_to_a_limit_of_characters() -> None:
    assert words_of("wörd " * 20_000 + "late") == ["word"]
    assert words_of("word " * 20_000 + "late") == ["word"]
    assert words_of("wörd " * 10_000 + "late") == ["word", "late"]
