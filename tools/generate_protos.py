"""Generate the Python code of protos/emberpc/v1; with --check, only compare it, and exit with 1 if it is not current.

Without --check, the script first deletes the generated code, which is then missing if the generator fails. The
script runs the generator in the version of tools/requirements-protos.txt, in an environment of its own, which it
creates if necessary: in the development environment, the generator would force an older version of protobuf.
"""

from __future__ import annotations

import argparse
import filecmp
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
PACKAGE = Path("emberpc/v1")
REQUIREMENTS = ROOT / "tools" / "requirements-protos.txt"
ENVIRONMENT = ROOT / ".venv-protos"


def generator() -> Path:
    """Return the path of the Python executable in the generator's environment, `.venv-protos`.

    The environment is created first if it is missing or incomplete, or if the pinned versions have changed.

    Raises:
        CalledProcessError: the packages cannot be installed.
    """
    python = ENVIRONMENT / "bin" / "python"
    stamp = ENVIRONMENT / "requirements.txt"
    wanted = REQUIREMENTS.read_text()
    if not stamp.exists() or stamp.read_text() != wanted:
        venv.create(ENVIRONMENT, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "-r", REQUIREMENTS], check=True)
        stamp.write_text(wanted)
    return python


def generate(target: Path) -> None:
    """Generate Python modules and type stubs from all protos of protos/emberpc/v1.

    Args:
        target: an existing folder; the files are written to its subfolder emberpc/v1, which is created if necessary.

    Raises:
        SystemExit: the generator failed; the message is its output.
        CalledProcessError: the packages of the generator cannot be installed.
    """
    python = generator()
    files = sorted(str(path.relative_to(PROTOS)) for path in (PROTOS / PACKAGE).glob("*.proto"))
    command = [
        str(python),
        "-m",
        "grpc_tools.protoc",
        f"--plugin=protoc-gen-mypy={python.parent / 'protoc-gen-mypy'}",
        f"--plugin=protoc-gen-mypy_grpc={python.parent / 'protoc-gen-mypy_grpc'}",
        "--proto_path=.",
        *(f"--{kind}_out={target}" for kind in ("python", "grpc_python", "mypy")),
        # With this option, the methods of servicers are not abstract in the stubs, so mypy accepts a servicer that does
        # not override all of them. At run time, a method that is not overridden answers UNIMPLEMENTED.
        f"--mypy_grpc_out=generate_concrete_servicer_stubs:{target}",
        *files,
    ]
    run = subprocess.run(command, check=False, cwd=PROTOS, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if run.returncode:
        raise SystemExit(run.stdout)
    for path in (target / PACKAGE).glob("*_pb2_grpc.py*"):
        # Delete the *_grpc modules of protos without a service, such as types.proto, since they are empty.
        source = PROTOS / PACKAGE / path.name.replace("_pb2_grpc.pyi", ".proto").replace("_pb2_grpc.py", ".proto")
        if "\nservice " not in source.read_text():
            path.unlink()


def generated(folder: Path) -> set[str]:
    return {path.name for path in (folder / PACKAGE).glob("*_pb2*.py*")}


def drift(fresh: Path) -> list[str]:
    """Compare the generated files in protos/ with freshly generated ones in the folder emberpc/v1 of `fresh`.

    Returns:
        Sorted names of the files that differ or are in only one of the two folders; empty if the code is current.
    """
    names = generated(PROTOS) | generated(fresh)
    _, changed, missing = filecmp.cmpfiles(PROTOS / PACKAGE, fresh / PACKAGE, names, shallow=False)
    return sorted(changed + missing)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if the committed code is stale")
    if not parser.parse_args().check:
        for name in generated(PROTOS):
            (PROTOS / PACKAGE / name).unlink()
        generate(PROTOS)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        stale = drift(Path(folder))
    if stale:
        print(f"generated code is stale, run `make protos`: {', '.join(stale)}", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
