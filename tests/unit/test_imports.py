"""What an import really loads, in a fresh process."""

from __future__ import annotations

import subprocess
import sys

import pytest

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
    ],
)
def test_a_room_loads_only_what_it_needs(statement: str, never: tuple[str, ...]) -> None:
    assert loaded_by(statement) & set(never) == set()
