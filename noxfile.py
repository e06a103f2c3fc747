"""The quick tests with other versions: `make test-matrix`. No session needs PyTorch.

A session installs the built wheel, not the checkout, and runs the tests of `make test-client` or `make test-server`:

- `newest` with every Python that the machine has, and the newest release of every dependency;
- `oldest` with the oldest Python, and the oldest release of every dependency that pyproject.toml allows.

`make test-matrix ARGS="-s 'oldest(client)'"` runs one of them; arguments after `--` go to pytest.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import nox

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
TESTS = {
    "client": ("tests/client tests/cli", "not slow and not server and not export"),
    "server": (
        "tests/bundle tests/conformance tests/engine tests/index tests/rpc tests/unit",
        "not slow and not export",
    ),
}
#: Extras whose lower bounds are tested.
RUNTIME = ("cli", "server-base", "server", "parquet")

nox.options.error_on_missing_interpreters = False
nox.options.default_venv_backend = "venv"
# pyenv's shims know only the versions that `pyenv global` names; its folders have all.
pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
os.environ["PATH"] = os.pathsep.join([*map(str, sorted(pyenv.glob("versions/3.*/bin"))), os.environ["PATH"]])


def lower_bounds() -> list[str]:
    """Return each requirement of the base install and the runtime extras in its oldest version, as `name==version`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    requirements = [*project["dependencies"], *(each for extra in RUNTIME for each in extras[extra])]
    found = (re.match(r"([A-Za-z0-9-]+)>=([0-9.]+)", each) for each in requirements)
    return sorted({f"{each[1]}=={each[2]}" for each in found if each})


def run(session: nox.Session, part: str, constraints: list[str]) -> None:
    """Build the wheel, install it with the tools of the tests, and run the tests of a part."""
    folder = Path(session.create_tmp()).resolve()
    session.run("python", "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT))
    wheel = max(folder.glob("emberpc-*.whl"), key=lambda path: path.stat().st_mtime)
    limits = folder / "constraints.txt"
    limits.write_text("\n".join(constraints), encoding="utf-8")
    env = {"HNSWLIB_NO_NATIVE": "1", "CXXFLAGS": "-O3 -march=x86-64-v3"} if os.uname().machine == "x86_64" else {}
    session.install("-c", str(limits), f"emberpc[dev-{part}] @ {wheel.as_uri()}", env=env)
    # An environment that is used again has a wheel of the same version, which pip would keep.
    session.install("--quiet", "--force-reinstall", "--no-deps", wheel.as_uri())
    paths, marks = TESTS[part]
    session.run(
        *("python", "-m", "pytest", *paths.split(), "-m", marks, "-n", "2", "--dist", "loadfile", *session.posargs),
        env={"PYTHONPATH": ""},  # else a checkout that it names would be tested in place of the wheel
    )


@nox.session(python=PYTHONS)
@nox.parametrize("part", [nox.param(part, id=part) for part in TESTS])
def newest(session: nox.Session, part: str) -> None:
    """Run the tests of a part with the newest dependencies."""
    run(session, part, [])


@nox.session(python=PYTHONS[0])
@nox.parametrize("part", [nox.param(part, id=part) for part in TESTS])
def oldest(session: nox.Session, part: str) -> None:
    """Run the tests of a part with the oldest dependencies."""
    run(session, part, lower_bounds())
