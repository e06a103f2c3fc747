"""Choose the colours of the groups of a map, and the places of their names."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from emberpc.cli.maps.groups import Grouping
from emberpc.cli.maps.layout import Places

#: Side of the squares in which the points of a group are counted to find where they are dense. In map units: the map is
#: 2 units wide.
_SQUARE = 0.08
#: Minimum share of a group's points in its densest region (a square and the 8 squares around), for the group's name to
#: be drawn. A group with a smaller share is scattered, so no place is right for the name.
_MIN_SHARE = 0.15
#: Hues, in degrees of OKLCH, and tones of groups without an order. Up to 12 groups that are not grey have only tone 0,
#: the stronger one; more groups have both tones. The page chooses lightness and chroma, for light and dark mode.
_HUES = tuple(range(15, 375, 30))
_TONES = (0, 1)
#: Hues of the first and the last of ordered groups, in degrees of OKLCH: from blue over green to red.
_COLD, _HOT = 265, 25


@dataclass(frozen=True)
class Look:
    """Colour and name position of a group.

    Attributes:
        hue: hue in degrees, in OKLCH, a colour space of CSS; None for grey.
        tone: 0 for the stronger tone, 1 for the weaker tone.
        x: x of the name, in map units, from -1 to 1; None if the name is not drawn.
        y: y of the name, in map units, from -1 (top) to 1; None if the name is not drawn.
    """

    hue: int | None
    tone: int
    x: float | None
    y: float | None


def looks(grouping: Grouping, places: Places) -> list[Look]:
    """Return the look of each group, in the order of the groups: its colour, and where its name is drawn.

    A group with `rest` is grey. Other groups get colours from cold to hot if they are ordered; otherwise the colours
    are chosen so that groups near each other differ. The name of a group with `rest`, of a scattered group and of an
    only group is not drawn.
    """
    centres = [_densest(places[list(group.members)]) for group in grouping.groups]
    coloured = [i for i, group in enumerate(grouping.groups) if not group.rest]
    if grouping.ordered:
        steps = max(1, len(coloured) - 1)
        chosen = [(round(_COLD + (_HOT - _COLD) * step / steps), 0) for step in range(len(coloured))]
    else:
        chosen = _apart([centres[i][:2] for i in coloured])
    colours: dict[int, tuple[int, int]] = dict(zip(coloured, chosen, strict=True))
    found = []
    for i, (x, y, share) in enumerate(centres):
        hue, tone = colours.get(i, (None, 0))
        named = hue is not None and share >= _MIN_SHARE and len(centres) > 1
        found.append(Look(hue, tone, x if named else None, y if named else None))
    return found


def _densest(places: Places) -> tuple[float, float, float]:
    """Return x and y of the centre of the region with the most points, and the share of `places` in this region.

    A region is a square of the side `_SQUARE` and the 8 squares around. Its centre is the median of x and of y of its
    points. There must be at least one place.
    """
    squares = np.floor(places / _SQUARE).astype(int)
    counts = Counter((x, y) for x, y in squares.tolist())
    around = {
        (x, y): sum(counts[x + right, y + down] for right in (-1, 0, 1) for down in (-1, 0, 1)) for x, y in counts
    }
    best = max(around, key=lambda square: (around[square], square))
    near = places[(np.abs(squares - best) <= 1).all(axis=1)]
    x, y = np.median(near, axis=0)
    return float(x), float(y), len(near) / len(places)


def _apart(centres: Sequence[tuple[float, float]]) -> list[tuple[int, int]]:
    """Return a colour, (hue in degrees, tone), for each place (x, y), in the order of the places.

    Of the colours that were used least often, each place gets the one that differs most from the colours of earlier
    places; near places count more than distant ones. If there are at most 12 places, all get the stronger tone.
    """
    palette = [(hue, tone) for tone in _TONES for hue in _HUES]
    if len(centres) <= len(_HUES):
        palette = palette[: len(_HUES)]
    used: Counter[tuple[int, int]] = Counter()
    chosen: list[tuple[int, int]] = []
    for x, y in centres:
        weights = [1 / ((x - other_x) ** 2 + (y - other_y) ** 2 + 0.01) for other_x, other_y in centres[: len(chosen)]]

        def cost(colour: tuple[int, int], weights: list[float] = weights) -> tuple[int, float]:
            alike = (weight * _colour_similarity(colour, other) for weight, other in zip(weights, chosen, strict=True))
            # The colours that were used least often come first, so no colour is repeated before all are used.
            return used[colour], sum(alike)

        best = min(palette, key=cost)
        used[best] += 1
        chosen.append(best)
    return chosen


def _colour_similarity(one: tuple[int, int], other: tuple[int, int]) -> float:
    """Return the similarity of two colours (hue in degrees, tone), from 0 to 1; 1: equal; other tones: at most 0.5."""
    turn = abs(one[0] - other[0]) % 360
    return math.exp(-((min(turn, 360 - turn) / 40) ** 2)) * (1.0 if one[1] == other[1] else 0.5)
