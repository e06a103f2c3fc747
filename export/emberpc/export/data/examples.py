"""Examples of a classifier: texts with their labels, to train or to measure on, and descriptions of the labels."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from emberpc.export.data.datasets import LabelledTexts, read_labelled, report_alike
from emberpc.export.errors import ExportError

#: bool (texts, labels): true where a text has a label.
Targets = npt.NDArray[np.bool_]
#: int64 (n,): indexes, mostly of texts; the user of this type states of what.
Rows = npt.NDArray[np.int64]

_LOGGER = logging.getLogger(__name__)


def evenly(count: int, maximum: int) -> Rows:
    """Return at most `maximum` indexes from 0 to `count` - 1, at nearly equal distances and ascending, int64.

    All indexes are returned if `count` is at most `maximum`. If only one is returned, it is 0; otherwise the first and
    the last index are among them.
    """
    return np.linspace(0, count - 1, min(count, maximum)).astype(np.int64)


@dataclass(frozen=True)
class Examples:
    """Texts with their labels, and descriptions of the labels.

    `targets` says which labels each text has, bool (texts, labels), with exactly one True in each row unless
    `multi_label`. `labels` has the labels' names. `descriptions` has a text for each label, in the order of `labels`,
    or is empty.
    """

    texts: tuple[str, ...]
    targets: Targets
    labels: tuple[str, ...]
    multi_label: bool = False
    descriptions: tuple[str, ...] = ()

    @property
    def classes(self) -> Rows:
        """Index of the label of each text, int (texts,); single-label only."""
        return np.asarray(self.targets.argmax(axis=1), dtype=np.int64)

    @property
    def per_label(self) -> float:
        """Mean number of texts of a label; a text counts for each of its labels."""
        return float(self.targets.sum() / len(self.labels))

    def take(self, rows: Rows | Sequence[int]) -> Examples:
        """Return examples with only the texts of the given indexes, in the order of `rows`, and with all labels.

        An empty list is not allowed, but an empty int array is.
        """
        return replace(self, texts=tuple(self.texts[row] for row in rows), targets=self.targets[np.asarray(rows)])

    def described(self) -> Examples:
        """Return examples with the label descriptions appended to the texts, each as a text of its label.

        Without descriptions, the object itself is returned.
        """
        if not self.descriptions:
            return self
        return replace(
            self,
            texts=self.texts + self.descriptions,
            targets=np.concatenate([self.targets, np.eye(len(self.labels), dtype=bool)]),
        )


def label_names(labels: Sequence[str]) -> tuple[str, ...]:
    """Return each label as lower-case words: `card_arrival` and `cardArrival` become `card arrival`.

    Words are separated by white space or any of `_-./`, or by a capital letter (A to Z) after a small one (a to z). A
    label of separators only, such as `_`, is returned unchanged.
    """
    return tuple(
        re.sub(r"[\s_\-./]+", " ", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", label)).strip().lower() or label
        for label in labels
    )


def read_descriptions(path: Path | str, labels: Sequence[str]) -> tuple[str, ...]:
    """Read label descriptions from a file with the columns `label` and `description`, one row for each label.

    Args:
        path: the file, of a kind that `read_labelled` reads.
        labels: the labels to describe.

    Returns:
        The descriptions, in the order of `labels`.

    Raises:
        ExportError: `read_labelled` cannot read the file, a label has no row, or a row's label is not in `labels` or
            occurs in an earlier row.
    """
    data = read_labelled(path, text_column="description", label_column="label")
    found: dict[str, str] = {}
    for text, (label,), place in zip(data.texts, data.labels, data.places, strict=True):
        if label not in labels:
            raise ExportError(
                f"{path}, {place}: no training text has the label {label!r}; remove the row or correct it"
            )
        if label in found:
            raise ExportError(f"{path}, {place}: the label {label!r} is described twice; keep one row")
        found[label] = text
    if missing := [label for label in labels if label not in found]:
        count = "1 label" if len(missing) == 1 else f"{len(missing)} labels"
        raise ExportError(f"{path} does not describe {count}, such as {missing[0]!r}; add a row for each")
    return tuple(found[label] for label in labels)


def training_examples(data: LabelledTexts, *, multi_label: bool = False, min_examples: int = 2) -> Examples:
    """Return training examples made from the texts of a file; labels are sorted by their code points.

    Logs a warning for labels that hardly differ (see `report_alike`), and for texts with conflicting labels.

    Args:
        data: the texts of the file.
        multi_label: whether a text may have any number of labels; otherwise each must have one.
        min_examples: minimum number of texts that each label must have.

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
            f"{data.path}: {'1 label has' if len(few) == 1 else f'{len(few)} labels have'} fewer than {min_examples} "
            f"texts: {', '.join(places)}"
            f"{' …' if len(few) > len(places) else ''}; check their spelling, add texts, remove the rows, "
            "or allow it with --min-examples 1"
        )
    report_alike(data.path, labels)
    report_conflicts(data, multi_label=multi_label)
    return Examples(tuple(data.texts), targets_of(data, labels), labels, multi_label)


def held_out_examples(data: LabelledTexts, like: Examples) -> Examples:
    """Return examples to measure on, made from the texts of a file.

    `labels`, `multi_label` and `descriptions` are those of the training examples. Logs a warning for texts with
    conflicting labels, and for texts that are training texts, too.

    Args:
        data: the texts of the file.
        like: the training examples.

    Raises:
        ExportError: a label is not among the training labels; the error names the row.
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
    """Log a warning if texts of `data`, which are to be measured on, are training texts, too."""
    training_texts = set(training.texts)
    shared = [(text, place) for text, place in zip(data.texts, data.places, strict=True) if text in training_texts]
    if shared:
        text, place = shared[0]
        _LOGGER.warning(
            "%s: %s, too, such as %.60r (%s), so the figures are too good; remove such texts",
            data.path,
            "1 text is a training text" if len(shared) == 1 else f"{len(shared)} texts are training texts",
            text,
            place,
        )


def targets_of(data: LabelledTexts, labels: Sequence[str]) -> Targets:
    """Return the labels of each text, bool (texts, labels); every label of the data must be in `labels`."""
    numbers = {label: i for i, label in enumerate(labels)}
    targets = np.zeros((len(data.texts), len(labels)), dtype=bool)
    for row, given in enumerate(data.labels):
        targets[row, [numbers[label] for label in given]] = True
    return targets


def report_conflicts(data: LabelledTexts, *, multi_label: bool = False) -> None:
    """Log a warning if texts occur with different sets of labels.

    Unless `multi_label`, the warning adds that the classifier cannot get all of their places right.
    """
    conflicts = data.conflicts()
    if conflicts:
        text, places = next(iter(conflicts.items()))
        _LOGGER.warning(
            "%s: %s with different labels, such as %.60r (%s)%s; correct them",
            data.path,
            "1 text occurs" if len(conflicts) == 1 else f"{len(conflicts)} texts occur",
            text,
            ", ".join(places),
            "" if multi_label else "; the classifier cannot get them all right",
        )


def conflicting_texts(examples: Examples) -> int:
    """Return the number of distinct texts that occur with two or more different sets of labels."""
    given: dict[str, set[bytes]] = {}
    for text, targets in zip(examples.texts, examples.targets, strict=True):
        given.setdefault(text, set()).add(targets.tobytes())
    return sum(len(different) > 1 for different in given.values())
