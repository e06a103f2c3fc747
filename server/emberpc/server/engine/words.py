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
_WORD = re.compile(rf"[{_PUNCTUATION}]+|[^ \t\n\r{_PUNCTUATION}]+")
#: Longer ones are mostly met once.
_MAX_CHARACTERS = 32
#: Words of a generation: both of them take 5 MB at the most.
_GENERATION = 12_000


class Words:
    """A tokenizer of BERT's kind, and the words that it cut before. Safe to use from several threads.

    Args:
        tokenizer: one that cuts and pads nothing, and tells words by blanks and punctuation alone.
        special: finds what may stand for a token of its own in a text; None: nothing does.
        ascii_only: whether other texts may hold such a thing in disguise.
        before: ids that go before every text.
        after: ids that go after it.
    """

    def __init__(
        self, tokenizer: Tokenizer, special: re.Pattern[str] | None, *, ascii_only: bool, before: Ids, after: Ids
    ) -> None:
        self._tokenizer = tokenizer
        self._special = special
        self._ascii_only = ascii_only
        self._before = before
        self._after = after
        #: Two generations. A word that is met moves to the first; when that is full, the second is forgotten.
        self._lately: dict[str, Ids] = {}
        self._earlier: dict[str, Ids] = {}

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Words | None:
        """Return what remembers a tokenizer's words; None if it may tell a word by what stands around it."""
        known = json.loads(tokenizer.to_str())
        normalizer, cutter, model = (
            (known[name] or {}).get("type") for name in ("normalizer", "pre_tokenizer", "model")
        )
        added = known["added_tokens"]
        if normalizer not in (None, "BertNormalizer") or (cutter, model) != ("BertPreTokenizer", "WordPiece"):
            return None
        if not all(re.match(f"[{_PUNCTUATION}]", token["content"]) for token in added):
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
            before=tuple(framed[: starts[0]]),
            after=tuple(framed[end:]),
        )

    def ids(self, text: str) -> list[int] | None:
        """Return a text's ids, special ones included; None if that is for the tokenizer alone to tell."""
        if (self._ascii_only and not text.isascii()) or (self._special is not None and self._special.search(text)):
            return None
        words = _WORD.findall(text)
        found = list(map(self._lately.get, words))
        if None in found:
            self._find(words, found)
        return [*self._before, *chain.from_iterable(filter(None, found)), *self._after]

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
