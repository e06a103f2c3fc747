"""Where the names of groups go on a map, and which colours keep neighbours apart."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from emberpc.cli.maps.groups import Grouping
from emberpc.cli.maps.layout import Places

#: Side of the squares in which a group's points are counted.
_SQUARE = 0.08
#: A group is scattered, and has no place for its name, if less than this share of it is around its densest square.
_LEAST_SHARE = 0.15
#: Degrees; the page turns them into colours of like strength, light or dark.
_HUES = tuple(range(15, 375, 30))
_TONES = (0, 1)
#: Of what has an order: from blue by green to red.
_COLD, _HOT = 265, 25


@dataclass(frozen=True)
class Look:
    """How a group is shown.

    Attributes:
        hue: in degrees, of OKLCH; None for grey.
        tone: 0 for the stronger of two, or 1.
        x: where its name goes, as the points' places; None if it has no place.
        y: likewise.
    """

    hue: int | None
    tone: int
    x: float | None
    y: float | None


def looks(grouping: Grouping, places: Places) -> list[Look]:
    """Return how each group is shown; groups that lie near each other differ most."""
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
        named = hue is not None and share >= _LEAST_SHARE and len(centres) > 1
        found.append(Look(hue, tone, x if named else None, y if named else None))
    return found


def _densest(places: Places) -> tuple[float, float, float]:
    """Return the middle of where points lie densest, and the share of them that is there."""
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
    """Return a hue and a tone for each place, in turn the one that is least like those of places near it."""
    palette = [(hue, tone) for tone in _TONES for hue in _HUES]
    if len(centres) <= len(_HUES):
        palette = palette[: len(_HUES)]
    used: Counter[tuple[int, int]] = Counter()
    chosen: list[tuple[int, int]] = []
    for x, y in centres:
        weights = [1 / ((x - other_x) ** 2 + (y - other_y) ** 2 + 0.01) for other_x, other_y in centres[: len(chosen)]]

        def cost(colour: tuple[int, int], weights: list[float] = weights) -> tuple[int, float]:
            alike = (weight * _likeness(colour, other) for weight, other in zip(weights, chosen, strict=True))
            # None is taken again before all are taken.
            return used[colour], sum(alike)

        best = min(palette, key=cost)
        used[best] += 1
        chosen.append(best)
    return chosen


def _likeness(one: tuple[int, int], other: tuple[int, int]) -> float:
    """Return how alike two colours are, from 0 to 1."""
    turn = abs(one[0] - other[0]) % 360
    return math.exp(-((min(turn, 360 - turn) / 40) ** 2)) * (1.0 if one[1] == other[1] else 0.5)
