"""Who asks for something, how urgently, and until when: what scheduling goes by."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from math import inf


class Lane(IntEnum):
    """Interactive work goes before bulk work."""

    INTERACTIVE = 0
    BULK = 1


@dataclass(frozen=True)
class Caller:
    """One call's claim on the workers.

    `name` says whose call it is: work is shared out fairly between names.
    `deadline` is in seconds of `time.perf_counter`; what has not begun by then is not wanted any more.
    """

    name: str = ""
    lane: Lane = Lane.INTERACTIVE
    deadline: float = inf
