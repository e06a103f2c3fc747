"""Descriptions of labels: from a file, or what the labels are called if that tells texts apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from emberpc.export.examples import Examples, label_names, read_descriptions
from emberpc.export.strategies import STRATEGIES, Options
from emberpc.export.workbench import Workbench

#: Label names are learnt from only if going by them alone beats always giving the most frequent label by this much.
_TELLING = 0.1


def described_examples(examples: Examples, path: Path | str | None, workbench: Workbench) -> Examples:
    """Say what the labels mean: by the file, or by their names if those tell the texts apart.

    Raises:
        ExportError: the file cannot be read, or does not describe just the labels there are.
    """
    if path is not None:
        return replace(examples, descriptions=read_descriptions(path, examples.labels))
    named = replace(examples, descriptions=label_names(examples.labels))
    return named if telling(named, workbench) else examples


def telling(named: Examples, workbench: Workbench) -> bool:
    """Return whether the descriptions alone tell the texts apart far better than the most frequent label does."""
    best = STRATEGIES["zero-shot"].fit(named, workbench, Options()).classify(named.texts).argmax(axis=1)
    right = named.targets[np.arange(len(best)), best].mean()
    return bool(right > named.targets.mean(axis=0).max() + _TELLING)
