"""The files with the texts of a classifier."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from emberpc.export.data.datasets import LabelledTexts, read_labelled, read_texts
from emberpc.export.data.examples import Examples, held_out_examples, read_descriptions, training_examples


@dataclass(frozen=True)
class ClassifierData:
    """Paths of the files with a classifier's texts (CSV, TSV, JSONL or Parquet), and their columns.

    `train` has the training texts. `validation` has labelled texts for early stopping and calibration; None: some or
    all training texts serve for this. `outside` has texts without any of the labels, in the column `text_column`; None:
    there are none. `descriptions` has the columns `label` and `description`, with one row for each label; None: no
    descriptions.

    Each file is read once, at its first use.
    """

    train: Path | str
    validation: Path | str | None = None
    outside: Path | str | None = None
    descriptions: Path | str | None = None
    text_column: str = "text"
    label_column: str = "label"
    #: Separator between the labels of a text, which may have any number of labels; None: every text has one label.
    separator: str | None = None
    #: Minimum number of training texts that each label must have.
    min_examples: int = 2

    @cached_property
    def texts(self) -> tuple[Examples, Examples | None, list[str]]:
        """The training texts, the validation texts, and the texts outside all labels; see `read_data`."""
        train = self._labelled(self.train)
        examples = training_examples(train, multi_label=self.separator is not None, min_examples=self.min_examples)
        validation = None if self.validation is None else held_out_examples(self._labelled(self.validation), examples)
        outside = read_texts(self.outside, text_column=self.text_column) if self.outside is not None else []
        return examples, validation, outside

    @cached_property
    def label_descriptions(self) -> tuple[str, ...]:
        """The descriptions of the labels, in their order; empty without a file of descriptions.

        Raises:
            ExportError: as for `read_data`, or the file of descriptions cannot be read, or does not describe exactly
                the labels of the training texts.
        """
        return () if self.descriptions is None else read_descriptions(self.descriptions, self.texts[0].labels)

    def test_texts(self, path: Path | str) -> Examples:
        """Return the texts of a file with the same columns, which no classifier learns from.

        Raises:
            ExportError: as for `read_data`.
        """
        if path not in self._test_texts:
            self._test_texts[path] = held_out_examples(self._labelled(path), self.texts[0])
        return self._test_texts[path]

    @cached_property
    def _test_texts(self) -> dict[Path | str, Examples]:
        """The files that `test_texts` has read, by path."""
        return {}

    def _labelled(self, path: Path | str) -> LabelledTexts:
        return read_labelled(
            path, text_column=self.text_column, label_column=self.label_column, separator=self.separator
        )

    def read(self, *, with_descriptions: bool) -> None:
        """Read the files, the descriptions only if `with_descriptions`. Raises the errors of `label_descriptions`."""
        _ = self.texts, self.label_descriptions if with_descriptions else ()


def read_data(data: ClassifierData) -> tuple[Examples, Examples | None, list[str]]:
    """Read the training texts, the validation texts, and the texts outside all labels, but not the descriptions.

    Warnings are logged for labels that hardly differ, and for conflicting labels of a text. A later call with the same
    object returns the same texts: it neither reads the files nor logs warnings.

    Returns:
        The training examples; the validation examples, or None without that file; the texts outside all labels, an
        empty list without that file.

    Raises:
        ExportError: a file cannot be read or its data cannot be used; the error names the file, and the row if one row
            is the cause. Or the separator is empty.
    """
    return data.texts
