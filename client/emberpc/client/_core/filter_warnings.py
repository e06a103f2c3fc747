"""Issue Python warnings for the server's warnings about filters that are probably mistakes."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable

from emberpc.client.exceptions import FilterWarning

#: Prefix of the name of every module of the client, with a dot appended to the name. It tells the client's frames from
#: those of the caller.
_CLIENT = "emberpc.client."


def warn(sentences: Iterable[str]) -> None:
    """Issue a FilterWarning for each of the server's sentences.

    Each warning names the line of the caller's code that called the client, or that took the next item of an iterator
    of the client. If a coroutine of `AsyncClient` is a task by itself, the warning names a line of asyncio.
    """
    for sentence in sentences:
        warnings.warn(sentence, FilterWarning, stacklevel=_callers_level())


def _callers_level() -> int:
    """Return the `stacklevel` with which `warn`, the caller of this function, names the line outside of the client."""
    level = 2
    frame = sys._getframe(2)
    while frame.f_back is not None and f"{frame.f_globals.get('__name__')}.".startswith(_CLIENT):
        level += 1
        frame = frame.f_back
    return level
