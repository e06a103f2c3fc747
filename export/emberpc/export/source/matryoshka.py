"""Read the dimensions that a Matryoshka model's vectors may be shortened to.

There is no standard place for these dimensions. The first of these places that states them counts:

- `matryoshka_dimensions` in `config.json`, which vLLM and SGLang read;
- `matryoshka_dims` in the model card (`README.md`), which sentence-transformers writes there with the
  parameters of its `MatryoshkaLoss`.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from emberpc.bundle.limits import MAX_DIMENSIONS
from emberpc.export.errors import ExportError

#: Pattern of the dimensions in a model card. sentence-transformers writes the parameters of the loss as an indented
#: JSON object in a code block; this list is all that is needed of them.
_IN_CARD = re.compile(r'"matryoshka_dims":\s*(\[[\d\s,]*\])')
_MAX_CARD_BYTES = 4 * 2**20


def read_matryoshka(folder: Path, config: dict[str, Any]) -> tuple[int, ...]:
    """Return the dimensions that vectors may be shortened to, in descending order; empty if no file states any.

    An empty list in config.json counts as stated. The number of dimensions of the vectors is not checked.

    Args:
        folder: folder of the source, where the model card lies.
        config: content of the encoder's config.json.

    Raises:
        ExportError: config.json states something else than a list of whole numbers from 1 to `MAX_DIMENSIONS`, or the
            model card states a number above `MAX_DIMENSIONS`.
    """
    stated = config.get("matryoshka_dimensions")
    if stated is None:
        stated = _in_card(folder / "README.md")
    if not isinstance(stated, list) or any(type(size) is not int or not 1 <= size <= MAX_DIMENSIONS for size in stated):
        raise ExportError(
            f"{folder / 'config.json'}: matryoshka_dimensions is {reprlib.repr(stated)}; "
            f"it must be a list of whole numbers from 1 to {MAX_DIMENSIONS}"
        )
    return tuple(sorted(set(stated), reverse=True))


def check_matryoshka(sizes: Sequence[int], dimensions: int, name: str) -> None:
    """Raise ExportError if one of the dimensions to shorten vectors to is more than the dimensions of the vectors.

    Args:
        sizes: the dimensions to shorten vectors to.
        dimensions: dimensions of the model's vectors.
        name: name of the model, for the error.
    """
    if sizes and max(sizes) > dimensions:
        raise ExportError(
            f"{name} returns vectors of {dimensions} dimensions, which cannot be shortened to {max(sizes)}; "
            "state the dimensions that it was trained for with --matryoshka"
        )


def _in_card(path: Path) -> list[int]:
    """Return the dimensions in the last match of `_IN_CARD` in a model card, without zeros; empty if there are none.

    A card that is missing, unreadable or larger than 4 MiB counts as one without dimensions.
    """
    try:
        if path.stat().st_size > _MAX_CARD_BYTES:
            return []
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return []
    found = _IN_CARD.findall(text)
    try:
        sizes = json.loads(found[-1]) if found else []
    except ValueError:
        return []
    return [size for size in sizes if size > 0]
