"""Create the development environment `.venv`, or bring it up to date.

PyTorch is installed first, in the version of constraints.txt, so that no later
package can install another build of it. hnswlib has no wheel and by default
compiles for the processor of this host; here it is built for x86-64-v3, so that
the environment, or pip's cache, also works on another machine.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / ".venv"
STAMP = ENVIRONMENT / "installed.sha256"
INPUTS = (ROOT / "pyproject.toml", ROOT / "constraints.txt", Path(__file__).resolve())


def fingerprint() -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in INPUTS)).hexdigest()


def build_environment() -> dict[str, str]:
    env = dict(os.environ)
    if platform.machine() == "x86_64":
        env.setdefault("HNSWLIB_NO_NATIVE", "1")
        env.setdefault("CXXFLAGS", "-O3 -march=x86-64-v3")
    return env


def main() -> int:
    if STAMP.exists() and STAMP.read_text() == fingerprint():
        return 0
    print("making .venv, or bringing it up to date: downloads about 1 GB the first time, and takes minutes", flush=True)
    python = ENVIRONMENT / "bin" / "python"
    # Do not create it again if it exists: it may be in use, and then its executable cannot be overwritten.
    if not python.exists():
        venv.create(ENVIRONMENT, with_pip=True)
    pip = [str(python), "-m", "pip", "install", "-c", "constraints.txt"]
    # Without --quiet, since the steps take minutes.
    steps = (["torch"], "PyTorch"), (["-e", ".[dev]"], "everything else; hnswlib is compiled, which takes a minute")
    for number, (arguments, what) in enumerate(steps, 1):
        print(f"step {number} of {len(steps)}: {what} …", flush=True)
        subprocess.run(pip + arguments, check=True, cwd=ROOT, env=build_environment())
    STAMP.write_text(fingerprint())
    return 0


if __name__ == "__main__":
    sys.exit(main())
