"""Docstrings of the standard library of the running Python."""

from __future__ import annotations

import subprocess
import sys

from emberpc.export.data.stdlib_texts import read_stdlib, sample_texts


def test_thousands_of_docstrings_are_read_and_all_are_public() -> None:
    docs = read_stdlib()
    names = [doc.name for doc in docs]
    assert len(docs) > 3000
    assert names == sorted(set(names))
    assert not [name for name in names if any(part.startswith("_") for part in name.split("."))]
    assert not {doc.module for doc in docs} & {"test", "idlelib", "lib2to3", "turtledemo", "encodings"}
    assert {doc.module for doc in docs} <= set(sys.stdlib_module_names)
    assert {doc.kind for doc in docs} == {"function", "method", "class"}
    assert all(doc.name.startswith(f"{doc.module}.") and doc.text == doc.text.strip() and doc.text for doc in docs)


def test_docstrings_of_c_modules_and_methods_are_read() -> None:
    docs = {doc.name: doc for doc in read_stdlib()}
    flatten = docs["itertools.chain.from_iterable"]
    assert (flatten.module, flatten.kind) == ("itertools", "method")
    assert "iterable" in flatten.text
    assert docs["json.dumps"].kind == "function"
    assert docs["functools.lru_cache"].kind == "function"
    assert docs["collections.Counter"].kind == "class"
    assert docs["pathlib.Path.exists"].kind == "method"
    assert docs["datetime.datetime.strptime"].kind == "method"
    assert docs["math.sqrt"].kind == "function"


def test_python_sources_are_parsed_and_not_imported() -> None:
    """The test reads only a few modules, since parsing all sources takes 1 s."""
    code = (
        "import sys; sys.stdlib_module_names = {'turtle', 'tkinter', 'smtplib'}; "
        "from emberpc.export.data.stdlib_texts import read_stdlib; docs = read_stdlib(); "
        "print({'turtle', 'smtplib'} <= {d.module for d in docs}, "
        "{'turtle', 'tkinter', 'smtplib', 'torch'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout == "True set()\n"


def test_sample_texts_are_reproducible_and_of_all_lengths() -> None:
    texts = sample_texts(64)
    assert len(texts) == 64
    assert sample_texts(64) == texts
    assert min(map(len, texts)) == 1
    assert max(map(len, texts)) > 2000
    assert any(not text.isascii() for text in texts)
