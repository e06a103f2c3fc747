"""Cache the token ids of words.

Most words of a text occurred in earlier texts. A BERT tokenizer always splits a text at white space and at ASCII
punctuation, whatever the surrounding characters are. So the ids of a text without added tokens are the ids of its
words, one after the other. To look up a word takes a hundredth of the time that the tokenizer takes for the word. Words
that are not in the cache are given to the tokenizer, so the tokenizer defines every id.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import chain, islice
from typing import Any

from tokenizers import Tokenizer

Ids = tuple[int, ...]

_PUNCTUATION = r"!-/:-@\[-`{-~"
#: Matches a word of the cache: at most 32 signs of ASCII punctuation, each of which is a word of the tokenizer, or a
#: run of other characters without blank, tab, CR and LF. Control characters do not end a run, since BERT's normalizer
#: removes them and joins the characters around them.
_WORD = re.compile(rf"[{_PUNCTUATION}]{{1,32}}|[^ \t\n\r{_PUNCTUATION}]+")
#: Where a long text may be cut, to be tokenized piece by piece with less memory: at the end of a match.
#: The ids of the pieces, one after the other, are the ids of the text. Every text may be cut after white space
#: (`_BLANK`), since no added token contains white space. Where a text has no added token near, it may also be cut after
#: punctuation (`_SIGN`), and, if the normalizer separates ideographs, between two of them (`_SIGN_OR_IDEOGRAPH`).
_BLANK = re.compile(r"[ \t\n\r]")
_SIGN = re.compile(rf"[ \t\n\r{_PUNCTUATION}]")
_SIGN_OR_IDEOGRAPH = re.compile(rf"[ \t\n\r{_PUNCTUATION}]|[\u4e00-\u9fff](?=[\u4e00-\u9fff])")
#: Number of characters, plus those of the longest added token, of a part of a text that one call searches for added
#: tokens. A call holds the interpreter lock, so one call for a long text would make other threads wait. The parts begin
#: this many characters apart.
_SEARCHED = 2**16
#: Maximum number of signs that are examined to find a place to cut a text that may hold added tokens.
_MAX_SIGNS = 100
#: Maximum number of characters of a cached word. Longer words are not cached, since most of them occur only once.
_MAX_CHARACTERS = 32
#: Number of words at which a generation of the cache is full; the text that fills it may add more. Two generations of
#: this size take about 5 MB together.
_GENERATION = 12_000


class WordCache:
    """A BERT tokenizer with a cache of the words of earlier texts. Thread-safe.

    Args:
        tokenizer: gives a word the same ids in every text without added tokens; neither truncates nor pads.
        special: matches where a text may hold an added token; None: there are no added tokens.
        ascii_only: whether a text with characters outside of ASCII may hold an added token that `special` misses.
        longest: number of characters of the longest added token.
        before: ids of the special tokens before every text.
        after: ids of the special tokens after every text.
        ideographs: whether the tokenizer makes each ideograph a word.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        special: re.Pattern[str] | None,
        *,
        ascii_only: bool,
        longest: int,
        before: Ids,
        after: Ids,
        ideographs: bool,
    ) -> None:
        self._tokenizer = tokenizer
        self._special = special
        self._ascii_only = ascii_only
        self._longest = longest
        self._before = before
        self._after = after
        self._cut_plain = _SIGN_OR_IDEOGRAPH if ideographs else _SIGN
        #: Ids by word, in two generations. A word that occurs is put into the new generation (`_lately`). A full new
        #: generation replaces the old one (`_earlier`). So words that have not occurred lately are dropped.
        self._lately: dict[str, Ids] = {}
        self._earlier: dict[str, Ids] = {}

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> WordCache | None:
        """Return a cache for a tokenizer; None if the ids of a word may depend on the text around the word.

        They do not for a WordPiece model with BERT's pre-tokenizer, BERT's normalizer or none, and added tokens that
        begin with ASCII punctuation and have no white space. None also if it is unknown which special tokens come
        before and after a text.
        """
        known = json.loads(tokenizer.to_str())
        normalizer, cutter, model = (
            (known[name] or {}).get("type") for name in ("normalizer", "pre_tokenizer", "model")
        )
        added = known["added_tokens"]
        if normalizer not in (None, "BertNormalizer") or (cutter, model) != ("BertPreTokenizer", "WordPiece"):
            return None
        if not all(re.match(rf"[{_PUNCTUATION}]\S*\Z", token["content"]) for token in added):
            return None
        probe, framed = (tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
        starts = [i for i in range(len(framed)) if framed[i : i + len(probe)] == probe]
        if len(starts) != 1:
            return None
        end = starts[0] + len(probe)
        return cls(
            tokenizer,
            re.compile("|".join(map(_may_hold, added))) if added else None,
            ascii_only=any(token["normalized"] for token in added),
            longest=max((len(token["content"]) for token in added), default=0),
            before=tuple(framed[: starts[0]]),
            after=tuple(framed[end:]),
            ideographs=bool((known["normalizer"] or {}).get("handle_chinese_chars")),
        )

    def ids(self, text: str) -> list[int] | None:
        """Return the token ids of a text, with special tokens; None if the text may hold an added token.

        Only the tokenizer itself finds added tokens.
        """
        bare = self.bare(text)
        return None if bare is None else self.framed(bare)

    def bare(self, text: str) -> list[int] | None:
        """Return the token ids of a text, without special tokens; None if the text may hold an added token.

        Only the tokenizer itself finds added tokens.
        """
        if not self._is_plain(text):
            return None
        words = _WORD.findall(text)
        found = list(map(self._lately.get, words))
        if None in found:
            self._find(words, found)
        return list(chain.from_iterable(filter(None, found)))

    def framed(self, ids: Sequence[int]) -> list[int]:
        """Return the token ids of a text with the special tokens before and after them."""
        return [*self._before, *ids, *self._after]

    def pieces(self, text: str, characters: int) -> list[str]:
        """Cut a text into pieces whose token ids, one after the other, are those of the text without special tokens.

        Args:
            text: the text.
            characters: minimum number of characters of each piece except the last, which may be empty. A piece ends at
                the first of the next places where the text may be cut; without such a place, the rest is one piece.
        """
        plain, start, pieces = self._is_plain(text), 0, []
        while len(text) - start > characters:
            end = self._cut_place(text, start + characters - 1, plain)
            if end is None:
                break
            pieces.append(text[start:end])
            start = end
        return [*pieces, text[start:]]

    def _cut_place(self, text: str, start: int, plain: bool) -> int | None:
        """Return the first known index after `start` where a text may be cut; None if none is known.

        A text that is not `plain` may be cut after a sign that has no possible added token within the length of the
        longest added token. The next 100 signs are examined. Without such a sign, the text is cut at white space. It is
        also cut at white space if an added token has several spellings, since a spelling may be longer than the token.
        """
        if plain:
            found = self._cut_plain.search(text, start)
            return None if found is None else found.end()
        if self._special is not None and not self._ascii_only:
            reach = self._longest + 1
            for sign in islice(_SIGN.finditer(text, start), _MAX_SIGNS):
                near = self._special.search(text, max(0, sign.end() - reach), sign.end() + reach)
                if near is None or sign.group().isspace():
                    return sign.end()
        found = _BLANK.search(text, start)
        return None if found is None else found.end()

    def _is_plain(self, text: str) -> bool:
        """Return whether a text has surely no added token; False if it may have one."""
        if self._ascii_only and not text.isascii():
            return False
        if self._special is None:
            return True
        ends = (min(start + _SEARCHED + self._longest, len(text)) for start in range(0, len(text), _SEARCHED))
        return not any(self._special.search(text, i * _SEARCHED, end) for i, end in enumerate(ends))

    def cut(self, ids: list[int], max_tokens: int) -> list[int]:
        """Return the start of `ids`, and after it the special tokens of the end, together `max_tokens` ids.

        `ids` are more than `max_tokens` token ids of a text, with special tokens.
        """
        return [*ids[: max_tokens - len(self._after)], *self._after]

    def _find(self, words: Sequence[str], found: list[Ids | None]) -> None:
        """Replace each None in `found` by the ids of the word at the same index.

        The ids come from the old generation of the cache, or else from the tokenizer. Those of words of at most 32
        characters are put into the new generation.
        """
        missing = {word for word, ids in zip(words, found, strict=True) if ids is None}
        learnt = {word: self._earlier[word] for word in missing & self._earlier.keys()}
        if new := [*missing - learnt.keys()]:
            encodings = self._tokenizer.encode_batch_fast(new, add_special_tokens=False)
            learnt.update(zip(new, (tuple(encoding.ids) for encoding in encodings), strict=True))
        for i, word in enumerate(words):
            if found[i] is None:
                found[i] = learnt[word]
        if len(self._lately) >= _GENERATION:
            self._earlier, self._lately = self._lately, {}
        self._lately.update((word, ids) for word, ids in learnt.items() if len(word) <= _MAX_CHARACTERS)


def _may_hold(token: dict[str, Any]) -> str:
    """Return a regular expression that matches in every ASCII text that holds the added token `token`.

    `token` is an entry in `tokenizer.json`. If the entry is `normalized`, an ASCII text can contain the token in
    several spellings, which all begin with the same character. The expression then is that character, and may miss the
    token in texts that are not ASCII (see `ascii_only` of `WordCache`). Otherwise the expression is the whole token,
    and finds the token in any text.
    """
    content: str = token["content"]
    return re.escape(content[0] if token["normalized"] else content)
