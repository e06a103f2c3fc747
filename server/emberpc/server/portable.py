"""Check whether hnswlib runs on this processor.

hnswlib may have been compiled on another host, for instructions that this host's processor does not have.
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

from emberpc.bundle.atomic_files import write_text_atomically

#: Name of the file in the data directory that records a passed check.
_MARKER = "hnswlib-checked"
#: Seconds to wait for the end of a check, after `meanwhile` has returned. A check that takes longer is stopped, and
#: counts neither as passed nor as failed.
_SECONDS = 30
# The Python code of the check. To import hnswlib is not enough: the special instructions are in the distance functions,
# which are called only when a graph is built or searched.
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
    """Check hnswlib in a child process, unless an earlier check passed (see `_key`); return the problem of hnswlib.

    Call this before hnswlib is imported in this process. A check takes about 0.2 s.

    Args:
        data_dir: the data directory. A passed check is recorded in a file there, if possible.
        meanwhile: called while the child process runs; not called if no check is needed or the child cannot start. An
            OSError of this function ends the check without a result; any other error is raised.

    Returns:
        The problem and its remedy if the processor lacks an instruction. Empty if hnswlib works, if hnswlib fails for
        another reason, or if the check takes too long or cannot be run. An import of hnswlib may fail then.
    """
    key = _key()
    marker = data_dir / _MARKER
    try:
        if key and marker.read_text(encoding="ascii") == key:
            return ""
    except (OSError, ValueError):
        pass  # no check has passed yet
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
        # If the directory does not exist yet or is read-only, the next start of the server repeats the check.
        with suppress(OSError):
            write_text_atomically(marker, key)
    return ""


def _key() -> str:
    """Return a hash (SHA-256, hex) of the circumstances of a check; a passed check is valid while the hash is the same.

    The circumstances are path, size and modification time of hnswlib's extension, path of the Python executable, and
    flags of the processor. Empty if one is unknown, as on systems other than Linux or processors other than x86. A
    check is not recorded then.
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
