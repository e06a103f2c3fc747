"""`emberpc collection map` against a real server: the content of the page, and that texts cannot run as scripts."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emberpc.cli.maps.colours import looks
from emberpc.cli.maps.groups import ColourGroup, Grouping, distinguishing_words
from emberpc.cli.maps.layout import lay_out
from emberpc.cli.maps.page import _json
from emberpc.client import Client

Emberpc = Any

KINDS = ("fruit", "beast", "tool")
NASTY = "</script><script>alert(1)</script><!-- {{data}} {{page.css}} \u2028 & <img src=x onerror=alert(1)>"


class Elements(HTMLParser):
    """The elements of a page with their attributes, and the contents of scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.contents: list[tuple[str, str | None, str]] = []
        self._open: tuple[str, str | None] | None = None
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self._open = (tag, dict(attrs).get("type")) if tag in ("script", "style") else None

    def handle_data(self, data: str) -> None:
        if self._open:
            self.contents.append((*self._open, data))

    def handle_endtag(self, tag: str) -> None:
        self._open = None


def data_of(page: Path) -> Any:
    """Return the JSON data of a page, parsed as a browser does."""
    (data,) = [text for _, kind, text in Elements(page.read_text("utf-8")).contents if kind == "application/json"]
    return json.loads(data)


def blobs(count: int) -> list[dict[str, Any]]:
    """Return records in three clusters, each with a label of its own and texts that name the label."""
    rng = np.random.default_rng(0)
    middles = np.eye(3, 8)
    return [
        {
            "id": f"r{i}",
            "text": f"this {KINDS[i % 3]} is number {i}",
            "label": KINDS[i % 3],
            "metadata": {"n": i, "odd": bool(i % 2), "deep": {"kind": KINDS[i % 3]}},
            "vector": middles[i % 3] + rng.normal(0, 0.1, 8),
        }
        for i in range(count)
    ]


Make = Callable[..., str]


@pytest.fixture
def make(tiny_client: Client) -> Make:
    """Return a function that creates the collection `drawn` with given records."""

    def collection(records: Sequence[Mapping[str, Any]], *, dimensions: int = 8) -> str:
        tiny_client.create_collection("drawn", dimensions=dimensions)
        tiny_client.upsert("drawn", records)
        return "drawn"

    return collection


def test_each_record_is_on_the_page_once_near_records_of_its_label(
    emberpc: Emberpc, make: Make, tmp_path: Path
) -> None:
    target = tmp_path / "map.html"
    outcome = emberpc("collection", "map", make(blobs(90)), "-o", target)
    assert (outcome.code, outcome.out) == (0, "")
    assert outcome.err.splitlines() == ["reading records … 0 of 90", "laying out …", f"{target} shows all 90 records"]
    assert list(tmp_path.iterdir()) == [target]
    data = data_of(target)
    points = data["points"]
    assert sorted(points["id"]) == sorted(f"r{i}" for i in range(90))
    of = dict(zip(points["id"], zip(points["text"], points["label"], points["metadata"], strict=True), strict=True))
    metadata = [["deep", '{"kind": "fruit"}'], ["n", "3"], ["odd", "true"]]
    assert of["r3"] == ("this fruit is number 3", "fruit", metadata)
    assert (data["groupedBy"], data["total"]) == ("label", 90)
    assert sorted((group["name"], group["count"]) for group in data["groups"]) == [(k, 30) for k in sorted(KINDS)]
    places = np.column_stack([points["x"], points["y"]])
    assert np.abs(places).max() <= data["scale"]
    apart = np.linalg.norm(places[:, None] - places[None], axis=2) + np.diag([np.inf] * 90)
    group = np.array(points["group"])
    assert (group[apart.argmin(axis=1)] == group).mean() > 0.95
    for number, each in enumerate(data["groups"]):
        name = np.array([each["x"], each["y"]]) * data["scale"]
        assert group[np.linalg.norm(places - name, axis=1).argmin()] == number


def test_the_page_loads_no_other_file_and_escapes_all_texts(emberpc: Emberpc, make: Make, tmp_path: Path) -> None:
    plain, nasty = tmp_path / "plain.html", tmp_path / "nasty.html"
    records = [
        {"id": NASTY, "text": NASTY, "label": NASTY, "metadata": {NASTY: NASTY}, "vector": [1.0] * 8},
        {"id": "b", "text": "plain", "vector": [-1.0] * 8},
    ]
    name = make(records)
    assert emberpc("collection", "map", name, "-o", nasty).code == 0
    assert emberpc("collection", "map", name, "-o", plain, "--limit", 1, "--where", "not x exists").code == 0
    page, other = (Elements(path.read_text("utf-8")) for path in (nasty, plain))
    assert page.tags == other.tags
    assert not [name for name, _ in page.attributes if name in ("src", "href", "style") or name.startswith("on")]
    points = data_of(nasty)["points"]
    i = points["id"].index(NASTY)
    assert [points["text"][i], points["label"][i], points["metadata"][i]] == [NASTY, NASTY, [[NASTY, NASTY]]]
    # A browser may run only the script that is part of emberpc.
    (policy,) = [value or "" for key, value in page.attributes if key == "content" and "default-src" in (value or "")]
    assert policy.startswith("default-src 'none'; ")
    run = [text for _, kind, text in page.contents if kind is None]
    hashes = {base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in run}
    assert len(run) == 3
    assert set(re.findall(r"'sha256-([^']+)'", policy)) == hashes
    assert "innerHTML" not in "".join(run)


@given(st.text(max_size=40))
def test_embedded_json_escapes_characters_that_end_an_element(text: str) -> None:
    embedded = _json({text: text})
    assert json.loads(embedded) == {text: text}
    assert not set("<>&\u2028\u2029") & set(embedded)


@pytest.mark.parametrize("count", [1, 2, 3, 10, 12, 20])
@pytest.mark.parametrize("equal", [False, True])
def test_a_collection_of_few_or_equal_records_has_a_map(
    emberpc: Emberpc, make: Make, tmp_path: Path, count: int, equal: bool
) -> None:
    records = [{**record, "label": "", **({"vector": [1.0] * 8} if equal else {})} for record in blobs(count)]
    outcome = emberpc("collection", "map", make(records), "-o", tmp_path / "map.html")
    assert outcome.code == 0
    assert outcome.err.endswith(f"shows {'all ' if count > 1 else ''}{count} record{'s' if count > 1 else ''}\n")
    data = data_of(tmp_path / "map.html")
    assert len(set(zip(data["points"]["x"], data["points"]["y"], strict=True))) == count
    assert sum(group["count"] for group in data["groups"]) == count


def test_a_map_of_no_records_is_refused_and_leaves_no_file(emberpc: Emberpc, make: Make, tmp_path: Path) -> None:
    name, target = make([]), tmp_path / "map.html"
    outcome = emberpc("collection", "map", name, "-o", target)
    assert outcome.code == 4
    assert outcome.err.endswith("error: 'drawn' holds no records yet; write some with `emberpc upsert`\n")
    outcome = emberpc("collection", "map", name, "-o", target, "--where", "n > 3")
    assert outcome.err.endswith("error: 'drawn' holds no records that match the filter\n")
    assert not target.exists()


def test_a_sample_is_reproducible_and_mostly_stays_after_new_records(
    emberpc: Emberpc, tiny_client: Client, make: Make, tmp_path: Path
) -> None:
    name, target = make(blobs(150)), tmp_path / "map.html"
    pages, samples = [], []
    for _ in range(2):
        outcome = emberpc("collection", "map", name, "-o", target, "--limit", 40, "--overwrite")
        assert outcome.err.endswith("shows 40 of 150 records; --limit 0 shows all\n")
        pages.append(target.read_bytes())
        samples.append(set(data_of(target)["points"]["id"]))
    assert pages[0] == pages[1]
    assert {int(each[1:]) % 3 for each in samples[0]} == {0, 1, 2}
    tiny_client.upsert(name, [{**record, "id": f"new{i}"} for i, record in enumerate(blobs(15))])
    assert emberpc("collection", "map", name, "-o", target, "--limit", 40, "--overwrite").code == 0
    assert len(samples[0] & set(data_of(target)["points"]["id"])) >= 30
    assert data_of(target)["total"] == 165
    assert emberpc("collection", "map", name, "-o", target, "--limit", 0, "--overwrite").code == 0
    assert len(data_of(target)["points"]["id"]) == 165


def test_points_are_coloured_by_the_metadata_field_of_color_by(emberpc: Emberpc, make: Make, tmp_path: Path) -> None:
    name, target = make([*blobs(40), {"id": "bare", "vector": [0.5] * 8}]), tmp_path / "map.html"

    def groups(*options: object) -> list[tuple[str, int]]:
        assert emberpc("collection", "map", name, "-o", target, "--overwrite", *options).code == 0
        return [(group["name"], group["count"]) for group in data_of(target)["groups"]]

    assert groups() == [("fruit", 14), ("beast", 13), ("tool", 13), ("no label", 1)]
    assert groups("--color-by", "deep.kind") == [("fruit", 14), ("beast", 13), ("tool", 13), ("no deep.kind", 1)]
    assert groups("--color-by", "odd", "--where", "n < 9") == [("false", 5), ("true", 4)]
    assert groups("--color-by", "n", "--where", "n < 3") == [("0", 1), ("1", 1), ("2", 1)]
    ranges = groups("--color-by", "n")
    assert (ranges[0][0], ranges[-2][0], ranges[-1]) == ("0 – 5", "34 – 39", ("no n", 1))
    assert sum(count for _, count in ranges) == 41
    hues = [group["hue"] for group in data_of(target)["groups"]]
    assert hues[:-1] == sorted(hues[:-1], reverse=True)
    assert hues[-1] is None
    outcome = emberpc("collection", "map", name, "-o", target, "--overwrite", "--color-by", "colour")
    assert outcome.code == 2
    assert "no record has a metadata field 'colour'; there are: deep, n, odd" in outcome.err
    outcome = emberpc("collection", "map", name, "-o", target, "--overwrite", "--color-by", "n", "--clusters", 2)
    assert outcome.err == "error: give --color-by or --clusters; one of the two\n"


def test_clusters_are_named_by_their_words(emberpc: Emberpc, make: Make, tmp_path: Path) -> None:
    target = tmp_path / "map.html"
    assert emberpc("collection", "map", make(blobs(90)), "-o", target, "--clusters", 3).code == 0
    data = data_of(target)
    assert data["groupedBy"] == "cluster"
    assert sorted((group["name"], group["count"]) for group in data["groups"]) == [(k, 30) for k in sorted(KINDS)]


def test_map_replaces_an_existing_file_only_with_overwrite(emberpc: Emberpc, make: Make, tmp_path: Path) -> None:
    name, target = make(blobs(3)), tmp_path / "map.html"
    target.write_text("mine")
    outcome = emberpc("collection", "map", name, "-o", target)
    assert (outcome.code, outcome.err) == (
        2,
        f"error: --output: {target} is there already; choose another name, or --overwrite\n",
    )
    assert "a folder; give the name" in emberpc("collection", "map", name, "-o", tmp_path).err
    assert "is not there; make it" in emberpc("collection", "map", name, "-o", tmp_path / "a" / "map.html").err
    assert target.read_text() == "mine"
    assert emberpc("collection", "map", name, "-o", target, "--overwrite").code == 0
    assert len(data_of(target)["points"]["id"]) == 3


@pytest.mark.export
@pytest.mark.parametrize(
    ("distance", "dimensions", "size"),
    [
        # Each pair of values of two parameters is in one fast test.
        pytest.param(distance, dimensions, size, marks=[] if (i + j + k) % 3 == 0 else [pytest.mark.slow])
        for i, distance in enumerate(("cosine", "dot_product", "euclidean"))
        for j, dimensions in enumerate((1, 2, 50))
        for k, size in enumerate((1e-30, 1.0, 1e30))
    ],
)
def test_lay_out_gives_finite_places_for_all_finite_vectors(distance: str, dimensions: int, size: float) -> None:
    vectors = np.random.default_rng(0).normal(0, size, (14, dimensions)).astype(np.float32)
    vectors[3] = 0
    places = lay_out(vectors, distance).places
    assert places.shape == (14, 2)
    assert np.isfinite(places).all()
    assert np.abs(places).max() <= 1
    assert np.array_equal(places, lay_out(vectors, distance).places)


def test_distinguishing_words_leave_out_words_of_all_groups() -> None:
    pets = ["the cat and the cats", "the cat is 12", "a cat, a dog"]
    money = ["the interest rates rose", "interest is the rate of money", "the bank's interest"]
    assert distinguishing_words([pets, money], 2)[0] == ["cat"]
    assert distinguishing_words([pets, money], 1)[1] == ["interest"]
    assert distinguishing_words([["the same"] * 3, ["the same"] * 3, []]) == [[], [], []]
    assert distinguishing_words([["наш кот", "кот спит"], ["банк рос", "банк закрыт"]], 1) == [["кот"], ["банк"]]


def test_neighbour_groups_differ_in_colour_and_scattered_groups_have_no_name() -> None:
    rng = np.random.default_rng(0)
    middles = np.stack(np.meshgrid(np.linspace(-0.9, 0.9, 7), np.linspace(-0.9, 0.9, 7)), axis=2).reshape(-1, 2)
    around = (middles[:, None] + rng.normal(0, 0.01, (49, 10, 2))).reshape(-1, 2)
    places = np.concatenate([around, rng.uniform(-1, 1, (200, 2))])
    groups = [ColourGroup(str(i), range(10 * i, 10 * i + 10)) for i in range(49)]
    found = looks(Grouping("label", [*groups, ColourGroup("scattered", range(490, 690))]), places)
    assert all(
        look.x is not None and abs(look.x - middle[0]) < 0.02 for look, middle in zip(found, middles, strict=False)
    )
    assert found[-1].x is None
    colours = [(look.hue, look.tone) for look in found[:-1]]
    for i in range(49):
        for j in range(i):
            if np.linalg.norm(middles[i] - middles[j]) < 0.5:
                assert colours[i] != colours[j]
