"""Export the committed bundles of tests/data/bundles again, or compare them with what the export writes today.

    make_test_bundles.py            replace the folder of bundles (install the versions of constraints.txt before)
    make_test_bundles.py --check    print the differences; exit with 1 if there are any

The bundles have tiny encoders with random weights. They are committed so that tests of the server need no PyTorch.
This script needs PyTorch. The comparison leaves out versions, measurements and the bytes of ONNX files.
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
#: Keys of the manifest whose values may differ between two exports of the same model, and are not compared: the time of
#: the export, and the versions of packages.
VOLATILE = ("created", "tools")
#: Keys of objects in the manifest. Of these objects, only the keys are compared: the values of `files` are hashes of
#: files, some with measurements, and those of the others are measurements.
MEASURED = ("files", "quality", "parity", "measured")
#: Keys of other JSON files whose values are versions of packages. They are not compared.
VERSIONS = ("transformers_version",)
#: Greatest difference between two numbers that count as the same: absolute, or for numbers of JSON above 1 relative to
#: the greater. The same model gives slightly different numbers on two processors.
TOLERANCE = 1e-3


def make(folder: Path, names: Sequence[str] = NAMES) -> None:
    """Export the bundles with these names, which are names of `NAMES`. This needs PyTorch.

    Args:
        folder: an existing folder. Each bundle is a new subfolder with the bundle's name.
        names: names of the bundles.

    Raises:
        BundleError: `folder` has one of the bundles already.
    """
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
    """Compare two folders with the same bundle; return a line for each file that differs, an empty list if none does.

    Of JSON files, all but versions and measurements is compared, and of .npz files the arrays, both with `TOLERANCE`.
    Of other files, only the names are compared.
    """
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
            # The README contains measurements, and the bytes of an ONNX file depend on the version of the exporter. The
            # outputs of PyTorch in reference.npz are compared instead: the export checks that those of the ONNX file
            # agree with them.
            continue
        if not same:
            found.append(f"{fresh.name}/{name}: another content")
    return found


def _same(left: object, right: object, key: str = "") -> bool:
    """Return whether two JSON values are the same, apart from versions and measurements.

    Numbers with a decimal point may differ by `TOLERANCE`.

    Args:
        left: a value of one file.
        right: the value at the same place of the other file.
        key: the key whose value in the file is `left`, or a list with `left`; empty for the whole file.
    """
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
