"""What tells a comparison from another one whose outcomes must not be mixed with its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

from emberpc.export.comparing.bases import Base
from emberpc.export.examples import Examples

#: Of this room, what an outcome is made by; the rest plans, reports and exports.
_MAKES_OUTCOMES = (
    *("calibration.py", "describing.py", "evaluation.py", "examples.py", "linear.py", "workbench.py"),
    *("strategies", "tuning", "comparing/cells.py"),
)
_TOOLS = ("torch", "transformers", "sentence-transformers", "onnxruntime", "tokenizers")


def key_of(
    train: Examples,
    test: Examples,
    outside: Sequence[str],
    bases: Iterable[Base],
    *,
    label_texts: bool,
    balanced: bool,
    descriptions: Path | str | None,
) -> str:
    """Return a SHA-256 (hex) of all that outcomes depend on apart from the cell, the code that makes them included."""
    parts = {
        "train": [train.texts, train.targets.tolist(), train.labels],
        "test": [test.texts, test.targets.tolist()],
        "outside": list(outside),
        "bases": {base.encoder.name: [base.encoder.weights_sha256, base.encoder.max_tokens] for base in bases},
        "options": [label_texts, balanced],
        "descriptions": Path(descriptions).read_text(encoding="utf-8") if descriptions else "",
        "code": code_version(),
        "tools": {tool: version(tool) for tool in _TOOLS},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@cache
def code_version() -> str:
    """Return a SHA-256 (hex) of the code that outcomes are made by: a package's version may stay while it changes."""
    room = Path(str(files("emberpc.export")))
    paths = [path for name in _MAKES_OUTCOMES for path in (room / name, *sorted((room / name).glob("*.py")))]
    digest = hashlib.sha256()
    for path in paths:
        if path.is_file():
            digest.update(path.relative_to(room).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
