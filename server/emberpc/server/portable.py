"""Does hnswlib run on this processor? It is compiled where it is installed, at times for more than this host has."""

from __future__ import annotations

import hashlib
import importlib.util
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

#: Where a passed check is remembered, in the data directory.
_MARKER = "hnswlib-checked"
_SECONDS = 30
# Importing it is not enough: the distances are computed only when it is used.
_CODE = """
import hnswlib
for space in ("ip", "l2"):
    for dimensions in (3, 4, 16, 20, 384):
        graph = hnswlib.Index(space=space, dim=dimensions)
        graph.init_index(8)
        graph.add_items([[float(i)] * dimensions for i in range(8)], num_threads=1)
        graph.knn_query([[1.0] * dimensions], k=2, num_threads=1)
"""
_REMEDY = (
    "hnswlib was compiled for another processor and cannot run on this one; install it again with "
    'HNSWLIB_NO_NATIVE=1 CXXFLAGS="-march=x86-64-v3" pip install --force-reinstall --no-binary hnswlib '
    "--no-cache-dir hnswlib (x86-64-v2 for processors without AVX2)"
)


def hnswlib_problem(data_dir: Path, meanwhile: Callable[[], object] = lambda: None) -> str:
    """Try hnswlib in a process of its own, unless that was done before on this processor.

    Must be called before hnswlib is imported here. Takes some 0.2 s the first time.

    Args:
        data_dir: where a passed check is remembered, if it is there.
        meanwhile: called while the other process runs, if it does.

    Returns:
        What is wrong and the remedy; empty if nothing is, or if it fails in another way, which its import will tell.
    """
    key = _key()
    marker = data_dir / _MARKER
    try:
        if key and marker.read_text(encoding="ascii") == key:
            return ""
    except (OSError, ValueError):
        pass  # not checked yet
    try:
        with subprocess.Popen(  # noqa: S603 - our own code
            [sys.executable, "-c", _CODE], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            try:
                meanwhile()
                status = process.wait(_SECONDS)
            finally:
                process.kill()
    except (OSError, subprocess.TimeoutExpired):
        return ""
    if status == -signal.SIGILL:
        return _REMEDY
    if status == 0 and key:
        # The directory may not be there yet, or be read-only: then it is checked again.
        with suppress(OSError):
            marker.write_text(key, encoding="ascii")
    return ""


def _key() -> str:
    """Return what the outcome depends on: the extension and the processor; empty if they cannot be told."""
    try:
        found = importlib.util.find_spec("hnswlib")
        if found is None or found.origin is None:
            return ""
        facts = Path(found.origin).stat()
        flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        return ""
    what = f"{found.origin} {facts.st_size} {facts.st_mtime_ns} {sys.executable} {flags}"
    return hashlib.sha256(what.encode()).hexdigest()
