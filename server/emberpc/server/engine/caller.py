"""The caller of a call: name, lane and deadline.

Name, lane and the number of tokens decide when the texts of the call run. A call that cannot meet its deadline is
refused, or fails while it waits.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from math import inf
from time import perf_counter


class Lane(IntEnum):
    """Priority class of a call; the lower number runs first. Bulk texts get a turn after 0.25 s without one."""

    INTERACTIVE = 0
    BULK = 1


@dataclass(frozen=True)
class Caller:
    """Who made a call, how urgent the call is, and when the caller stops waiting.

    Attributes:
        name: the caller's name, such as the address of a client. In each lane, names take turns.
        lane: the priority class.
        deadline: when the caller stops waiting, in seconds of `time.perf_counter`; infinite: no deadline. A new call
            that would probably end later is refused. A waiting call fails if it would end later even at the
            workers' best rate; that is checked when texts of the call are taken from the queue.
    """

    name: str = ""
    lane: Lane = Lane.INTERACTIVE
    deadline: float = inf

    @property
    def seconds_left(self) -> float:
        """Return the seconds until the deadline; negative after it, infinite if there is no deadline."""
        return self.deadline - perf_counter()
