"""Draw texts at random for a reading test: docstrings with signatures, comment blocks and paragraphs of documents.

A test function without a docstring gives a text as well: its signature, since its name says what it asserts.

A reader who sees only a drawn text says what goes in, what comes out and what can fail. Half of the draw is divided
equally among the rooms (parts of the repository, see `ROOMS`), the other half in proportion to their numbers of texts.

    python tools/draw_texts.py --seed 1 --count 60
"""

from __future__ import annotations

import argparse
import ast
import io
import random
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
#: Folders and files of each room, by the room's name. A file that is in several rooms counts for the first of them.
ROOMS = {
    "protos": ("protos",),
    "engine": ("server/emberpc/server/engine",),
    "index": ("server/emberpc/server/index",),
    "milvus": ("server/emberpc/server/milvus",),
    "pipelines": ("server/emberpc/server/pipelines", "server/emberpc/server/collections"),
    "services": ("server/emberpc/server/services",),
    "server": ("server",),
    "client": ("client/emberpc/client",),
    "cli": ("client",),
    "bundle": ("export/emberpc/bundle",),
    "export": ("export",),
    "benchmarks": ("benchmarks",),
    "tools": ("tools", "examples"),
    "tests": ("tests",),
    "docs": ("docs", "README.md", "CONTRIBUTING.md"),
}
#: Paths that are left out, since their texts are copies, or nearly copies, of texts in other files: generated files,
#: and the folder `_aio`. Most files of `_aio` are generated from `_sync`; the texts of the others are nearly those of
#: `_sync`.
_GENERATED = re.compile(r"_pb2(_grpc)?\.py|/_aio/|^docs/reports/|\.pyi$")
#: Minimum number of words of a text that can be drawn, with its signature or line of code. Shorter texts are mostly
#: titles. For a test function without a docstring, only the words of its name count, without `test`.
_MIN_WORDS = 4
_Function = ast.FunctionDef | ast.AsyncFunctionDef


class Text(NamedTuple):
    """A text to read, with its place.

    `path` is relative to the root of the repository. `line` is the line, from 1, where the text starts; for a
    docstring, the line of its `class` or `def`, or 1 for a module. `text` is a docstring after the signature, the
    signature of a test function without a docstring, a comment block before the next line, or a paragraph.
    """

    path: str
    line: int
    text: str


def main() -> None:
    """Draw texts as the arguments of the command line say, and print them, numbered and with their places."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, required=True, help="number that decides the draw")
    parser.add_argument("--count", type=int, default=60, help="number of texts to draw (default: 60)")
    arguments = parser.parse_args()
    for i, text in enumerate(draw(collect(), arguments.seed, arguments.count), start=1):
        print(f"--- {i}. {text.path}:{text.line}\n{text.text}\n")


def collect() -> dict[str, list[Text]]:
    """Return the texts of at least `_MIN_WORDS` words of each room, by the room's name.

    The files of a room are sorted by path. In a Python file, the docstrings come before the comments.
    """
    rooms: dict[str, list[Text]] = {}
    seen: set[Path] = set()
    for room, places in ROOMS.items():
        files = sorted(file for place in places for file in _files(ROOT / place) if file not in seen)
        seen.update(files)
        rooms[room] = [text for file in files for text in _texts(file) if len(text.text.split()) >= _MIN_WORDS]
    return rooms


def draw(rooms: dict[str, list[Text]], seed: int, count: int) -> list[Text]:
    """Draw texts at random without repetition.

    First each room gives its share of `count` (see the docstring of this module), rounded down, or all its texts if it
    has fewer. The missing texts are then drawn from the remaining texts of all rooms.

    Args:
        rooms: the texts of each room; a room may be empty, but not all of them.
        seed: decides the draw: the same arguments give the same result.
        count: number of texts to draw.

    Returns:
        The drawn texts, in the order of `rooms`; all texts if there are at most `count`.
    """
    chance = random.Random(seed)  # noqa: S311 - no secret
    total = sum(len(texts) for texts in rooms.values())
    shares = {room: count / 2 / len(rooms) + count / 2 * len(texts) / total for room, texts in rooms.items()}
    drawn = {room: chance.sample(texts, min(len(texts), int(shares[room]))) for room, texts in rooms.items()}
    left = [text for room, texts in rooms.items() for text in texts if text not in drawn[room]]
    missing = min(count - sum(len(texts) for texts in drawn.values()), len(left))
    chosen = {*(text for texts in drawn.values() for text in texts), *chance.sample(left, missing)}
    return [text for texts in rooms.values() for text in texts if text in chosen]


def _files(place: Path) -> Iterator[Path]:
    """Yield the .py, .proto and .md files in a folder, at any depth and in any order, except those of `_GENERATED`.

    `place` may also be a single file. For a place that does not exist, nothing is yielded.
    """
    for file in [place] if place.is_file() else place.rglob("*"):
        if file.suffix in (".py", ".proto", ".md") and not _GENERATED.search(file.relative_to(ROOT).as_posix()):
            yield file


def _texts(file: Path) -> Iterator[Text]:
    """Yield the texts of a file: docstrings and comments of Python, comments of .proto, paragraphs of Markdown."""
    source, path = file.read_text(encoding="utf-8"), file.relative_to(ROOT).as_posix()
    if file.suffix == ".md":
        yield from _paragraphs(source, path)
    elif file.suffix == ".proto":
        yield from _blocks(_proto_comments(source), source.splitlines(), path)
    else:
        yield from _docstrings(source, path)
        yield from _blocks(_python_comments(source), source.splitlines(), path)


def _docstrings(source: str, path: str) -> Iterator[Text]:
    """Yield the docstrings of a module, and of all classes and functions in it, each after its signature.

    A test function without a docstring gives its signature if its name has at least `_MIN_WORDS` words after `test`.
    Nested classes and functions, such as methods, count too. Outer docstrings come before inner ones.

    Args:
        source: the module, as text.
        path: path of the module, for the results.
    """
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Module | ast.ClassDef | _Function):
            continue
        text = ast.get_docstring(node)
        line = 1 if isinstance(node, ast.Module) else node.lineno
        if text is not None:
            yield Text(path, line, f'{_signature(node)}\n    """{text}"""'.strip())
        elif isinstance(node, _Function) and node.name.startswith("test_") and node.name.count("_") >= _MIN_WORDS:
            yield Text(path, line, _signature(node))


def _signature(node: ast.Module | ast.ClassDef | _Function) -> str:
    """Return the declaration of a class or function as one line; empty for a module.

    Decorators, `async` and keywords of a class, such as `metaclass`, are left out.
    """
    if isinstance(node, ast.Module):
        return ""
    if isinstance(node, ast.ClassDef):
        bases = f"({', '.join(map(ast.unparse, node.bases))})" if node.bases else ""
        return f"class {node.name}{bases}:"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"def {node.name}({ast.unparse(node.args)}){returns}:"


def _python_comments(source: str) -> dict[int, str]:
    """Return the comments of a Python file that have a line of their own, by line number from 1.

    The indentation before a comment is removed.
    """
    comments = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not token.line[: token.start[1]].strip():
            comments[token.start[0]] = token.string
    return comments


def _proto_comments(source: str) -> dict[int, str]:
    """Return the comments of a .proto file that have a line of their own and begin with `//`, by line number from 1.

    The indentation before a comment is removed.
    """
    lines = enumerate(source.splitlines(), start=1)
    return {number: line.strip() for number, line in lines if line.strip().startswith("//")}


def _blocks(comments: dict[int, str], lines: list[str], path: str) -> Iterator[Text]:
    """Yield blocks of comments on consecutive lines, each block with the next line of the file.

    Args:
        comments: the comments that have a line of their own, by line number from 1, ascending.
        lines: all lines of the file. The line after a block may be blank, or missing at the end of the file.
        path: path of the file, for the results.
    """
    for start in comments:
        if start - 1 in comments:
            continue
        end = start
        while end in comments:
            end += 1
        code = lines[end - 1] if end <= len(lines) else ""
        yield Text(path, start, "\n".join([*(comments[number] for number in range(start, end)), code.strip()]))


def _paragraphs(source: str, path: str) -> Iterator[Text]:
    """Yield the paragraphs of a Markdown document: the parts between blank lines, such as a whole list.

    A part that begins as a heading, table, picture, HTML or code block is left out, and so are all parts inside a code
    block.
    """
    line, fenced = 1, False
    for part in re.split(r"(\n\s*\n)", source):
        inside, fenced = fenced, fenced ^ bool(part.count("```") % 2)
        if part.strip() and not inside and not part.lstrip().startswith(("```", "#", "|", "!", "<")):
            yield Text(path, line, part.strip())
        line += part.count("\n")


if __name__ == "__main__":
    main()
