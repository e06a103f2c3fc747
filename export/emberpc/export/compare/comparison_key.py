"""Key that identifies a comparison, so that a folder never mixes outcomes of different comparisons."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

from emberpc.export.compare.base_encoders import Base
from emberpc.export.data.examples import Examples

#: Files and folders of the package `emberpc` whose code determines an outcome. Other modules plan, report and export.
_MAKES_OUTCOMES = (
    "bundle/calibration.py",
    "bundle/decision.py",
    "bundle/evaluation.py",
    "bundle/head.py",
    "bundle/prototypes.py",
    "bundle/rejection.py",
    "bundle/scope.py",
    "export/classify",
    "export/compare/comparison_run.py",
    "export/compare/measured_outcome.py",
    "export/compare/outcomes.py",
    "export/data/examples.py",
    "export/threads.py",
    "export/timing.py",
    "export/tuning",
)
_TOOLS = ("torch", "transformers", "sentence-transformers", "onnxruntime", "tokenizers", "scikit-learn", "numpy")


def key_of(
    train: Examples,
    test: Examples,
    outside: Sequence[str],
    bases: Iterable[Base],
    *,
    label_texts: bool,
    balanced: bool,
    descriptions: Sequence[str],
) -> str:
    """Return the key of a comparison. A folder's stored outcomes may be used only if they have the same key.

    Args:
        train: training texts with their targets.
        test: test texts with their targets.
        outside: texts outside all labels.
        bases: opened encoders.
        label_texts: whether label descriptions are training texts, too.
        balanced: whether every label has the same weight.
        descriptions: the description of each label; empty without a file of descriptions.

    Returns:
        A SHA-256 (hex) of everything that an outcome depends on, apart from strategy, budget and seed: data, encoders,
        options, the code that makes outcomes, and the versions of the libraries.
    """
    parts = {
        "train": [train.texts, train.targets.tolist(), train.labels],
        "test": [test.texts, test.targets.tolist()],
        "outside": list(outside),
        "bases": {base.encoder.name: _identity(base) for base in bases},
        "options": [label_texts, balanced],
        "descriptions": list(descriptions),
        "code": code_version(),
        "tools": {tool: version(tool) for tool in _TOOLS},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _identity(base: Base) -> list[object]:
    """Return what decides the vectors of an encoder, as plain data."""
    encoder = base.encoder
    tokenizer = hashlib.sha256((base.folder / "tokenizer.json").read_bytes()).hexdigest()
    settings = [encoder.max_tokens, encoder.pooling, encoder.normalize, encoder.lower_case, encoder.prompts.passage]
    return [encoder.weights_sha256, tokenizer, *settings]


@cache
def code_version() -> str:
    """Return a SHA-256 (hex) of the source files that determine outcomes; they are read once in a process.

    The package's version would not suffice: it may stay the same while the code changes.
    """
    room = Path(str(files("emberpc.export"))).parent
    digest = hashlib.sha256()
    for name in _MAKES_OUTCOMES:
        path = room / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.relative_to(room).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
