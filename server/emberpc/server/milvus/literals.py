"""Literals of Milvus's expressions; milvus-lite has no parameters."""

from __future__ import annotations

_ESCAPES = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"})


def quoted(text: str) -> str:
    """Return a text as a literal."""
    return f'"{text.translate(_ESCAPES)}"'
