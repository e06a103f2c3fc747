"""Write fixtures of stored formats, with which tests check that later versions of emberpc read the formats.

    make_format_fixtures.py            write a fixture for each current version of a format that has none
    make_format_fixtures.py --check    print the versions without a fixture; exit with 1 if there are any

Run the script after a format version was raised, and commit the new folder of tests/data/formats. A fixture is never
written again: its value is that an earlier version wrote it. The bundle needs PyTorch; the other formats do not.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT / "tests") not in sys.path:
    sys.path.insert(0, str(ROOT / "tests"))

import format_fixtures  # noqa: E402 - from the folder of tests

DIMENSIONS = 8
#: Seconds (50 years) until the record with a time to live expires: tests must find it for a long time.
LIFE = 50 * 365.25 * 24 * 3600
#: Texts whose words are prepared for lexical search: accents, a ligature, wide letters, a soft hyphen. One is empty.
TEXTS = {
    "r03": "Crème brûlée",
    "r04": "\ufb01ne \uff57\uff49\uff44\uff45 letters",
    "r05": "soft\u00adware",
    "r06": "",
}
#: Record that is replaced after the snapshot, with its new text.
REPLACED = {"r07": "café of the replaced record"}
#: Records that are deleted before the snapshot, and one that is deleted after it.
DELETED, DELETED_LATER = ("r01", "r02"), ("r29",)
#: For each query of lexical search, the ids of its hits.
LEXICAL = {
    "creme": ["r03"],
    "fine wide": ["r04"],
    "software": ["r05"],
    "cafe": ["r07"],
    "number": [f"r{i:02}" for i in (0, *range(8, 29), *range(30, 34))],
    "absent": [],
}
#: Lines of the files with the classifier's training texts, and with texts outside its labels.
TRAINING = {
    "train.csv": [
        "text,label",
        *(f"{text * (i % 3 + 1)},{label}" for i in range(8) for text, label in (("a b ", "x"), ("p q ", "y"))),
    ],
    "outside.csv": ["text", *("k l " * (i % 4 + 1) + "m" * (i % 3) for i in range(12))],
}
#: Files of an open data directory that are no part of a copy: locks, reserved space, and memory shared by processes.
NOT_COPIED = ("lock", "reserve", "*.db-shm", "hnswlib-checked")


def data_directory_versions() -> dict[str, int]:
    """Return the current version of each format that the embedded index backend stores."""
    from emberpc.server.index.graph import snapshots
    from emberpc.server.index.jobs import backup
    from emberpc.server.index.search import recall
    from emberpc.server.index.storage import data_directory, schema

    return {
        "database": len(schema.STEPS),
        "catalogue": data_directory.FORMAT,
        "snapshot": snapshots.FORMAT,
        "recall": recall.FORMAT,
        "backup": backup.FORMAT,
    }


def bundle_versions() -> dict[str, int]:
    """Return the greatest version of the manifest's format."""
    from emberpc.bundle.manifest import FORMAT_VERSIONS

    return {"bundle": max(FORMAT_VERSIONS)}


def write_data_directory(folder: Path) -> dict[str, Any]:
    """Write `data.zip`, a data directory with one collection, and `backup.zip`, a backup of the collection.

    The graph has a snapshot. The last writes are in the write-ahead log and not in the snapshot.

    Returns:
        What a reader must find in the data directory and in the backup.
    """
    from emberpc.server.collections import CollectionSpec, NewRecord
    from emberpc.server.index import Index

    def record(number: int, text: str = "") -> NewRecord:
        name = f"r{number:02}"
        return NewRecord(
            name,
            text or TEXTS.get(name, f"The number {number}"),
            {"parity": "odd" if number % 2 else "even", "number": number, "deep": {"list": [number / 8, None, "é"]}},
            "third" if number % 3 == 0 else "",
            **({"time_to_live": LIFE} if number == 8 else {}),
        )

    # Multiples of 1/8, which JSON writes shortly and exactly. r10 and r11 have equal vectors, r12 has equal direction.
    vectors = (np.random.default_rng(0).integers(-32, 33, (40, DIMENSIONS)) / 8).astype(np.float32)
    vectors[11], vectors[12] = vectors[10], 2 * vectors[10]
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        index = Index(scratch / "data", buffer_limit=8)
        collection = index.create(CollectionSpec("fixture", DIMENSIONS, indexed_fields=("parity",)))
        collection.upsert([record(i) for i in range(30)], vectors[:30])
        collection.delete(DELETED)
        collection.maintain()
        save_recall(collection)
        index.close()
        index = Index(scratch / "data", buffer_limit=100)
        collection = index.get("fixture")
        replaced = [record(int(each[1:]), text) for each, text in REPLACED.items()]
        collection.upsert([*replaced, *(record(i) for i in range(30, 34))], vectors[[34, *range(30, 34)]])
        collection.delete(DELETED_LATER)
        shutil.copytree(scratch / "data", scratch / "copy", ignore=shutil.ignore_patterns(*NOT_COPIED))
        format_fixtures.pack(scratch / "copy", folder / "data.zip")
        (scratch / "backup").mkdir()
        pieces = collection.backup(lambda: False)
        (scratch / "backup" / "fixture.backup").write_bytes(b"".join(piece.data for piece in pieces))
        format_fixtures.pack(scratch / "backup", folder / "backup.zip")
        info, (records, _) = collection.info(), collection.page(1000, "", with_vectors=True)
        index.close()
    return {
        "spec": json.loads(collection.spec.to_json()),
        "create_time": info.create_time.isoformat(),
        "sequence": info.sequence,
        "deleted": [*DELETED, *DELETED_LATER],
        "lexical": LEXICAL,
        "records": [
            {
                **format_fixtures.record_fields(each),
                "expire_time": each.expire_time.isoformat() if each.expire_time else None,
            }
            for each in records
        ],
    }


def save_recall(collection: Any) -> None:
    """Measure recall, and save the figures: maintenance would do this only with 1000 vectors in the graph."""
    from emberpc.server.index.search import recall

    measured = recall.measure(collection._store, collection._neighbours, collection.spec.distance, lambda: False)
    if measured is None:
        raise SystemExit("the recall of the graph could not be measured")
    recall.save(measured, collection._folder)


def write_bundle(folder: Path) -> dict[str, Any]:
    """Write `bundle.zip`, a tiny classifier with a variant for one engine. This needs PyTorch and NNCF.

    The classifier rejects texts by another score than the best logit.

    Returns:
        What a reader must find: the fingerprint, outputs of PyTorch for some texts, and how texts are rejected.
    """
    from emberpc.bundle import read_bundle
    from emberpc.export.classifier import ClassifierData, export_classifier
    from fixtures_bundles import write_tiny

    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        write_tiny(scratch / "encoder", seed=0)
        for path, lines in TRAINING.items():
            (scratch / path).write_text("\n".join(lines) + "\n", encoding="utf-8")
        data = ClassifierData(scratch / "train.csv", outside=scratch / "outside.csv")
        export_classifier(data, scratch / "encoder", scratch / "bundle", variants=["int8-static"])
        fingerprint = read_bundle(scratch / "bundle").fingerprint()
        return {"fingerprint": fingerprint, **bundle_content(scratch / "bundle", folder / "bundle.zip")}


def bundle_content(bundle: Path, file: Path) -> dict[str, Any]:
    """Write a bundle's files to a ZIP file, and return what a reader must find: outputs, and how texts are rejected."""
    format_fixtures.pack(bundle, file)
    manifest = json.loads((bundle / "emberpc.json").read_text(encoding="utf-8"))
    with np.load(bundle / "reference.npz") as arrays:
        outputs = {name: arrays[name][:4].tolist() for name in arrays.files}
    rule = ("temperature", "rejection_logit", "rejection_score", "rejection_threshold")
    return {**outputs, "rule": {name: manifest[name] for name in rule if name in manifest}}


WRITERS: tuple[tuple[Callable[[], dict[str, int]], Callable[[Path], dict[str, Any]]], ...] = (
    (data_directory_versions, write_data_directory),
    (bundle_versions, write_bundle),
)


def missing(current: Mapping[str, int]) -> list[str]:
    """Return the current versions of formats that no fixture has, as names of folders such as `snapshot-4`."""
    wanted = {stored: range(version, version + 1) for stored, version in current.items()}
    return [each.replace(" ", "-") for each in format_fixtures.missing(wanted)]


def add(name: str, formats: Mapping[str, int], write: Callable[[Path], dict[str, Any]]) -> None:
    """Add a fixture; if it cannot be written, no folder is left."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / name
        folder.mkdir()
        content = {"formats": formats, "expected": write(folder)}
        (folder / "fixture.json").write_text(json.dumps(content) + "\n", encoding="utf-8")
        shutil.copytree(folder, format_fixtures.FORMATS / name)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    found = []
    for current, write in WRITERS:
        formats = current()
        if without := missing(formats):
            found += without
            if not check:
                add(without[0], formats, write)
    print(
        "\n".join(f"{name}: {'no fixture' if check else 'written'}" for name in found) or "each version has a fixture"
    )
    return int(check and bool(found))


if __name__ == "__main__":
    sys.exit(main())
