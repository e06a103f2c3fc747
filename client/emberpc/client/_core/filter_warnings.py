"""Issue the server's warnings about filters that are probably mistakes as warnings of Python."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable

from emberpc.client.exceptions import FilterWarning

#: Prefix of the names of all modules of the client.
_CLIENT = "emberpc.client."


def warn(sentences: Iterable[str]) -> None:
    """Issue a FilterWarning for each sentence; its place is the line of the caller's code that called the client.

    For a coroutine of `AsyncClient` that runs as a task of its own, it is a line of asyncio.
    """
    for sentence in sentences:
        warnings.warn(sentence, FilterWarning, stacklevel=_callers_level())


def _callers_level() -> int:
    """Return the `stacklevel` with which `warn` names the line of the caller's code that called the client."""
    level = 2
    frame = sys._getframe(2)
    while frame.f_back is not None and f"{frame.f_globals.get('__name__')}.".startswith(_CLIENT):
        level += 1
        frame = frame.f_back
    return level
