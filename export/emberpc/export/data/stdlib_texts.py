"""Read real texts that every host has: the docstrings of the standard library of its Python.

Modules written in Python are parsed and never imported, so none of their code runs. A few modules are written in C
and have no source to parse. These are imported, which has no side effects.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

#: Modules and folders that are not read, since their docstrings do not describe a public API. Functions and classes
#: with one of these names are left out, too.
_SKIPPED = frozenset(
    {
        "test",
        "tests",
        "idlelib",
        "lib2to3",
        "turtledemo",
        "ensurepip",
        "encodings",
        "site-packages",
        "antigravity",
        "this",
        "pydoc_data",
    }
)
_IN_C = (
    "builtins",
    "itertools",
    "math",
    "functools",
    "collections",
    "time",
    "datetime",
    "zlib",
    "operator",
    "array",
    "cmath",
    "binascii",
    "select",
)


@dataclass(frozen=True)
class StdlibDoc:
    """A docstring of the standard library.

    `name` is qualified (`itertools.chain.from_iterable`), `module` is the top-level module, `kind` is `function`,
    `method` or `class`, and `text` is the docstring without its indentation.
    """

    name: str
    module: str
    kind: str
    text: str


def read_stdlib() -> list[StdlibDoc]:
    """Return the docstrings of public functions, methods and classes of the standard library, sorted by name.

    They come from all public modules written in Python and from some written in C. Each name occurs once. The
    docstrings are read once in each process, which takes seconds.
    """
    return list(_read_once())


@cache
def _read_once() -> tuple[StdlibDoc, ...]:
    """Return the docstrings of the standard library, sorted by name; cached, since reading them takes seconds."""
    found: dict[str, StdlibDoc] = {}
    for doc in (*_from_source(), *_from_c()):
        found.setdefault(doc.name, doc)
    return tuple(found[name] for name in sorted(found))


def sample_texts(count: int) -> list[str]:
    """Return texts of mixed length: edge cases, two long concatenations of docstrings, and single docstrings.

    The edge cases are a single letter, a word, other scripts, whitespace and code. The texts are the same at each call
    with the same version of Python.

    Args:
        count: number of texts, at least 8.
    """
    docs = [doc.text for doc in read_stdlib()]
    edges = [
        "a",
        "Hello!",
        "naïve café – 東京, Москва 🙂",
        "  spaces   and\ttabs\n\nand lines  ",
        "x = {'k': [1, 2.5e-3]}",
    ]
    long = [" ".join(docs[start : start + 25]) for start in (100, 1000)]
    step = max(1, len(docs) // (count - len(edges) - len(long)))
    return [*edges, *long, *docs[::step]][:count]


def _from_source() -> Iterator[StdlibDoc]:
    """Yield the docstrings of functions, methods and classes of modules written in Python, which are only parsed."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in _sources(root):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # an invalid escape in a regular expression
            tree = ast.parse(path.read_bytes())
        yield from _walk(tree, ".".join(parts), parts[0], inside_class=False)


def _sources(root: Path) -> Iterator[Path]:
    """Yield the source files of public modules below `root`, the folder of the standard library.

    Folders of other modules, such as site-packages, are not entered.
    """
    for folder, folders, files in os.walk(root):
        if folder == str(root):
            folders[:] = [name for name in folders if name in sys.stdlib_module_names]
            files = [name for name in files if name.removesuffix(".py") in sys.stdlib_module_names]  # noqa: PLW2901
        folders[:] = sorted(name for name in folders if not _hidden(name))
        for name in sorted(files):
            if name.endswith(".py") and (name == "__init__.py" or not _hidden(name.removesuffix(".py"))):
                yield Path(folder, name)


def _walk(node: ast.Module | ast.ClassDef, prefix: str, module: str, *, inside_class: bool) -> Iterator[StdlibDoc]:
    for child in node.body:
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or _hidden(child.name):
            continue
        name = f"{prefix}.{child.name}"
        docstring = ast.get_docstring(child)
        if docstring:
            is_class = isinstance(child, ast.ClassDef)
            yield _doc(name, module, "class" if is_class else "method" if inside_class else "function", docstring)
        if isinstance(child, ast.ClassDef):
            yield from _walk(child, name, module, inside_class=True)


def _from_c() -> Iterator[StdlibDoc]:
    """Yield the docstrings of members of some modules written in C, which are imported."""
    for module_name in _IN_C:
        module = importlib.import_module(module_name)
        for name, member in sorted(vars(module).items()):
            if _hidden(name) or not callable(member) or getattr(member, "__name__", name) != name:
                continue
            qualified = f"{module_name}.{name}"
            if member.__doc__:
                yield _doc(qualified, module_name, "class" if inspect.isclass(member) else "function", member.__doc__)
            if inspect.isclass(member):
                for method_name, method in sorted(vars(member).items()):
                    docstring = getattr(method, "__doc__", None)
                    if not _hidden(method_name) and callable(getattr(member, method_name)) and docstring:
                        yield _doc(f"{qualified}.{method_name}", module_name, "method", docstring)


def _hidden(name: str) -> bool:
    return name.startswith("_") or name in _SKIPPED


def _doc(name: str, module: str, kind: str, docstring: str) -> StdlibDoc:
    return StdlibDoc(name, module, kind, inspect.cleandoc(docstring).strip())
