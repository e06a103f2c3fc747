"""Token ids by words that were met before.

Most words of a text were met in texts before it. A tokenizer of BERT's kind cuts
at blanks and at ASCII punctuation whatever stands around them, so the ids of a
text are those of its words, one after the other, and looking a word up takes a
hundredth of what cutting it into pieces does. What was not met is left to the
tokenizer itself, which so defines every id.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import chain
from typing import Any

from tokenizers import Tokenizer

Ids = tuple[int, ...]

_PUNCTUATION = r"!-/:-@\[-`{-~"
#: Runs of punctuation, each sign of which is a word of its own anyway, and runs of anything else but blanks. Control
#: characters are among the latter: BERT's normalizer drops them, and what stands beside them is one word.
_WORD = re.compile(rf"[{_PUNCTUATION}]{{1,32}}|[^ \t\n\r{_PUNCTUATION}]+")
#: Where a text may be cut in two whose ids, one after the other, are the text's: after a blank, since no added token
#: has one. In texts without added tokens after punctuation too, and between ideographs that the normalizer sets apart.
_BLANK = re.compile(r"[ \t\n\r]")
_SIGN = re.compile(rf"[ \t\n\r{_PUNCTUATION}]")
_SIGN_OR_IDEOGRAPH = re.compile(rf"[ \t\n\r{_PUNCTUATION}]|[\u4e00-\u9fff](?=[\u4e00-\u9fff])")
#: Characters that are searched at a time: a search holds the interpreter.
_SEARCHED = 2**16
#: Longer ones are mostly met once.
_MAX_CHARACTERS = 32
#: Words of a generation: both of them take 5 MB at the most.
_GENERATION = 12_000


class WordCache:
    """A tokenizer of BERT's kind, and the words that it cut before. Safe to use from several threads.

    Args:
        tokenizer: one that cuts and pads nothing, and tells words by blanks and punctuation alone.
        special: finds what may stand for a token of its own in a text; None: nothing does.
        ascii_only: whether other texts may hold such a thing in disguise.
        longest: characters of the longest thing that `special` finds.
        before: ids that go before every text.
        after: ids that go after it.
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
        #: Two generations. A word that is met moves to the first; when that is full, the second is forgotten.
        self._lately: dict[str, Ids] = {}
        self._earlier: dict[str, Ids] = {}

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> WordCache | None:
        """Return what remembers a tokenizer's words; None if it may tell a word by what stands around it."""
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
        """Return a text's ids, special ones included; None if that is for the tokenizer alone to tell."""
        bare = self.bare(text)
        return None if bare is None else self.framed(bare)

    def bare(self, text: str) -> list[int] | None:
        """Return a text's ids without special ones; None if that is for the tokenizer alone to tell."""
        if not self._is_plain(text):
            return None
        words = _WORD.findall(text)
        found = list(map(self._lately.get, words))
        if None in found:
            self._find(words, found)
        return list(chain.from_iterable(filter(None, found)))

    def framed(self, ids: Sequence[int]) -> list[int]:
        """Return ids with the special ones of a text."""
        return [*self._before, *ids, *self._after]

    def pieces(self, text: str, characters: int) -> list[str]:
        """Cut a text where the ids of the pieces, one after the other and without special ones, are those of the text.

        Args:
            text: the text.
            characters: about how many a piece has. Where the text may not be cut, it has more.
        """
        cut, start, pieces = (self._cut_plain if self._is_plain(text) else _BLANK), 0, []
        while len(text) - start > characters and (found := cut.search(text, start + characters - 1)):
            pieces.append(text[start : found.end()])
            start = found.end()
        return [*pieces, text[start:]]

    def _is_plain(self, text: str) -> bool:
        """Whether no part of a text can be an added token."""
        if self._ascii_only and not text.isascii():
            return False
        if self._special is None:
            return True
        ends = (min(start + _SEARCHED + self._longest, len(text)) for start in range(0, len(text), _SEARCHED))
        return not any(self._special.search(text, i * _SEARCHED, end) for i, end in enumerate(ends))

    def cut(self, ids: list[int], max_tokens: int) -> list[int]:
        """Return what `ids` gave for a text, cut at its end, so that with the special ones it is so many."""
        return [*ids[: max_tokens - len(self._after)], *self._after]

    def _find(self, words: Sequence[str], found: list[Ids | None]) -> None:
        """Fill in the ids of the words that were not met lately."""
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
    """Return a pattern that is in every text which holds an added token.

    One that is looked for in normalised text may be written in many ways, each of which begins as it does.
    """
    content: str = token["content"]
    return re.escape(content[0] if token["normalized"] else content)
