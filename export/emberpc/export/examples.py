"""What a classifier learns from: texts, the labels of each, and what the labels mean."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from emberpc.export.datasets import LabelledTexts, read_labelled, report_alike
from emberpc.export.errors import ExportError

#: bool (texts, labels): which labels each text has.
Targets = npt.NDArray[np.bool_]
Rows = npt.NDArray[np.int64]

_LOGGER = logging.getLogger(__name__)


def evenly(count: int, most: int) -> Rows:
    """Return the indexes of so many of so many, evenly apart."""
    return np.linspace(0, count - 1, min(count, most)).astype(np.int64)


@dataclass(frozen=True)
class Examples:
    """Texts with their labels.

    `targets` is bool (texts, labels), one True in each row unless
    `multi_label`. `descriptions` holds a text for each label, in the labels'
    order, or nothing.
    """

    texts: tuple[str, ...]
    targets: Targets
    labels: tuple[str, ...]
    multi_label: bool = False
    descriptions: tuple[str, ...] = ()

    @property
    def classes(self) -> Rows:
        """The one label of each text, int (texts,); single-label only."""
        return np.asarray(self.targets.argmax(axis=1), dtype=np.int64)

    @property
    def per_label(self) -> float:
        """How many texts a label has: the mean over the labels."""
        return float(self.targets.sum() / len(self.labels))

    def take(self, rows: Rows | Sequence[int]) -> Examples:
        """Return some of the texts, by their indexes."""
        return replace(self, texts=tuple(self.texts[row] for row in rows), targets=self.targets[np.asarray(rows)])

    def described(self) -> Examples:
        """Return the examples with each label's description as one more example of the label, at the end."""
        if not self.descriptions:
            return self
        return replace(
            self,
            texts=self.texts + self.descriptions,
            targets=np.concatenate([self.targets, np.eye(len(self.labels), dtype=bool)]),
        )


def label_names(labels: Sequence[str]) -> tuple[str, ...]:
    """Return labels as words: `card_arrival` and `cardArrival` become `card arrival`."""
    return tuple(
        re.sub(r"[\s_\-./]+", " ", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", label)).strip().lower() or label
        for label in labels
    )


def read_descriptions(path: Path | str, labels: Sequence[str]) -> tuple[str, ...]:
    """Read what labels mean from a file with the columns `label` and `description`, one row a label.

    Raises:
        ExportError: it cannot be read, a label has no row, or a row's label is unknown or there twice.
    """
    data = read_labelled(path, text_column="description", label_column="label")
    found: dict[str, str] = {}
    for text, (label,), place in zip(data.texts, data.labels, data.places, strict=True):
        if label not in labels:
            raise ExportError(f"{path}, {place}: no training text has the label {label!r}; remove the row or mend it")
        if label in found:
            raise ExportError(f"{path}, {place}: the label {label!r} is described twice; keep one row")
        found[label] = text
    if missing := [label for label in labels if label not in found]:
        raise ExportError(f"{path} does not describe {len(missing)} labels, such as {missing[0]!r}; add a row for each")
    return tuple(found[label] for label in labels)


def training_examples(data: LabelledTexts, *, multi_label: bool = False, min_examples: int = 2) -> Examples:
    """Check what was read for training, and number its labels by their alphabetical order.

    Args:
        data: what was read.
        multi_label: whether a text may have any number of labels.
        min_examples: fewest texts that a label must have.

    Raises:
        ExportError: there are fewer than two labels, or a label has too few texts.
    """
    counts = Counter(label for given in data.labels for label in given)
    if len(counts) < 2:
        found = f"the label {next(iter(counts))!r} only" if counts else "no labels"
        raise ExportError(f"{data.path} has {found}; a classifier needs at least two")
    labels = tuple(sorted(counts))
    if few := [label for label in labels if counts[label] < min_examples]:
        places = [
            f"{label!r} ({', '.join(p for p, given in zip(data.places, data.labels, strict=True) if label in given)})"
            for label in few[:5]
        ]
        raise ExportError(
            f"{data.path}: {len(few)} labels have fewer than {min_examples} texts: {', '.join(places)}"
            f"{' …' if len(few) > len(places) else ''}; is one misspelt? add texts, remove the rows, "
            "or allow it with --min-examples 1"
        )
    report_alike(data.path, labels)
    report_conflicts(data, multi_label=multi_label)
    return Examples(tuple(data.texts), targets_of(data, labels), labels, multi_label)


def held_out_examples(data: LabelledTexts, like: Examples) -> Examples:
    """Give texts to measure on the labels of the training texts; warn of conflicts, and of texts that are in both.

    Raises:
        ExportError: a label is not among those; the row is named.
    """
    known = set(like.labels)
    for given, place in zip(data.labels, data.places, strict=True):
        if unknown := sorted(set(given) - known):
            raise ExportError(
                f"{data.path}, {place}: no training text has the label {unknown[0]!r}; "
                "correct it, remove the row, or add training texts with it"
            )
    report_conflicts(data, multi_label=like.multi_label)
    _report_shared(data, like)
    return replace(like, texts=tuple(data.texts), targets=targets_of(data, like.labels))


def _report_shared(data: LabelledTexts, training: Examples) -> None:
    """Warn of texts to measure on that are learnt from, too."""
    learnt_from = set(training.texts)
    shared = [(text, place) for text, place in zip(data.texts, data.places, strict=True) if text in learnt_from]
    if shared:
        text, place = shared[0]
        _LOGGER.warning(
            "%s: %d texts are training texts, too, such as %.60r (%s); what is measured on them flatters; remove them",
            data.path,
            len(shared),
            text,
            place,
        )


def targets_of(data: LabelledTexts, labels: Sequence[str]) -> Targets:
    """Return which of the labels each text has."""
    numbers = {label: i for i, label in enumerate(labels)}
    targets = np.zeros((len(data.texts), len(labels)), dtype=bool)
    for row, given in enumerate(data.labels):
        targets[row, [numbers[label] for label in given]] = True
    return targets


def report_conflicts(data: LabelledTexts, *, multi_label: bool = False) -> None:
    """Warn of texts that stand there with different labels: no classifier can get them all right."""
    conflicts = data.conflicts()
    if conflicts:
        text, places = next(iter(conflicts.items()))
        _LOGGER.warning(
            "%s: %d texts stand there with different labels, such as %.60r (%s)%s; correct them",
            data.path,
            len(conflicts),
            text,
            ", ".join(places),
            "" if multi_label else "; the classifier cannot get them all right",
        )
