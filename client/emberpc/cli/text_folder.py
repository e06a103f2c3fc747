"""Read records from a folder of text files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypeAlias

from emberpc.cli.errors import CliError
from emberpc.cli.record_sources import OnRejected, RecordError, raise_error

#: What becomes a record: each file, or each paragraph of each file.
Split: TypeAlias = Literal["files", "paragraphs"]

_SUFFIXES = (".txt", ".md")
#: Maximum number of bytes of a file. Files are read into memory as a whole, so this limits the memory. With `files`, by
#: default a server refuses far shorter texts anyway. With `paragraphs`, the user must divide a larger file.
_MAX_BYTES = 64 * 2**20
#: Matches what separates two paragraphs: the line end of the first, and empty lines. A line of only spaces and tabs is
#: empty.
_EMPTY_LINES = re.compile(r"\r?\n(?:[ \t]*\r?\n)+")


class TextFolder:
    """The *.txt and *.md files of a folder and its subfolders, as a source of records.

    Names with a dot at the start, and links to folders, are skipped. Links to files are read.

    Args:
        path: the folder.
        split: `files`: each file is a record; the id is its path in the folder, such as `notes/today.md`.
            `paragraphs`: each paragraph is a record, and empty lines separate paragraphs; the id is the path and the
            number of the paragraph in the file, from 1, such as `notes/today.md#1`.
    """

    def __init__(self, path: str, split: Split) -> None:
        self.name = path
        self._folder = Path(path)
        self._split = split
        self._places: list[str] = []

    def records(self, refused: OnRejected = raise_error) -> Iterator[dict[str, Any]]:
        """Yield the records, reading the files lazily: the files of a folder by name, then its subfolders by name.

        Each record has `id`, `text` and the metadata field `path`, the path of the file in the folder.

        Args:
            refused: called with the error of each file that cannot be read, is no regular file, has more than 64 MiB or
                is not UTF-8; if it returns, reading continues. By default the first error is raised.

        Raises:
            CliError: a folder cannot be read; the reading ends.
        """
        for path in self._files():
            try:
                text = self._text(path)
            except RecordError as error:
                refused(error)
                continue
            name = path.relative_to(self._folder).as_posix()
            for record_id, part in self._parts(name, text):
                self._places.append(str(path))
                yield {"id": record_id, "text": part, "metadata": {"path": name}}

    def count(self) -> int | None:
        """Return the number of files to read; None for `paragraphs`, since a file may then have several records.

        Raises:
            CliError: a folder cannot be read.
        """
        return sum(1 for _ in self._files()) if self._split == "files" else None

    def place(self, item: int) -> str:
        """Return the path of the file of a record, such as `folder/notes/today.md`.

        `item`: number of the record among those that `records` has yielded, from 0.
        """
        return self._places[item]

    def _files(self) -> Iterator[Path]:
        for folder, folders, files in os.walk(self._folder, onerror=_refuse_folder):
            # `os.walk` then visits only the folders that this list has after the assignment, in the order of the list.
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(files):
                if not name.startswith(".") and name.lower().endswith(_SUFFIXES):
                    yield Path(folder, name)

    def _text(self, path: Path) -> str:
        try:
            if not path.is_file():
                raise RecordError(f"{path} is no file; remove it")
            if (size := path.stat().st_size) > _MAX_BYTES:
                raise RecordError(f"{path} has {size} bytes, and a file may have at most {_MAX_BYTES}; split it")
            return path.read_bytes().decode("utf-8-sig")
        except OSError as error:
            raise RecordError(f"{path} cannot be read: {error.strerror}; check path and permissions") from error
        except UnicodeDecodeError as error:
            raise RecordError(f"{path}: byte {error.start + 1} is not UTF-8; convert the file to it") from error

    def _parts(self, name: str, text: str) -> Iterator[tuple[str, str]]:
        """Yield (id, text) of each record in the file `name` with the content `text`.

        A file that is a record keeps its white space. Paragraphs are stripped, and empty ones are skipped.
        """
        if self._split == "files":
            yield name, text
            return
        paragraphs = filter(None, (part.strip() for part in _EMPTY_LINES.split(text)))
        for number, paragraph in enumerate(paragraphs, 1):
            yield f"{name}#{number}", paragraph


def _refuse_folder(error: OSError) -> None:
    raise CliError(f"{error.filename} cannot be read: {error.strerror}; check path and permissions") from error
