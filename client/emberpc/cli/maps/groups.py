"""What the colours of a map stand for: labels, values of a metadata field, or clusters."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from emberpc.cli.errors import CliError
from emberpc.cli.maps.layout import Places
from emberpc.cli.maps.words import distinguishing
from emberpc.client.types import Record

#: Groups with a colour of their own; the smaller ones share one.
_MOST_GROUPS = 200
#: More different numbers than this are put into ranges, each with about as many records.
_MOST_NUMBERS, _RANGES = 12, 7
#: One cluster for so many records squared: 10 of 1,000 records, 24 of 5,760 and more.
_RECORDS_PER_CLUSTER, _MOST_CLUSTERS = 10, 24
_LONGEST_NAME = 60


@dataclass(frozen=True)
class Group:
    """Points of one colour.

    Attributes:
        name: what the legend calls it.
        members: which points, by their index.
        rest: whether it is only what is left over, such as those without a label.
    """

    name: str
    members: Sequence[int]
    rest: bool = False


@dataclass(frozen=True)
class Grouping:
    """All points in groups, each in one; `ordered` if the groups follow each other as numbers do."""

    title: str
    groups: Sequence[Group]
    ordered: bool = False


def group(records: Sequence[Record], places: Places, field: str | None, clusters: int) -> Grouping:
    """Group records by a metadata field; without one by label if there are labels, else by where they lie.

    Args:
        records: at least one.
        places: where they lie, shape (records, 2).
        field: of the metadata, nested ones joined by dots, that a record has; None for labels or clusters.
        clusters: so many clusters, whether or not there are labels; 0: labels if there are any, else as many clusters
            as the number of records suggests.

    """
    if field is not None:
        return _by_field(records, field)
    if not clusters and any(record.label for record in records):
        return Grouping("label", _by_value([record.label or None for record in records], "no label"))
    return Grouping("cluster", _by_place(records, places, clusters))


def require_field(records: Sequence[Record], field: str) -> None:
    """Make sure that there is something to color by.

    Raises:
        CliError: no record has the field.
    """
    if all(_value(record.metadata, field) is None for record in records):
        fields = sorted({key for record in records for key in record.metadata})
        there = f"there are: {', '.join(fields)}" if fields else "there is no metadata"
        raise CliError(f"--color-by: no record has a metadata field {field!r}; {there}")


def shown(value: Any) -> str:
    """Return a value of metadata as text."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)


def _by_field(records: Sequence[Record], field: str) -> Grouping:
    values = [_value(record.metadata, field) for record in records]
    present = [value for value in values if value is not None]
    numeric = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in present)
    if numeric and len(set(present)) > _MOST_NUMBERS:
        return Grouping(field, _by_range(values, f"no {field}"), ordered=True)
    if numeric:
        in_order = _by_value(values, f"no {field}", key=lambda item: (item[0],))
        return Grouping(field, in_order, ordered=len(in_order) > 2)
    return Grouping(field, _by_value([None if value is None else shown(value) for value in values], f"no {field}"))


def _value(metadata: Mapping[str, Any], field: str) -> Any:
    """Return the value of a field; None if it is missing or null."""
    if field in metadata:
        return metadata[field]
    key, _, rest = field.partition(".")
    inner = metadata.get(key)
    return _value(inner, rest) if rest and isinstance(inner, Mapping) else None


def _by_value(
    values: Sequence[Any], missing: str, key: Callable[[tuple[Any, int]], Any] = lambda item: (-item[1], item[0])
) -> list[Group]:
    """Return a group for each value, ordered by the key of (value, count); the most frequent first."""
    members: dict[Any, list[int]] = defaultdict(list)
    for i, value in enumerate(values):
        members[value].append(i)
    without = members.pop(None, [])
    most = Counter({value: len(own) for value, own in members.items()}).most_common(_MOST_GROUPS)
    groups = [Group(_short(shown(value)), members.pop(value)) for value, _ in sorted(most, key=key)]
    if members:
        others = sorted(i for own in members.values() for i in own)
        groups.append(Group(f"{len(members):,} others", others, rest=True))
    if without:
        groups.append(Group(missing, without, rest=True))
    return groups


def _by_range(values: Sequence[float | None], missing: str) -> list[Group]:
    """Return a group for each range of numbers, lowest first."""
    numbers = np.array([math.nan if value is None else value for value in values], dtype=np.float64)
    edges = np.unique(np.nanquantile(numbers, np.linspace(0, 1, _RANGES + 1)[1:-1]))
    bins = np.searchsorted(edges, numbers, side="left")
    groups = []
    for i in range(len(edges) + 1):
        members = np.flatnonzero((bins == i) & ~np.isnan(numbers))
        if len(members):
            low, high = numbers[members].min(), numbers[members].max()
            name = _number(low) if low == high else f"{_number(low)} – {_number(high)}"
            groups.append(Group(name, members.tolist()))
    without = np.flatnonzero(np.isnan(numbers)).tolist()
    return [*groups, Group(missing, without, rest=True)] if without else groups


def _by_place(records: Sequence[Record], places: Places, clusters: int) -> list[Group]:
    """Return clusters of points that lie together, largest first, named by words that tell them apart."""
    suggested = min(round(math.sqrt(len(records) / _RECORDS_PER_CLUSTER)), _MOST_CLUSTERS)
    count = min(clusters or suggested, len(records))
    if count < 2:
        return [Group("all records", range(len(records)))]
    from sklearn.cluster import KMeans

    assigned = KMeans(count, n_init=4, random_state=0).fit_predict(places)
    parts = [part.tolist() for part in (np.flatnonzero(assigned == i) for i in range(count)) if len(part)]
    parts.sort(key=lambda part: (-len(part), part[0]))
    words = distinguishing([[records[i].text for i in part] for part in parts])
    return [
        Group(_short(", ".join(own)) if own else f"cluster {number}", part)
        for number, (own, part) in enumerate(zip(words, parts, strict=True), 1)
    ]


def _short(name: str) -> str:
    one_line = " ".join(name.split()) or "(empty)"
    return one_line if len(one_line) <= _LONGEST_NAME else one_line[: _LONGEST_NAME - 1] + "…"


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else f"{value:.4g}"
