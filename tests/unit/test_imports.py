"""Modules that an import loads in a new process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from emberpc.client import Client
from examples.server_process import ServerProcess

TRAINING = ("torch", "transformers", "optimum", "sentence_transformers", "sklearn", "onnx")


def loaded_by(statement: str) -> set[str]:
    """Return the top-level modules that a statement loads."""
    code = f"import sys\n{statement}\nprint(*sorted(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    modules = run.stdout.split()
    return {name.partition(".")[0] for name in modules} | {name for name in modules if name.startswith("emberpc.")}


@pytest.mark.parametrize(
    ("statement", "never"),
    [
        ("import emberpc.server.app", (*TRAINING, "typer", "emberpc.client", "emberpc.export")),
        ("import emberpc.server", (*TRAINING, "onnxruntime")),
        (
            "import emberpc.client",
            (*TRAINING, "onnxruntime", "tokenizers", "hnswlib", "typer", "rich", "emberpc.server"),
        ),
        ("import emberpc.bundle", (*TRAINING, "onnxruntime", "tokenizers", "grpc", "google")),
        ("import emberpc.export.verify", (*TRAINING[:-1], "grpc", "emberpc.server")),
        ("import emberpc.cli.main", (*TRAINING, "onnxruntime", "hnswlib", "grpc")),
        # Fewer imports make a server start sooner.
        (
            "from emberpc.cli.app import program; program('serve')",
            (*TRAINING, "onnxruntime", "hnswlib", "grpc", "emberpc.client", "emberpc.bundle", "rich.progress"),
        ),
    ],
)
def test_importing_a_package_loads_only_what_it_needs(statement: str, never: tuple[str, ...]) -> None:
    assert loaded_by(statement) & set(never) == set()


def test_serve_sets_variables_of_libraries_before_it_imports_them(tmp_path: Path) -> None:
    """A library reads its variables once, when it is imported.

    With gRPC's fork handlers, the child process of a snapshot sometimes aborted. With threads of OpenBLAS, each start
    took more CPU time.
    """
    code = """
import os, sys
variables = {
    "grpc": "GRPC_ENABLE_FORK_SUPPORT",
    "numpy": "OPENBLAS_NUM_THREADS",
    "onnxruntime": "ORT_DISABLE_TELEMETRY",
}
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name in variables:
            print(name, os.environ.get(variables.pop(name)))
sys.meta_path.insert(0, Watch())
for variable in variables.values():
    os.environ.pop(variable, None)
from emberpc.cli.main import main
sys.stdout.reconfigure(line_buffering=True)
sys.exit(main(["serve", "--data-dir", sys.argv[1], "--model", f"none={sys.argv[1]}"]))
"""
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, capture_output=True, text=True)
    assert run.returncode == 2, run.stderr
    assert sorted(run.stdout.splitlines()) == ["grpc 0", "numpy 1", "onnxruntime 1"]


def test_garbage_collection_is_enabled_when_a_server_serves(tmp_path: Path) -> None:
    """It is disabled before, since it would take an eighth of the time of the imports."""
    code = """
import gc, logging, os, signal, sys
from emberpc.cli.main import main
class Watch(logging.Handler):
    def emit(self, record):
        if record.getMessage().startswith("serving on"):
            print(gc.isenabled())
            os.kill(os.getpid(), signal.SIGTERM)
logging.getLogger("emberpc.server.app").addHandler(Watch())
sys.exit(main(["serve", "--listen", "127.0.0.1:0", "--data-dir", sys.argv[1]]))
"""
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "True\n"), run.stderr


#: The calls of pymilvus that a server makes at its start and to list its collections.
FAKE_PYMILVUS = """
from enum import Enum

class MilvusException(Exception):
    pass

class DataType(Enum):
    VARCHAR, FLOAT_VECTOR, JSON, INT64, FLOAT = range(5)

class MilvusClient:
    def __init__(self, **options):
        pass

    def list_collections(self, **options):
        return []

    def close(self):
        pass
"""
#: Runs `emberpc` where an import of hnswlib fails, and prints the modules of the embedded index at the end.
WITHOUT_HNSWLIB = """
import sys
sys.path.insert(0, {folder!r})
sys.modules["hnswlib"] = None
from emberpc.cli.main import main
code = main(sys.argv[1:])
print("loaded:", [name for name in sys.modules if name.startswith("emberpc.server.index")], file=sys.stderr)
sys.exit(code)
"""


def test_server_on_milvus_needs_neither_hnswlib_nor_the_embedded_index(tmp_path: Path) -> None:
    (tmp_path / "pymilvus.py").write_text(FAKE_PYMILVUS)
    program = ("-c", WITHOUT_HNSWLIB.format(folder=str(tmp_path)))
    flags = ("--index-backend", "milvus", "--milvus-uri", "http://127.0.0.1:1")
    process = ServerProcess({}, tmp_path / "data", *flags, program=program)
    with Client(process.address) as client:
        assert list(client.collections()) == []
        assert "index_backend:milvus" in client.server_info().features
    assert process.stop() == 0, process.output
    assert "loaded: []" in process.output
