"""Check whether hnswlib runs on this processor.

hnswlib is compiled where it is installed, and may use instructions that this host's processor does not have.
"""

from __future__ import annotations

import hashlib
import importlib.util
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

#: File in the data directory that records a passed check.
_MARKER = "hnswlib-checked"
#: Most seconds that the check may take; after that its result is unknown.
_SECONDS = 30
# An import alone is no check: the special instructions are in the distance functions, which only a graph calls.
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
    """Run hnswlib in a child process, unless an earlier check on this processor passed.

    Call this before hnswlib is imported in this process. The first check takes some 0.2 s.

    Args:
        data_dir: the data directory, which records a passed check. If it does not exist, nothing is recorded.
        meanwhile: called while the child process runs; not called without one.

    Returns:
        The problem and its remedy. Empty if hnswlib works, or if it fails in another way: its import then raises.
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
        # The directory may not exist yet, or may be read-only. Then the next start repeats the check.
        with suppress(OSError):
            marker.write_text(key, encoding="ascii")
    return ""


def _key() -> str:
    """Return a hash of the hnswlib extension, the Python executable and the processor's flags; empty if one is unknown.

    A passed check is valid as long as this hash stays the same.
    """
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
