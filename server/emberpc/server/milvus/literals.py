"""Write string literals of Milvus's filter expressions.

Values are written into the expression: milvus-lite does not support expressions with parameters.
"""

from __future__ import annotations

_ESCAPES = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"})


def quoted(text: str) -> str:
    """Return a text as a string literal of a Milvus expression: in double quotes, with escapes."""
    return f'"{text.translate(_ESCAPES)}"'
