"""Generate the asynchronous client (client/emberpc/client/_aio) from the sync client (_sync).

This script adds `async` and `await` where AWAITED and ITERATED require it, adds asynchronous iterables to the types of
the parameters in ITERABLES, and replaces `yield from` by a loop. It replaces the names of NAMES and the texts of
SENTENCES: sentences of docstrings, and some code such as imports and types. If a coroutine is missing in AWAITED, mypy
reports most of its calls, since they lack the `await`.

The modules in HANDWRITTEN are not generated, since they differ in more than these changes. They are written by hand in
both folders. Any other module of _aio without a counterpart in _sync is deleted. With --check, the script changes
nothing, and exits with 1 if it would write or delete a module of _aio. In both cases it fails if a text of SENTENCES
does not occur in _sync.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CLIENT = ROOT / "client" / "emberpc" / "client"
RUFF = Path(sys.executable).parent / "ruff"
HANDWRITTEN = {"__init__.py", "transport.py"}

#: Names of methods and functions that are coroutines in the asynchronous client. A call of any class's method with such
#: a name gets an `await`.
AWAITED = {
    "close",
    "run", "run_one", "run_steps", "upload", "all_items",
    "response", "next_response", "next_event", "sleep", "read_items", "run_blocking",
    "_response", "_take_oldest", "_await_end",
}  # fmt: skip
#: Names of methods that return asynchronous iterators in the asynchronous client.
ITERATED = {"pages", "responses"}
#: For the name of a function, the name of its parameter that also accepts an asynchronous iterable in the asynchronous
#: client.
ITERABLES = {"embed_stream": "items", "upsert_stream": "records", "stream": "items"}
#: Names in the sync client, and the names that replace them in the asynchronous one. In strings and comments, only a
#: name directly after a backtick is replaced.
NAMES = {
    "_sync": "_aio",
    "__enter__": "__aenter__",
    "__exit__": "__aexit__",
    "closing": "aclosing",
    "Generator": "AsyncGenerator",
    "Iterator": "AsyncIterator",
    **{
        name: f"Async{name}"
        for name in (
            "Client", "Runner", "Transport", "StreamConnection",
            "TextMethods", "CollectionMethods", "RecordMethods", "SearchMethods", "BackupMethods", "ModelMethods",
        )
    },
}  # fmt: skip
#: Texts of the sync client, and the texts that replace them in the asynchronous client. Each must occur in at least one
#: module, or else the script fails, so that none is out of date.
SENTENCES = {
    "import grpc\n": "import grpc.aio\n",
    "grpc.Channel": "grpc.aio.Channel",
    "Generator[Item, None, None]": "Generator[Item, None]",
    '"""The client."""': '"""The client for asyncio."""',
    "    Any number of threads may use it.\n": (
        "    The first call opens the connection, in the event loop that makes this call. If that loop is closed, the\n"
        "    first call in another loop opens a new connection. While it is open, a call in another loop raises\n"
        "    FailedPrecondition.\n"
    ),
    "The iterable is read as needed, in the thread that takes the results.": (
        "The iterable is read as needed, in the task that takes the results. It may be asynchronous."
    ),
    "The iterable is read as needed, in the thread that takes the checkpoints.": (
        "The iterable is read as needed, in the task that takes the checkpoints. It may be asynchronous."
    ),
    "To stop early, call `close()` of the iterator or drop it.": "To stop early, await `aclose()` of the iterator.",
    "It is called in another thread.": "It is called in the thread of the event loop.",
}


class _Edits(ast.NodeVisitor):
    """Collects the edits that add `async`, `await` and asynchronous types to a module of the sync client.

    `visit`, called with the parsed module, collects the edits; `result` applies them. An edit has the start and the end
    of the replaced text, as byte offsets in the module in UTF-8, and the new text. Equal offsets insert text.

    Args:
        source: the module, as text.

    Raises:
        SystemExit: `visit` found that the module takes an attribute or item of the result of an awaited call directly.
    """

    def __init__(self, source: str) -> None:
        self.edits: list[tuple[int, int, str]] = []
        self._source = source.encode()
        self._lines = [0]
        for line in self._source.splitlines(keepends=True):
            self._lines.append(self._lines[-1] + len(line))

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if node.name in ITERABLES:
            for parameter in (*node.args.args, *node.args.kwonlyargs):
                if parameter.arg == ITERABLES[node.name] and parameter.annotation:
                    end = self._end(parameter.annotation)
                    self._insert(end, f" | Async{ast.unparse(parameter.annotation)}")
        if node.name in ("__enter__", "__exit__") or any(_suspends(child) for child in _own_nodes(node)):
            self._insert(self._start(node), "async ")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if _name(node) in AWAITED:
            self._insert(self._start(node), "await ")
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self._refuse_awaited(node.value)
        self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        self._refuse_awaited(node.value)
        self.generic_visit(node)

    def visit_For(self, node: ast.For) -> None:
        if _suspends(node):
            self._insert(self._start(node), "async ")
        self.generic_visit(node)

    def visit_With(self, node: ast.With) -> None:
        if _suspends(node):
            self._insert(self._start(node), "async ")
        self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> None:
        # An asynchronous generator cannot use `yield from`, so a loop replaces the statement.
        if isinstance(node.value, ast.YieldFrom):
            indent = " " * (node.col_offset + 4)
            loop = f"for each in {ast.unparse(node.value.value)}:\n{indent}yield each"
            self.edits.append((self._start(node), self._end(node), loop))
        self.generic_visit(node)

    def result(self) -> str:
        """Return the source of the module with all edits applied."""
        text = self._source
        for start, end, replacement in sorted(self.edits, reverse=True):
            text = text[:start] + replacement.encode() + text[end:]
        return text.decode()

    def _refuse_awaited(self, node: ast.expr) -> None:
        if isinstance(node, ast.Call) and _name(node) in AWAITED:
            raise SystemExit(f"line {node.lineno}: give the result of {_name(node)} a name before you use a part of it")

    def _insert(self, offset: int, text: str) -> None:
        self.edits.append((offset, offset, text))

    def _start(self, node: ast.stmt | ast.expr) -> int:
        return self._lines[node.lineno - 1] + node.col_offset

    def _end(self, node: ast.stmt | ast.expr) -> int:
        # `or 0` is for mypy: the end is never None here, since the parser made the node.
        return self._lines[(node.end_lineno or 0) - 1] + (node.end_col_offset or 0)


def _name(call: ast.expr) -> str:
    """Return the name of the function or method that an expression calls, without what is before the last dot.

    Empty if the expression is not a call, or the called function has no name, as in `functions[0]()`.
    """
    function = call.func if isinstance(call, ast.Call) else None
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def _suspends(node: ast.AST) -> bool:
    """Return whether this node itself, a call, `for` or `with`, gets an `await` or `async`; inner nodes do not count.

    A function with such a node becomes asynchronous.
    """
    if isinstance(node, ast.Call):
        return _name(node) in AWAITED
    if isinstance(node, ast.For):
        # The loop may be over a variable with the name of the method: the client writes
        # `with closing(self._runner.responses(…)) as responses`, and then loops over `responses`.
        return _name(node.iter) in ITERATED or (isinstance(node.iter, ast.Name) and node.iter.id in ITERATED)
    if isinstance(node, ast.With):
        return any(_name(item.context_expr) == "closing" for item in node.items)
    return False


def _own_nodes(function: ast.FunctionDef) -> list[ast.AST]:
    """Return all nodes of a function's body, at any depth, in no fixed order.

    Nested functions and lambdas are included, but not the nodes inside them: those do not make this function
    asynchronous.
    """
    found: list[ast.AST] = []
    waiting: list[ast.AST] = list(function.body)
    while waiting:
        node = waiting.pop()
        found.append(node)
        if not isinstance(node, (ast.FunctionDef, ast.Lambda)):
            waiting.extend(ast.iter_child_nodes(node))
    return found


def _renamed(source: str) -> str:
    """Return the source of a module with the names of NAMES replaced.

    In strings and comments, only a name directly after a backtick is replaced.
    """
    pieces, end = list[str](), (1, 0)
    lines = source.splitlines(keepends=True)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        for number in range(end[0], token.start[0] + 1):
            begin = end[1] if number == end[0] else 0
            stop = token.start[1] if number == token.start[0] else None
            pieces.append(lines[number - 1][begin:stop] if number <= len(lines) else "")
        text = token.string
        if token.type == tokenize.NAME:
            text = NAMES.get(text, text)
        elif token.type in (tokenize.STRING, tokenize.COMMENT):
            text = re.sub(r"(?<=`)\w+", lambda found: NAMES.get(found[0], found[0]), text)
        pieces.append(text)
        end = token.end
    return "".join(pieces)


def generate(name: str, used: set[str]) -> str:
    """Return the source of the asynchronous module for a module of the sync client.

    Args:
        name: file name of the module in `_sync`.
        used: set to which the keys of `SENTENCES` that the module contains are added.

    Raises:
        SystemExit: the module takes an attribute or item of the result of an awaited call directly, without first
            giving the result a name. The message has the line.
        CalledProcessError: `ruff` failed.
    """
    source = (CLIENT / "_sync" / name).read_text()
    for sentence, other in SENTENCES.items():
        if sentence in source:
            used.add(sentence)
            source = source.replace(sentence, other)
    edits = _Edits(source)
    edits.visit(ast.parse(source))
    text = _renamed(edits.result())
    if "AsyncIterable" in text:
        future = "from __future__ import annotations\n"
        text = text.replace(future, f"{future}from collections.abc import AsyncIterable\n")
    header = f"# Generated from ../_sync/{name} by tools/generate_async_client.py. Edit that file and run the script.\n"
    return _formatted(header + text, CLIENT / "_aio" / name)


def _formatted(text: str, path: Path) -> str:
    """Return the source of a module after `ruff` has sorted its imports and formatted it.

    Args:
        text: the source.
        path: path of the module, which decides the settings of `ruff`; the file is neither read nor written.

    Raises:
        CalledProcessError: `ruff` failed, for example because of a syntax error.
    """
    for command in (("check", "--fix-only", "--quiet", "--select=I"), ("format",)):
        run = subprocess.run(
            [RUFF, *command, f"--stdin-filename={path}", "-"],
            input=text, capture_output=True, text=True, check=True, cwd=ROOT,
        )  # fmt: skip
        text = run.stdout
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a file is not current")
    check = parser.parse_args().check
    used: set[str] = set()
    names = {path.name for path in (CLIENT / "_sync").glob("*.py")} - HANDWRITTEN
    made = {name: generate(name, used) for name in sorted(names)}
    if unused := SENTENCES.keys() - used:
        raise SystemExit(f"_sync does not contain {sorted(unused)}; correct SENTENCES of {Path(__file__).name}")
    stale = {path.name for path in (CLIENT / "_aio").glob("*.py")} - HANDWRITTEN - names
    for name, text in made.items():
        path = CLIENT / "_aio" / name
        if not path.exists() or path.read_text() != text:
            stale.add(name)
            if not check:
                path.write_text(text)
    if not check:
        for name in stale - names:
            (CLIENT / "_aio" / name).unlink()
        return 0
    for name in sorted(stale):
        print(f"_aio/{name} is not current; run python tools/generate_async_client.py", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
