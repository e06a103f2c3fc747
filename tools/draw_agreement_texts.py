"""Draw the texts on which the server compares precisions, from the documents and docstrings of this repository.

The texts are sentences and paragraphs of 20 to 1,500 characters, each on one line, sorted by a hash. They were drawn
once and are committed: agreements that were measured on other texts cannot be compared.

    python tools/draw_agreement_texts.py > server/emberpc/server/engine/models/agreement_texts.txt
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: One text of four is a whole paragraph.
COUNT, PARAGRAPHS = 1200, 300


def paragraphs() -> Iterator[str]:
    for path in sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]):
        for block in path.read_text(encoding="utf-8").split("\n\n"):
            if not block.lstrip().startswith(("|", "```", "#", "<", "$")):
                yield " ".join(re.sub(r"\]\([^)]*\)|[*_`\[\]#>]", "", block).split())
    for folder in ("server", "client", "export"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_bytes())):
                if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)) and (found := ast.get_docstring(node)):
                    yield from (" ".join(block.replace("`", "").split()) for block in found.split("\n\n"))


def draw(texts: set[str], count: int) -> list[str]:
    fitting = [text for text in texts if 20 <= len(text) <= 1500]
    return sorted(fitting, key=lambda text: hashlib.sha256(text.encode()).digest())[:count]


def main() -> None:
    blocks = set(paragraphs())
    sentences = {sentence for block in blocks for sentence in re.split(r"(?<=[.:;]) (?=[A-Z])", block)}
    whole = draw({block for block in blocks if len(block) > 200}, PARAGRAPHS)
    for text in draw({*whole, *draw(sentences - {*whole}, COUNT - PARAGRAPHS)}, COUNT):
        print(text)


if __name__ == "__main__":
    main()
