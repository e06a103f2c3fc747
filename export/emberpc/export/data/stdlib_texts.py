"""Read real texts that every host has: the docstrings of the standard library of its Python.

Source files are parsed, which does not run their code. Functions and classes written in C have no source in Python.
To read some of these, the modules in `_IN_C` are imported, which has no side effects.
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

#: Names of modules and folders that are not read, since their docstrings do not describe a public API. Functions,
#: methods and classes with one of these names are left out, too.
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
#: Modules that are imported for the docstrings of functions and classes written in C. Some have source files, too.
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

    `name` is the full dotted name (`itertools.chain.from_iterable`), and `module` its first part. `kind` is `function`,
    `method` or `class`. `text` is the docstring without its indentation and without white space around it.
    """

    name: str
    module: str
    kind: str
    text: str


def read_stdlib() -> list[StdlibDoc]:
    """Return the docstrings of public functions, methods and classes of the standard library, sorted by name.

    They come from the modules written in Python, except those in `_SKIPPED`, and from the modules in `_IN_C`. A name
    that is defined several times occurs once, with its first docstring. The first call in a process takes seconds;
    later calls use its docstrings again.
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
    """Return texts of mixed length: five edge cases, two long concatenations of docstrings, and single docstrings.

    The edge cases are a single letter, a word, other scripts, white space and code. The texts are the same at each call
    with the same standard library.

    Args:
        count: number of texts, at least 8; fewer are returned if there are too few docstrings (there are about 5,400).
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
    """Yield the docstrings of public functions, methods and classes in the source files of the standard library.

    The files are parsed and not imported. Definitions inside a function, an `if` or a `try` are left out.
    """
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

    Left out are names with a leading underscore, names in `_SKIPPED`, and files and folders of `root` that are no
    module of the standard library, such as site-packages.
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
    """Import the modules in `_IN_C`, and yield the docstrings of their public functions, classes and methods.

    Docstrings that `_from_source` yields, too, are among them.
    """
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
