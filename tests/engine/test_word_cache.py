"""Ids from cached words equal the ids that the tokenizer gives for the whole text."""

from __future__ import annotations

import threading
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors

from emberpc.server.engine import word_cache
from emberpc.server.engine.word_cache import WordCache
from fixtures_bundles import minilm_source

#: Characters that a normalizer drops, decomposes, separates or joins, or that begin a special token.
PIECES = st.sampled_from(
    list("aé.,[]<ßİ中文👍 \u0301\u226e\x00\x0b\x1c\x85\u00a0\u3000\u200b\ufffd\t\n\r")
) | st.sampled_from(
    ["Hello", "world", "42", "e\u0301", "--", "'s", "[SEP]", "[sep]", "[MASK]", "  ", "\r\n", "x" * 120]
)
TEXTS = st.lists(PIECES | st.characters(codec="utf-8"), max_size=12).map("".join)


def plain(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


@pytest.fixture(scope="module")
def minilm() -> Tokenizer:
    return plain(Tokenizer.from_file(str(minilm_source() / "tokenizer.json")))


@pytest.fixture(scope="module")
def remembered(minilm: Tokenizer) -> WordCache:
    found = WordCache.of(minilm)
    assert found is not None
    return found


def wordpiece(normalizer: normalizers.Normalizer | None = None) -> Tokenizer:
    vocabulary = {
        word: i for i, word in enumerate(["[UNK]", "[CLS]", "[SEP]", "a", "##b", "e", "é", ".", "[", "]", "<"])
    }
    made = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if normalizer is not None:
        made.normalizer = normalizer
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return made


@given(texts=st.lists(TEXTS, min_size=1, max_size=4))
def test_ids_equal_those_of_the_tokenizer(minilm: Tokenizer, remembered: WordCache, texts: list[str]) -> None:
    for text in texts:
        assert remembered.ids(text) in (None, minilm.encode(text).ids)


@pytest.mark.parametrize("lowercase", [True, False])
@pytest.mark.parametrize("normalized", [True, False])
@given(text=TEXTS)
def test_texts_with_added_tokens_have_the_ids_of_the_tokenizer(lowercase: bool, normalized: bool, text: str) -> None:
    made = wordpiece(normalizers.BertNormalizer(lowercase=lowercase))
    made.add_tokens([AddedToken("[sep]", normalized=normalized), AddedToken("<", normalized=normalized)])
    found = WordCache.of(made)
    assert found is not None
    assert found.ids(text) in (None, made.encode(text).ids)


@pytest.mark.parametrize("single_word", [True, False])
@given(text=TEXTS, characters=st.integers(1, 9))
def test_pieces_of_texts_with_added_tokens_have_the_ids_of_the_text(
    single_word: bool, text: str, characters: int
) -> None:
    made = wordpiece(normalizers.BertNormalizer(lowercase=True))
    tokens = [("[sep]", False), ("<", False), ("<<b>", single_word)]
    made.add_tokens([AddedToken(name, normalized=False, single_word=single) for name, single in tokens])
    found = WordCache.of(made)
    assert found is not None
    whole = text + "[sep],a,<<b>,b." + text
    pieces = found.pieces(whole, characters)
    assert "".join(pieces) == whole
    ids = [made.encode(piece, add_special_tokens=False).ids for piece in pieces]
    assert list(chain.from_iterable(ids)) == made.encode(whole, add_special_tokens=False).ids


def test_a_text_with_an_added_token_is_divided_at_punctuation(minilm: Tokenizer, remembered: WordCache) -> None:
    pieces = remembered.pieces("[CLS]" + "a," * 1000, 100)
    assert max(map(len, pieces)) <= 110
    # A text of added tokens only has no place to divide it.
    assert len(remembered.pieces("[CLS]" * 1000, 100)) == 1


def test_plain_texts_in_any_language_are_tokenized_by_words(minilm: Tokenizer, remembered: WordCache) -> None:
    for text in ("", "Two words, and more.", "naïve café", "東京タワー", "a\tb\nc"):
        assert remembered.ids(text) == minilm.encode(text).ids
    assert remembered.ids("what is [MASK]?") is None


def test_a_repeated_word_is_tokenized_once(minilm: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Counting:
        def encode_batch_fast(self, texts: list[str], *, add_special_tokens: bool) -> list[object]:
            asked.extend(texts)
            return list(minilm.encode_batch_fast(texts, add_special_tokens=add_special_tokens))

    found = WordCache.of(minilm)
    assert found is not None
    monkeypatch.setattr(found, "_tokenizer", Counting())
    long = "y" * 50
    for _ in range(3):
        assert found.ids(f"one two one, {long}") == minilm.encode(f"one two one, {long}").ids
    assert sorted(asked) == [",", "one", "two", long, long, long]


def test_words_that_are_not_used_any_more_are_evicted(minilm: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_cache, "_GENERATION", 10)
    found = WordCache.of(minilm)
    assert found is not None
    for number in range(100):
        text = f"stays w{number}"
        assert found.ids(text) == minilm.encode(text).ids
    kept = found._lately | found._earlier
    assert len(kept) <= 22
    assert "stays" in kept


def test_threads_can_share_a_word_cache(minilm: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_cache, "_GENERATION", 5)
    found = WordCache.of(minilm)
    assert found is not None
    wrong: list[str] = []

    def work(seed: int) -> None:
        for number in range(300):
            text = f"word{(seed * 7 + number) % 23} and, number {number % 11}."
            if found.ids(text) != minilm.encode(text).ids:
                wrong.append(text)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_tokenizers_of_other_kinds_have_no_word_cache() -> None:
    by_space = wordpiece()
    by_space.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    assert WordCache.of(by_space) is None
    other_rule = wordpiece(normalizers.Sequence([normalizers.Replace("b", "a"), normalizers.BertNormalizer()]))
    assert WordCache.of(other_rule) is None
    assert WordCache.of(Tokenizer(models.BPE())) is None
    worded = wordpiece()
    worded.add_tokens(["new york"])
    assert WordCache.of(worded) is None
    assert WordCache.of(wordpiece()) is not None
