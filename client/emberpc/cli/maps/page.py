"""Render a map as one HTML file that needs no other file, and in which texts of records are never markup."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any

from emberpc.cli.maps.colours import Look
from emberpc.cli.maps.groups import Grouping, shown
from emberpc.cli.maps.layout import Layout
from emberpc.client.types import Record

#: Files of this package that are inserted into the page unchanged.
_PARTS = ("page.css", "drawing.js", "panels.js")
#: Maximum number of characters of a text and of a metadata value in the page; longer values are truncated.
_TEXT, _VALUE = 2000, 300
#: In the page, coordinates are whole numbers from -10,000 to 10,000, which take less space than decimals.
_SCALE = 10_000
#: JSON escapes, by character code, of characters with a meaning in HTML, and of line ends in old JavaScript. Without
#: them, a text could end the script element that holds the data.
_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


@dataclass(frozen=True)
class Drawing:
    """Content of a map.

    Attributes:
        collection: name of the collection.
        where: the filter that the records match; empty: no filter.
        total: number of all records that match; `records` may be a sample of these.
        made: date (UTC) on which the map was made, such as 2026-01-31.
        records: records on the map.
        layout: places of `records`, in their order.
        grouping: groups of indexes of `records`.
        looks: colour and name position of each group, in the order of the groups.
    """

    collection: str
    where: str
    total: int
    made: str
    records: Sequence[Record]
    layout: Layout
    grouping: Grouping
    looks: Sequence[Look]


def render(drawing: Drawing) -> str:
    """Return the page as HTML.

    The content security policy of the page has hashes of the scripts and styles of this package, so a browser runs no
    others.
    """
    page = _part("page.html")
    for name in _PARTS:
        page = page.replace(f"{{{{hash of {name}}}}}", _hash(_part(name))).replace(f"{{{{{name}}}}}", _part(name))
    # Inserted last, so that a text that looks like a placeholder is not replaced.
    return page.replace("{{data}}", _json(_content(drawing)))


def _content(drawing: Drawing) -> dict[str, Any]:
    """Return the data of a map, in types that JSON can represent, for the scripts of the page; long texts truncated."""
    group_of = {i: number for number, group in enumerate(drawing.grouping.groups) for i in group.members}
    places = (drawing.layout.places * _SCALE).round().astype(int)
    return {
        "collection": drawing.collection,
        "where": drawing.where,
        "total": drawing.total,
        "made": drawing.made,
        "method": drawing.layout.method,
        "scale": _SCALE,
        "groupedBy": drawing.grouping.title,
        "groups": [
            {"name": group.name, "count": len(group.members), **asdict(look)}
            for group, look in zip(drawing.grouping.groups, drawing.looks, strict=True)
        ],
        "points": {
            "x": places[:, 0].tolist(),
            "y": places[:, 1].tolist(),
            "group": [group_of[i] for i in range(len(drawing.records))],
            "id": [record.id for record in drawing.records],
            "label": [record.label for record in drawing.records],
            "text": [_cut(record.text, _TEXT) for record in drawing.records],
            "metadata": [
                [[key, _cut(shown(value), _VALUE)] for key, value in sorted(record.metadata.items())]
                for record in drawing.records
            ],
        },
    }


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False).translate(_ESCAPES)


def _hash(content: str) -> str:
    return base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


def _part(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
