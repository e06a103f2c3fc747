"""Make the committed bundles of tests/data/bundles again, or compare them with what the export writes today.

    make_test_bundles.py            write them (with the versions of constraints.txt)
    make_test_bundles.py --check    name the differences; exit 1 if there are any

They have tiny encoders with random weights, so that tests of the server need no PyTorch.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT / "tests") not in sys.path:
    sys.path.insert(0, str(ROOT / "tests"))

from fixtures_bundles import BUNDLES, write_tiny  # noqa: E402 - from the folder of tests

NAMES = ("tiny", "other-tiny", "tiny-classifier")
#: Of the manifest, what differs between two exports of the same model: the time, and versions.
VOLATILE = ("created", "tools")
#: Objects of the manifest whose values are measurements, or hashes of files that contain measurements: only the names
#: are compared.
MEASURED = ("files", "quality", "parity", "measured")
#: Of other JSON files.
VERSIONS = ("transformers_version",)
#: Greatest difference between numbers of the same model on two processors.
TOLERANCE = 1e-3


def make(folder: Path, names: Sequence[str] = NAMES) -> None:
    """Write bundles into a folder that has none of them."""
    from emberpc.export.classifier import ClassifierData, export_classifier
    from emberpc.export.embedding import export_embedding

    with tempfile.TemporaryDirectory() as scratch:
        for seed, name in enumerate(("tiny", "other-tiny")):
            source = Path(scratch) / f"{name}-bert"
            write_tiny(source, seed)
            if name in names:
                export_embedding(str(source), folder / name)
        if "tiny-classifier" in names:
            train = Path(scratch) / "train.csv"
            rows = [f"{text * (i % 3 + 1)},{label}" for i in range(8) for text, label in (("a b ", "x"), ("p q ", "y"))]
            train.write_text("\n".join(["text,label", *rows]))
            export_classifier(ClassifierData(train), str(Path(scratch) / "tiny-bert"), folder / "tiny-classifier")


def differences(committed: Path, fresh: Path) -> list[str]:
    """Return what differs between two bundles, one line each."""
    old, new = (
        {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
        for folder in (committed, fresh)
    )
    found = [f"{fresh.name}/{name}: only one of the two has it" for name in sorted(set(old) ^ set(new))]
    for name in sorted(set(old) & set(new)):
        if name.endswith(".json"):
            same = _same(*(json.loads(files[name].read_text(encoding="utf-8")) for files in (old, new)))
        elif name.endswith(".npz"):
            same = _same_arrays(old[name], new[name])
        else:
            # The README has measurements; the bytes of a graph depend on the exporter. Its outputs are in the arrays.
            continue
        if not same:
            found.append(f"{fresh.name}/{name}: another content")
    return found


def _same(left: object, right: object, key: str = "") -> bool:
    """Are two JSON values the same, apart from versions and measurements?"""
    if isinstance(left, dict) and isinstance(right, dict):
        if left.keys() != right.keys():
            return False
        if key in MEASURED:
            return True
        return all(_same(left[name], right[name], name) for name in left.keys() - {*VOLATILE, *VERSIONS})
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(_same(*pair, key) for pair in zip(left, right, strict=True))
    if isinstance(left, float) and isinstance(right, float):
        return math.isclose(left, right, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    return left == right


def _same_arrays(left: Path, right: Path) -> bool:
    with np.load(left) as old, np.load(right) as new:
        return sorted(old.files) == sorted(new.files) and all(
            old[name].dtype == new[name].dtype
            and old[name].shape == new[name].shape
            and (
                np.allclose(old[name], new[name], atol=TOLERANCE)
                if old[name].dtype.kind == "f"
                else np.array_equal(old[name], new[name])
            )
            for name in old.files
        )


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch) / "bundles"
        fresh.mkdir()
        make(fresh)
        if check:
            found = [line for name in NAMES for line in differences(BUNDLES / name, fresh / name)]
            print(
                "\n".join([*found, "run: .venv/bin/python tools/make_test_bundles.py"] if found else ["as committed"])
            )
            return min(len(found), 1)
        shutil.rmtree(BUNDLES, ignore_errors=True)
        shutil.copytree(fresh, BUNDLES)
    return 0


if __name__ == "__main__":
    sys.exit(main())
