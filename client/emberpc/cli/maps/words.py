"""The words that tell groups of texts apart."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

#: A word has letters; numbers name nothing.
_WORD = re.compile(r"[^\W\d_][^\W_]*(?:['’][^\W_]+)?")
_LEAST_LETTERS = 3
#: A word of fewer texts of a group is chance.
_LEAST_TEXTS = 2


def distinguishing(groups: Sequence[Sequence[str]], count: int = 3) -> list[list[str]]:
    """Return up to `count` words for each group of texts, the most telling first.

    A word tells much if many texts of the group have it, and few of all texts:
    its share in the group times the logarithm of how many times its share in
    all texts that is. Words that are everywhere come to nothing in any language,
    so there is no list of them.
    """
    in_group = [Counter(word for text in texts for word in _words(text)) for texts in groups]
    overall: Counter[str] = Counter()
    for counter in in_group:
        overall.update(counter)
    texts_in_all = sum(map(len, groups))
    return [
        _chosen(_scores(counter, len(texts), overall, texts_in_all), count)
        for counter, texts in zip(in_group, groups, strict=True)
    ]


def _words(text: str) -> set[str]:
    """Return a text's words."""
    return {word for word in _WORD.findall(text.casefold()) if len(word) >= _LEAST_LETTERS}


def _scores(counter: Counter[str], size: int, overall: Counter[str], texts_in_all: int) -> dict[str, float]:
    scores = {}
    for word, texts in counter.items():
        if texts >= min(_LEAST_TEXTS, size):
            share, usual = texts / size, overall[word] / texts_in_all
            scores[word] = share * math.log(share / usual)
    return scores


def _chosen(scores: dict[str, float], count: int) -> list[str]:
    """Return the best words, without those that are forms of one chosen already, such as `cards` beside `card`."""
    chosen: list[str] = []
    for word in sorted(scores, key=lambda word: (-scores[word], word)):
        if len(chosen) == count or scores[word] <= 0:
            break
        if not any(_akin(word, other) for other in chosen):
            chosen.append(word)
    return chosen


def _akin(one: str, other: str) -> bool:
    """Return whether two words differ in their last letters only."""
    common = max(_LEAST_LETTERS, min(len(one), len(other)) - 2)
    return one[:common] == other[:common]
