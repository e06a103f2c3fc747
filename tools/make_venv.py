"""Create a development environment, or bring it up to date.

    make_venv.py          .venv: everything, PyTorch too
    make_venv.py server   .venv-server: the server, the client and pytest
    make_venv.py client   .venv-client: the client, the command line and pytest
    make_venv.py matrix   .venv-matrix: nox, which makes an environment for each set of versions
    make_venv.py optimum  .venv-optimum: the ONNX backends of sentence-transformers and optimum, for slow tests

Packages that constraints.txt names (for .venv-optimum: constraints-optimum.txt) are installed in its versions. Some of
these need Python 3.11 or newer; a new environment has the Python that runs this script. In .venv, PyTorch is installed
first, so that no later package installs another build of PyTorch.

hnswlib has no wheel, and is compiled. Its own default is to compile for the processor of this host. On x86-64, this
script compiles it for x86-64-v3, or as CXXFLAGS in the environment says, so that the environment, or pip's cache, also
works on other machines with x86-64-v3. An environment is only changed in three cases: its installation was not
completed; pyproject.toml, a file of constraints or this script changed since; or its emberpc is not the editable
install of this checkout, for example because `pip install .` replaced this install by a copy.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parent.parent
INPUTS = (
    *(ROOT / name for name in ("pyproject.toml", "constraints.txt", "constraints-optimum.txt")),
    Path(__file__).resolve(),
)
#: File of an environment with the fingerprint of the inputs that were installed last.
STAMP = "installed.sha256"


@dataclass(frozen=True)
class Environment:
    """A virtual environment.

    Attributes:
        folder: name of the folder in the checkout.
        effort: text for the user about the size of the download and, if it is long, the time of the installation.
        steps: for each call of `pip install`, the arguments, separated by spaces, and a text for the user about what is
            installed.
        constraints: file of the checkout that pins versions.
    """

    folder: str
    effort: str
    steps: tuple[tuple[str, str], ...]
    constraints: str = "constraints.txt"


ENVIRONMENTS = {
    "all": Environment(
        ".venv",
        "downloads about 1 GB the first time, and takes minutes",
        (("torch", "PyTorch"), ("-e .[dev]", "everything else; hnswlib is compiled, which takes a minute")),
    ),
    "server": Environment(
        ".venv-server",
        "downloads about 100 MB the first time",
        (("-e .[dev-server]", "the server and pytest; hnswlib is compiled, which takes a minute"),),
    ),
    "client": Environment(
        ".venv-client",
        "downloads about 30 MB the first time",
        (("-e .[dev-client]", "the client, the command line and pytest"),),
    ),
    "optimum": Environment(
        ".venv-optimum",
        "downloads about 1 GB the first time",
        (("torch", "PyTorch"), ("sentence-transformers[onnx]", "sentence-transformers with optimum-onnx")),
        "constraints-optimum.txt",
    ),
    "matrix": Environment(".venv-matrix", "downloads about 5 MB the first time", (("nox tomli", "nox"),)),
}


def fingerprint() -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in INPUTS)).hexdigest()


def runs_this_checkout(folder: Path) -> bool:
    """Return whether the emberpc of the environment in `folder` is the editable install of this checkout."""
    try:
        (path,) = folder.glob("lib/*/site-packages/emberpc-*/direct_url.json")
        origin = json.loads(path.read_text())
        is_editable = bool(origin["dir_info"]["editable"])
        return is_editable and Path(unquote(urlsplit(origin["url"]).path)).resolve() == ROOT
    except (OSError, ValueError, LookupError, TypeError):
        return False  # no emberpc, several, one that is not editable, or a damaged file


def is_current(environment: Environment) -> bool:
    """Return whether nothing has to be installed in an environment."""
    folder = ROOT / environment.folder
    stamp = folder / STAMP
    has_emberpc = any(arguments.startswith("-e .") for arguments, _ in environment.steps)
    return stamp.exists() and stamp.read_text() == fingerprint() and (not has_emberpc or runs_this_checkout(folder))


def build_environment() -> dict[str, str]:
    env = dict(os.environ)
    if platform.machine() == "x86_64":
        env.setdefault("HNSWLIB_NO_NATIVE", "1")
        env.setdefault("CXXFLAGS", "-O3 -march=x86-64-v3")
    return env


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("environment", nargs="?", default="all", choices=ENVIRONMENTS)
    environment = ENVIRONMENTS[parser.parse_args().environment]
    folder = ROOT / environment.folder
    if is_current(environment):
        return 0
    print(f"making {environment.folder}, or bringing it up to date: {environment.effort}", flush=True)
    python = folder / "bin" / "python"
    # An existing environment is not created again: a process may use its Python, which cannot be overwritten then.
    if not python.exists():
        venv.create(folder, with_pip=True)
    pip = [str(python), "-m", "pip", "install", "-c", environment.constraints]
    # pip runs without --quiet, since the steps take minutes, and the user should see progress.
    for number, (arguments, what) in enumerate(environment.steps, 1):
        print(f"step {number} of {len(environment.steps)}: {what} …", flush=True)
        subprocess.run(pip + arguments.split(), check=True, cwd=ROOT, env=build_environment())
    (folder / STAMP).write_text(fingerprint())
    return 0


if __name__ == "__main__":
    sys.exit(main())
