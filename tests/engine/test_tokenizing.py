"""Tokenizing: exact numbers of tokens, truncation only on request, and bounded work for long texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from emberpc.bundle.contents import Contents
from emberpc.server.engine import tokenizing
from emberpc.server.engine.tokenizing import AbandonedError, TextTokenizer, Truncation
from emberpc.server.engine.word_cache import WordCache
from emberpc.server.errors import Code, ServiceError, items_of

MAX_TOKENS = 8
WORDS = ["red", "green", "blue", "one", "two", "three", "query", ":"]
CLS, SEP = 1, 2


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    """A WordPiece tokenizer of eight words whose file, like many published ones, sets truncation and padding."""
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", *WORDS])}
    raw = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    raw.normalizer = normalizers.BertNormalizer()
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.decoder = decoders.WordPiece()
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    raw.enable_truncation(4)
    raw.enable_padding(length=128)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    raw.save(str(path))
    return TextTokenizer(path, MAX_TOKENS)


def ids(tokenizer: TextTokenizer, text: str, truncation: Truncation, prompt: str = "") -> list[int]:
    found: list[int] = tokenizer.tokenize([text], prompt, truncation, items_of("texts"))[0].ids.tolist()
    return found


def words(*names: str) -> list[int]:
    return [CLS, *(WORDS.index(name) + 4 for name in names), SEP]


def test_truncation_and_padding_of_the_tokenizer_file_are_ignored(tokenizer: TextTokenizer) -> None:
    assert ids(tokenizer, "red green blue one two", Truncation.REFUSE) == words("red", "green", "blue", "one", "two")


def test_the_error_lists_every_too_long_text_with_its_tokens(tokenizer: TextTokenizer) -> None:
    with pytest.raises(ServiceError) as refused:
        tokenizer.tokenize(["red", "red " * 7, "red " * 6, "red " * 20], "", Truncation.REFUSE, items_of("texts"))
    assert [violation.field for violation in refused.value.violations] == ["texts[1]", "texts[3]"]
    assert "has 9 tokens" in refused.value.violations[0].description
    assert "at most 8" in refused.value.violations[0].description


def test_a_text_is_truncated_at_its_end_or_its_start(tokenizer: TextTokenizer) -> None:
    text = "one two three red green blue one two"
    assert ids(tokenizer, text, Truncation.END) == words("one", "two", "three", "red", "green", "blue")
    assert ids(tokenizer, text, Truncation.START) == words("three", "red", "green", "blue", "one", "two")


def test_truncation_keeps_the_prompt_whole(tokenizer: TextTokenizer) -> None:
    text = "one two three red green blue"
    prompt = "query: "
    assert ids(tokenizer, text, Truncation.END, prompt) == words("query", ":", "one", "two", "three", "red")
    assert ids(tokenizer, text, Truncation.START, prompt) == words("query", ":", "three", "red", "green", "blue")


def test_the_result_states_whether_a_text_was_truncated(tokenizer: TextTokenizer) -> None:
    results = tokenizer.tokenize(["red", "red " * 9], "", Truncation.END, items_of("texts"))
    assert [result.truncated for result in results] == [False, True]


def test_count_has_no_token_limit_and_accepts_empty_texts(tokenizer: TextTokenizer) -> None:
    assert tokenizer.count(["", "red", "red " * 100], "") == [2, 3, 102]
    assert tokenizer.count(["red"], "query: ") == [5]


@given(text=st.text(alphabet="red gn\n\tblu東é🙂\x00", max_size=1500), truncation=st.sampled_from(list(Truncation)))
def test_the_shortcut_for_long_texts_gives_equal_results(
    tokenizer: TextTokenizer, text: str, truncation: Truncation
) -> None:
    # 32 characters for each of 8 tokens: texts above 256 characters take the shortcut.
    whole = tokenizer.count([text], "")[0]
    try:
        result = tokenizer.tokenize([text], "", truncation, items_of("texts"))[0]
    except ServiceError:
        assert truncation is Truncation.REFUSE
        assert whole > MAX_TOKENS
    else:
        assert len(result.ids) == min(whole, MAX_TOKENS)
        assert result.truncated == (whole > MAX_TOKENS)


def test_a_text_of_a_megabyte_is_refused_or_truncated_without_reading_all_of_it(tokenizer: TextTokenizer) -> None:
    text = "red green blue " * 70_000
    # "more than" shows that the rest was not read: a count of the whole text would give the number.
    with pytest.raises(ServiceError, match="more than 8 tokens"):
        tokenizer.tokenize([text], "", Truncation.REFUSE, items_of("texts"))
    cut = words("red", "green", "blue", "red", "green", "blue")
    assert ids(tokenizer, text, Truncation.END) == cut
    assert ids(tokenizer, text, Truncation.START) == cut


@pytest.mark.parametrize("truncation", list(Truncation))
def test_a_long_text_without_places_to_cut_is_read_only_in_part(
    tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch, truncation: Truncation
) -> None:
    """Texts of 2 MB without white space but with an added token took 5.5 s and 840 MB when tokenized in one piece."""
    raw = Tokenizer.from_str(tokenizer._tokenizer.to_str())
    raw.add_tokens([AddedToken("[red]", normalized=True)])
    ours = TextTokenizer(Path("tokenizer.json"), MAX_TOKENS, InMemory(raw.to_str().encode()))
    watched = Watched(ours._tokenizer)
    monkeypatch.setattr(ours, "_tokenizer", watched)
    monkeypatch.setattr(tokenizing, "_MAX_AT_ONCE", LIMIT)
    for text in ("[red]" + "red," * 100_000, "red," * 100_000 + "[red]"):
        if truncation is Truncation.REFUSE:
            with pytest.raises(ServiceError, match="has more than 8 tokens"):
                ours.tokenize([text], "", truncation, items_of("texts"))
        else:
            assert len(ours.tokenize([text], "", truncation, items_of("texts"))[0].ids) == MAX_TOKENS
        with pytest.raises(ServiceError, match=f"reads at most {LIMIT} of one text; count its parts"):
            ours.count([text], "")
    assert watched.longest <= LIMIT


class InMemory(Contents):
    """Contents that return one file."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self.data = data

    def read(self, path: Path) -> bytes:
        return self.data


class Pair:
    """A tokenizer of the library, and emberpc's of the same file."""

    def __init__(self, folder: Path, kind: str) -> None:
        vocabulary = [
            "[PAD]",
            "[CLS]",
            "[SEP]",
            "[UNK]",
            "[MASK]",
            "a",
            "b",
            "##a",
            "##b",
            "e",
            "!",
            "[",
            "]",
            "東",
            "京",
        ]
        raw = Tokenizer(models.WordPiece({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
        raw.normalizer = normalizers.BertNormalizer(strip_accents="accents" not in kind, handle_chinese_chars=True)
        bert = kind != "whitespace"
        raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer() if bert else pre_tokenizers.WhitespaceSplit()
        raw.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
        )
        if "added" in kind:
            raw.add_special_tokens(["[SEP]", AddedToken("[MASK]", lstrip=True, normalized=False)])
            raw.add_tokens([AddedToken("!ab", single_word=True, normalized="normalized" in kind)])
        path = folder / f"{kind}.json"
        raw.save(str(path))
        self.raw, self.ours = raw, TextTokenizer(path, MAX_TOKENS)

    def expected(self, text: str, prompt: str, truncation: Truncation) -> list[int]:
        """Return the ids of the whole text, truncated afterwards."""
        whole: list[int] = self.raw.encode(prompt + text).ids
        if len(whole) <= MAX_TOKENS:
            return whole
        before, behind, space = self.bare(prompt), self.bare(text), MAX_TOKENS - 2
        if truncation is Truncation.END:
            return [CLS, *self.bare(prompt + text)[:space], SEP]
        return [CLS, *before, *(behind[-(space - len(before)) :] if space > len(before) else []), SEP]

    def bare(self, text: str) -> list[int]:
        found: list[int] = self.raw.encode(text, add_special_tokens=False).ids
        return found


KINDS = ("bert", "accents", "added", "added normalized", "whitespace")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    return {kind: Pair(tmp_path_factory.mktemp("pairs"), kind) for kind in KINDS}


#: Parts that may join across a boundary of pieces: words, signs, added tokens and their parts, ideographs, marks,
#: blanks, controls.
PARTS = [
    "a",
    "ab",
    "!",
    "!ab",
    "[MASK]",
    "[MA",
    "SK]",
    "[",
    "東",
    "京",
    "e\u0301",
    "\u0301",
    "é",
    "\x00",
    "\u200d",
    "�",
    "Σ",
]
BLANKS = [" ", "\n", "\t", "\u3000", "  "]


@given(
    kind=st.sampled_from(KINDS),
    parts=st.lists(
        st.tuples(st.sampled_from(PARTS + BLANKS), st.sampled_from([1, 1, 2, 40, 300])).map(
            lambda part: part[0] * part[1]
        ),
        max_size=40,
    ),
    prompt=st.sampled_from(["", "a: ", "ab", "[MA", "a b a b a b a b"]),
    truncation=st.sampled_from([Truncation.END, Truncation.START]),
)
@example(  # the first 256 characters are 40 letters, of which each would be a token, and accents
    kind="whitespace", parts=["a" * 40, "\u0301" * 300, "a" * 300], prompt="", truncation=Truncation.END
)
@example(kind="whitespace", parts=["a" * 40, "\u0301" * 5000, "a" * 300], prompt="a: ", truncation=Truncation.END)
def test_tokenizing_by_pieces_gives_the_ids_of_the_whole_text(
    pairs: dict[str, Pair], kind: str, parts: list[str], prompt: str, truncation: Truncation
) -> None:
    pair, text = pairs[kind], "".join(parts)
    assert pair.ours.count([text], prompt) == [len(pair.raw.encode(prompt + text).ids)]
    assert ids(pair.ours, text, truncation, prompt) == pair.expected(text, prompt, truncation)


@pytest.mark.parametrize("truncation", list(Truncation))
@pytest.mark.parametrize("sign", ["!", "東", "a ", "a!", "! \u0301"])
def test_a_long_text_is_read_only_as_far_as_needed(
    pairs: dict[str, Pair], monkeypatch: pytest.MonkeyPatch, sign: str, truncation: Truncation
) -> None:
    read: list[int] = []
    bare = WordCache.bare

    def counted(words: WordCache, text: str) -> list[int] | None:
        read.append(len(text))
        return bare(words, text)

    monkeypatch.setattr(WordCache, "bare", counted)
    try:
        pairs["added"].ours.tokenize([sign * 1_000_000], "", truncation, items_of("texts"))
    except ServiceError:
        assert truncation is Truncation.REFUSE
    assert 0 < sum(read) < 2000


CORPUS = ["red green blue one two three query", "!" * 40, "a" * 40]
#: Limit of characters of a text that these tokenizers read at once, in the tests.
LIMIT = 2000


@pytest.fixture(scope="module", params=["byte-level BPE", "Unigram"])
def library(request: pytest.FixtureRequest) -> Tokenizer:
    """A tokenizer of a kind whose texts cannot be cut into pieces."""
    special = ["<s>", "</s>", "<unk>"]
    if request.param == "Unigram":
        raw = Tokenizer(models.Unigram())
        raw.normalizer, raw.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
        trainer: trainers.Trainer = trainers.UnigramTrainer(
            vocab_size=60, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    else:
        raw = Tokenizer(models.BPE())
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=340, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
    raw.train_from_iterator(CORPUS * 20, trainer)
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", raw.token_to_id("<s>")), ("</s>", raw.token_to_id("</s>"))]
    )
    return raw


@pytest.fixture
def other(library: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TextTokenizer:
    """emberpc's tokenizer of the same file, with a low limit."""
    monkeypatch.setattr(tokenizing, "_MAX_AT_ONCE", LIMIT)
    library.save(str(tmp_path / "tokenizer.json"))
    return TextTokenizer(tmp_path / "tokenizer.json", MAX_TOKENS)


class Watched:
    """A tokenizer of the library that notes the longest text it was given."""

    def __init__(self, raw: Any) -> None:
        self.raw, self.longest = raw, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)

    def encode_batch_fast(self, texts: list[str], *, add_special_tokens: bool) -> Any:
        self.longest = max(self.longest, *map(len, texts))
        return self.raw.encode_batch_fast(texts, add_special_tokens=add_special_tokens)


@pytest.fixture
def watched(other: TextTokenizer, monkeypatch: pytest.MonkeyPatch) -> Watched:
    found = Watched(other._tokenizer)
    monkeypatch.setattr(other, "_tokenizer", found)
    return found


@pytest.mark.parametrize("part", ["red green ", "! ", "red\n"])
@pytest.mark.parametrize("truncation", [Truncation.END, Truncation.START])
def test_tokenizers_without_pieces_truncate_a_long_text_by_a_part_of_it(
    library: Tokenizer, other: TextTokenizer, watched: Watched, part: str, truncation: Truncation
) -> None:
    text, prompt = part * 10_000, "one "
    (cut,) = other.tokenize([text], prompt, truncation, items_of("texts"))
    assert cut.truncated
    assert len(cut.ids) == MAX_TOKENS
    assert 0 < watched.longest <= LIMIT
    inner, before = cut.ids.tolist()[1:-1], library.encode(prompt, add_special_tokens=False).ids
    behind = library.encode(text, add_special_tokens=False).ids
    if truncation is Truncation.START:
        assert inner == [*before, *behind[len(before) - MAX_TOKENS + 2 :]]
    else:
        assert inner == library.encode(prompt + text, add_special_tokens=False).ids[: MAX_TOKENS - 2]


def test_tokenizers_without_pieces_refuse_to_count_a_too_long_text(other: TextTokenizer, watched: Watched) -> None:
    assert other.count(["red " * (LIMIT // 4)], "")
    watched.longest = 0
    with pytest.raises(ServiceError, match=f"reads at most {LIMIT} of one text; count its parts") as refused:
        other.count(["red", "a" * (LIMIT + 1), "b", "c" * LIMIT], "one ")
    assert [violation.field for violation in refused.value.violations] == ["texts[1]", "texts[3]"]
    assert refused.value.code is Code.INVALID_ARGUMENT
    assert not watched.longest


@pytest.mark.parametrize("truncation", list(Truncation))
def test_tokenizers_without_pieces_refuse_a_text_whose_readable_part_has_too_few_tokens(
    library: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, truncation: Truncation
) -> None:
    # This normalizer removes all characters, so no part of the text has more tokens than the model takes.
    raw = Tokenizer.from_str(library.to_str())
    raw.normalizer = normalizers.Replace("x", "")
    raw.save(str(tmp_path / "empty.json"))
    ours = TextTokenizer(tmp_path / "empty.json", MAX_TOKENS)
    monkeypatch.setattr(tokenizing, "_MAX_AT_ONCE", LIMIT)
    watched = Watched(ours._tokenizer)
    monkeypatch.setattr(ours, "_tokenizer", watched)
    with pytest.raises(ServiceError, match=f"at most {LIMIT} of one text; shorten it"):
        ours.tokenize(["x" * 100_000], "", truncation, items_of("texts"))
    assert watched.longest == LIMIT


@pytest.mark.parametrize("truncation", list(Truncation))
def test_tokenizers_without_pieces_stop_between_texts(other: TextTokenizer, truncation: Truncation) -> None:
    asked: list[bool] = []

    def stop() -> bool:
        asked.append(len(asked) == 3)
        return asked[-1]

    with pytest.raises(AbandonedError):
        other.tokenize(["a b " * 10_000] * 8, "", truncation, items_of("texts"), stop)
    assert len(asked) == 4


def test_counting_stops_after_a_piece_if_the_call_is_cancelled(pairs: dict[str, Pair]) -> None:
    asked: list[bool] = []

    def stop() -> bool:
        asked.append(len(asked) == 3)
        return asked[-1]

    for kind in ("bert", "whitespace"):
        asked.clear()
        with pytest.raises(AbandonedError):
            pairs[kind].ours.count(["a " * 70_000] * 8, "", stop)
        assert len(asked) == 4
