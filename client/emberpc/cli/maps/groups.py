"""Group the records of a map by label, by values of a metadata field, or into clusters with names."""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from emberpc.cli.errors import CliError
from emberpc.cli.maps.layout import Places
from emberpc.client.types import Record

#: Maximum number of labels, or values of a field, that get a group of their own: the most frequent ones. Records with
#: others share one group.
_MAX_GROUPS = 200
#: If all values of a field are numbers, and more than 12 of them differ, they are divided into at most 7 ranges with
#: about equal numbers of records.
_MAX_NUMBERS, _RANGES = 12, 7
#: The default number of clusters is the rounded square root of (number of records / 10): 10 for 1,000 records, and at
#: most 24, from 5,523 records on.
_RECORDS_PER_CLUSTER, _MAX_CLUSTERS = 10, 24
#: Maximum number of characters of a group's name; a longer name is truncated.
_LONGEST_NAME = 60
#: Matches a word that may become part of a group's name: a letter, then letters and digits, and at most one
#: apostrophe. It starts with a letter, since numbers are no useful names: `3days` gives `days`.
_WORD = re.compile(r"[^\W\d_][^\W_]*(?:['’][^\W_]+)?")
#: Minimum number of characters of a word that may become part of a group's name, and of the common start by which two
#: words count as forms of one word.
_MIN_LETTERS = 3
#: Minimum number of a group's texts that must have a word for the word to name the group. One text may have a word by
#: chance, but in a group of one text it is enough.
_MIN_TEXTS = 2


@dataclass(frozen=True)
class ColourGroup:
    """Points of the same colour.

    Attributes:
        name: name in the legend.
        members: indexes of the points.
        rest: whether the group collects points with rare values, or without a value. The group is then grey.
    """

    name: str
    members: Sequence[int]
    rest: bool = False


@dataclass(frozen=True)
class Grouping:
    """A partition of all points into groups.

    Attributes:
        title: what the points are grouped by, such as `label`.
        groups: the groups; each point is in exactly one group.
        ordered: whether the colours shall show an order: that of numbers, or of ranges of numbers. Groups with `rest`
            have no place in this order.
    """

    title: str
    groups: Sequence[ColourGroup]
    ordered: bool = False


def group(records: Sequence[Record], places: Places, field: str | None, clusters: int) -> Grouping:
    """Group records by a metadata field, by label, or into clusters of records whose places are near each other.

    Args:
        records: at least one record.
        places: places of the records, float64 (records, 2).
        field: metadata field to group by, nested keys joined by dots; None: group by label or into clusters.
        clusters: without a field: number of clusters. 0: group by label if a record has a label, else into a number of
            clusters that depends on the number of records.
    """
    if field is not None:
        return _by_field(records, field)
    if not clusters and any(record.label for record in records):
        return Grouping("label", _by_value([record.label or None for record in records], "no label"))
    return Grouping("cluster", _by_place(records, places, clusters))


def require_field(records: Sequence[Record], field: str) -> None:
    """Check that at least one of the records has a value for `field`, the metadata field of --color-by.

    Raises:
        CliError: no record has the field, or all have null; the message lists the top-level fields of the records.
    """
    if all(_value(record.metadata, field) is None for record in records):
        fields = sorted({key for record in records for key in record.metadata})
        there = f"there are: {', '.join(fields)}" if fields else "there is no metadata"
        raise CliError(f"--color-by: no record has a metadata field {field!r}; {there}")


def shown(value: Any) -> str:
    """Return a value of metadata as text: a str unchanged, any other value as JSON with sorted keys."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)


def _by_field(records: Sequence[Record], field: str) -> Grouping:
    values = [_value(record.metadata, field) for record in records]
    present = [value for value in values if value is not None]
    numeric = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in present)
    if numeric and len(set(present)) > _MAX_NUMBERS:
        return Grouping(field, _by_range(values, f"no {field}"), ordered=True)
    if numeric:
        in_order = _by_value(values, f"no {field}", key=lambda item: (item[0],))
        return Grouping(field, in_order, ordered=len(in_order) > 2)
    return Grouping(field, _by_value([None if value is None else shown(value) for value in values], f"no {field}"))


def _value(metadata: Mapping[str, Any], field: str) -> Any:
    """Return the value of a field, nested keys joined by dots; None if the field is missing or null.

    If there is a key that is equal to `field`, dots included, its value is returned, and nested keys are not read.
    """
    if field in metadata:
        return metadata[field]
    key, _, rest = field.partition(".")
    inner = metadata.get(key)
    return _value(inner, rest) if rest and isinstance(inner, Mapping) else None


def _by_value(
    values: Sequence[Any], missing: str, key: Callable[[tuple[Any, int]], Any] = lambda item: (-item[1], item[0])
) -> list[ColourGroup]:
    """Return a group for each of the 200 most frequent values; then one for other values and one for None, if any.

    Args:
        values: the value of each point, hashable; None: the point has no value.
        missing: name of the group of the points without a value.
        key: sort key of the groups of one value, from (value, number of points). Default: the most frequent value
            first, equally frequent ones by value.
    """
    members: dict[Any, list[int]] = defaultdict(list)
    for i, value in enumerate(values):
        members[value].append(i)
    without = members.pop(None, [])
    frequent = Counter({value: len(own) for value, own in members.items()}).most_common(_MAX_GROUPS)
    groups = [ColourGroup(_short(shown(value)), members.pop(value)) for value, _ in sorted(frequent, key=key)]
    if members:
        others = sorted(i for own in members.values() for i in own)
        groups.append(ColourGroup(f"{len(members):,} others", others, rest=True))
    if without:
        groups.append(ColourGroup(missing, without, rest=True))
    return groups


def _by_range(values: Sequence[float | None], missing: str) -> list[ColourGroup]:
    """Return a group for each range of numbers, lowest first; last a group named `missing` for None, if any."""
    numbers = np.array([math.nan if value is None else value for value in values], dtype=np.float64)
    edges = np.unique(np.nanquantile(numbers, np.linspace(0, 1, _RANGES + 1)[1:-1]))
    bins = np.searchsorted(edges, numbers, side="left")
    groups = []
    for i in range(len(edges) + 1):
        members = np.flatnonzero((bins == i) & ~np.isnan(numbers))
        if len(members):
            low, high = numbers[members].min(), numbers[members].max()
            name = _number(low) if low == high else f"{_number(low)} – {_number(high)}"
            groups.append(ColourGroup(name, members.tolist()))
    without = np.flatnonzero(np.isnan(numbers)).tolist()
    return [*groups, ColourGroup(missing, without, rest=True)] if without else groups


def _by_place(records: Sequence[Record], places: Places, clusters: int) -> list[ColourGroup]:
    """Return clusters of nearby points, largest first, named by words that distinguish their texts from other clusters.

    `clusters` is the wanted number of clusters; 0: a number that depends on the number of records. There are fewer if
    there are fewer different places. A cluster without distinguishing words is named by its number, from 1. If the
    number is below 2, there is one group, `all records`.
    """
    suggested = min(round(math.sqrt(len(records) / _RECORDS_PER_CLUSTER)), _MAX_CLUSTERS)
    count = min(clusters or suggested, len(records))
    if count < 2:
        return [ColourGroup("all records", range(len(records)))]
    from sklearn.cluster import KMeans

    assigned = KMeans(count, n_init=4, random_state=0).fit_predict(places)
    parts = [part.tolist() for part in (np.flatnonzero(assigned == i) for i in range(count)) if len(part)]
    parts.sort(key=lambda part: (-len(part), part[0]))
    words = distinguishing_words([[records[i].text for i in part] for part in parts])
    return [
        ColourGroup(_short(", ".join(own)) if own else f"cluster {number}", part)
        for number, (own, part) in enumerate(zip(words, parts, strict=True), 1)
    ]


def _short(name: str) -> str:
    one_line = " ".join(name.split()) or "(empty)"
    return one_line if len(one_line) <= _LONGEST_NAME else one_line[: _LONGEST_NAME - 1] + "…"


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else f"{value:.4g}"


def distinguishing_words(groups: Sequence[Sequence[str]], count: int = 3) -> list[list[str]]:
    """Return at most `count` words, case-folded, for each group: those that best distinguish its texts from the others.

    The score of a word is s * log(s / t), where s is the share of the group's texts that have the word, and t is the
    share of all texts that have the word. The word with the best score comes first. A word that is equally frequent in
    all groups has the score 0 in any language, so no list of stop words is needed. Left out are words with a score of 0
    or less, words in only one of the group's texts (unless it has one text), and other forms of a chosen word.
    """
    in_group = [Counter(word for text in texts for word in _words_of(text)) for texts in groups]
    overall: Counter[str] = Counter()
    for counter in in_group:
        overall.update(counter)
    texts_in_all = sum(map(len, groups))
    return [
        _best_words(_scores(counter, len(texts), overall, texts_in_all), count)
        for counter, texts in zip(in_group, groups, strict=True)
    ]


def _words_of(text: str) -> set[str]:
    """Return the different matches of `_WORD` in a text, case-folded, that have at least 3 characters."""
    return {word for word in _WORD.findall(text.casefold()) if len(word) >= _MIN_LETTERS}


def _scores(counter: Counter[str], size: int, overall: Counter[str], texts_in_all: int) -> dict[str, float]:
    scores = {}
    for word, texts in counter.items():
        if texts >= min(_MIN_TEXTS, size):
            share, usual = texts / size, overall[word] / texts_in_all
            scores[word] = share * math.log(share / usual)
    return scores


def _best_words(scores: dict[str, float], count: int) -> list[str]:
    """Return at most `count` words, those with the best scores above 0, best first.

    Of several forms of a word, such as `card` and `cards`, only the one with the best score is returned.
    """
    chosen: list[str] = []
    for word in sorted(scores, key=lambda word: (-scores[word], word)):
        if len(chosen) == count or scores[word] <= 0:
            break
        if not any(_same_stem(word, other) for other in chosen):
            chosen.append(word)
    return chosen


def _same_stem(one: str, other: str) -> bool:
    """Return whether two words of at least 3 characters have the same start.

    The start is the shorter word without its last two characters, but has at least 3 characters.
    """
    common = max(_MIN_LETTERS, min(len(one), len(other)) - 2)
    return one[:common] == other[:common]
