"""Tokenising: true lengths, truncation on request only, and no text too large."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from emberpc.server.engine.tokenizing import TextTokenizer, Truncation
from emberpc.server.errors import ServiceError, items_of

MAX_TOKENS = 8
WORDS = ["red", "green", "blue", "one", "two", "three", "query", ":"]
CLS, SEP = 1, 2


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    """A WordPiece tokenizer of eight words that, like many published files, cuts and pads by itself."""
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


def test_the_files_own_truncation_and_padding_do_not_apply(tokenizer: TextTokenizer) -> None:
    assert ids(tokenizer, "red green blue one two", Truncation.REFUSE) == words("red", "green", "blue", "one", "two")


def test_every_text_that_is_too_long_is_named_with_its_tokens(tokenizer: TextTokenizer) -> None:
    with pytest.raises(ServiceError) as refused:
        tokenizer.tokenize(["red", "red " * 7, "red " * 6, "red " * 20], "", Truncation.REFUSE, items_of("texts"))
    assert [violation.field for violation in refused.value.violations] == ["texts[1]", "texts[3]"]
    assert "has 9 tokens" in refused.value.violations[0].description
    assert "at most 8" in refused.value.violations[0].description


def test_a_text_is_cut_at_its_end_or_its_start(tokenizer: TextTokenizer) -> None:
    text = "one two three red green blue one two"
    assert ids(tokenizer, text, Truncation.END) == words("one", "two", "three", "red", "green", "blue")
    assert ids(tokenizer, text, Truncation.START) == words("three", "red", "green", "blue", "one", "two")


def test_a_prompt_stays_whole_whichever_end_is_cut(tokenizer: TextTokenizer) -> None:
    text = "one two three red green blue"
    prompt = "query: "
    assert ids(tokenizer, text, Truncation.END, prompt) == words("query", ":", "one", "two", "three", "red")
    assert ids(tokenizer, text, Truncation.START, prompt) == words("query", ":", "three", "red", "green", "blue")


def test_the_result_says_whether_a_text_was_cut(tokenizer: TextTokenizer) -> None:
    results = tokenizer.tokenize(["red", "red " * 9], "", Truncation.END, items_of("texts"))
    assert [result.truncated for result in results] == [False, True]


def test_counting_knows_no_limit_and_takes_empty_texts(tokenizer: TextTokenizer) -> None:
    assert tokenizer.count(["", "red", "red " * 100], "") == [2, 3, 102]
    assert tokenizer.count(["red"], "query: ") == [5]


@given(text=st.text(alphabet="red gn\n\tblu東é🙂\x00", max_size=1500), truncation=st.sampled_from(list(Truncation)))
def test_the_shortcut_for_long_texts_changes_nothing(
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


def test_a_text_of_a_megabyte_is_refused_or_cut_by_its_head(tokenizer: TextTokenizer) -> None:
    text = "red green blue " * 70_000
    # "more than" shows that the rest was not read: counting it all would have told the number.
    with pytest.raises(ServiceError, match="more than 8 tokens"):
        tokenizer.tokenize([text], "", Truncation.REFUSE, items_of("texts"))
    cut = words("red", "green", "blue", "red", "green", "blue")
    assert ids(tokenizer, text, Truncation.END) == cut
    assert ids(tokenizer, text, Truncation.START) == cut
