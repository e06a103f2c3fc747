"""Fixtures of stored formats, in `tests/data/formats`: which versions they have, and copies of them.

A fixture is a folder with files as a version of emberpc wrote them, in ZIP files, and `fixture.json`: the versions of
the stored formats in the files (`formats`), and what a reader must find in them (`expected`). One fixture may have
several formats: a data directory has a catalogue, a database, a snapshot and recall figures.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FORMATS = Path(__file__).resolve().parent / "data" / "formats"


def description(name: str) -> dict[str, Any]:
    """Return the content of a fixture's `fixture.json`."""
    found: dict[str, Any] = json.loads((FORMATS / name / "fixture.json").read_text(encoding="utf-8"))
    return found


def versions(name: str) -> dict[str, int]:
    """Return the version of each stored format in the files of a fixture, by the format's name, such as `snapshot`."""
    found: dict[str, int] = description(name)["formats"]
    return found


def names(stored: str) -> list[str]:
    """Return the sorted names of the fixtures whose files have the stored format named `stored`, such as `snapshot`."""
    found = sorted(path.parent.name for path in FORMATS.glob("*/fixture.json"))
    return [name for name in found if stored in versions(name)]


def record_fields(record: Any) -> dict[str, Any]:
    """Return the fields of a stored record as JSON values, without its expire time."""
    return {
        "id": record.id,
        "text": record.text,
        "metadata": record.metadata,
        "label": record.label,
        "revision": record.revision,
        "create_time": record.create_time.isoformat(),
        "update_time": record.update_time.isoformat(),
        "vector": [] if record.vector is None else record.vector.tolist(),
    }


def missing(current: Mapping[str, range]) -> list[str]:
    """Return the versions of stored formats of which there is no fixture, such as `snapshot 4`.

    Args:
        current: all versions of each stored format, old ones included, by the format's name.
    """
    return [
        f"{stored} {version}"
        for stored, wanted in current.items()
        for version in wanted
        if version not in [versions(name)[stored] for name in names(stored)]
    ]


def unpack(name: str, file: str, folder: Path) -> Path:
    """Extract a ZIP file of a fixture to a folder, which is created; return the folder."""
    with zipfile.ZipFile(FORMATS / name / file) as archive:
        archive.extractall(folder)
    return folder


def pack(folder: Path, file: Path) -> None:
    """Write all files of a folder to a ZIP file, whose bytes do not depend on the time or the order of the files."""
    with zipfile.ZipFile(file, "w") as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                entry = zipfile.ZipInfo(path.relative_to(folder).as_posix())
                archive.writestr(entry, path.read_bytes(), zipfile.ZIP_DEFLATED, 9)
