"""The page that shows a map: one HTML file that needs nothing else, and in which texts are never markup."""

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

#: What the page is put together from; each stands in it as it is.
_PARTS = ("page.css", "drawing.js", "panels.js")
#: Characters of a text, and of a value of metadata, that the page holds; of longer ones it shows the beginning.
_TEXT, _VALUE = 2000, 300
#: Places are whole numbers on the page, from minus this to this.
_SCALE = 10_000
#: What would end the script element, begin another or be a line's end to old JavaScript.
_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


@dataclass(frozen=True)
class Drawing:
    """All that a map shows.

    Attributes:
        collection: its name.
        where: the filter, empty for none.
        total: records that there are, of which `records` may be a sample.
        made: the day, such as 2026-01-31.
        records: those on the map.
        layout: where they lie.
        grouping: what groups they are in.
        looks: how each group is shown.
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
    """Return the page.

    A browser carries out nothing in it but its own parts, whose hashes are in
    its policy.
    """
    page = _part("page.html")
    for name in _PARTS:
        page = page.replace(f"{{{{hash of {name}}}}}", _hash(_part(name))).replace(f"{{{{{name}}}}}", _part(name))
    # Last, so that a text that looks like a placeholder is left as it is.
    return page.replace("{{data}}", _json(_content(drawing)))


def _content(drawing: Drawing) -> dict[str, Any]:
    """Return what the page's script reads."""
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
