"""The caller of a call: name, lane and deadline.

Name and lane decide when the texts of the call run. The deadline decides whether the call is refused, or fails.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from math import inf
from time import perf_counter


class Lane(IntEnum):
    """Priority class of a call. Bulk texts run after interactive texts, but get a turn after 0.25 s without one."""

    INTERACTIVE = 0
    BULK = 1


@dataclass(frozen=True)
class Caller:
    """Who made a call, how urgent the call is, and when the caller stops waiting.

    Attributes:
        name: the caller's name. The scheduler shares the workers fairly between names.
        lane: the priority class.
        deadline: seconds of `time.perf_counter`. If the call cannot end by then when it is the turn of a waiting text,
            the call fails. Infinite: no deadline.
    """

    name: str = ""
    lane: Lane = Lane.INTERACTIVE
    deadline: float = inf

    @property
    def seconds_left(self) -> float:
        """Return the seconds until the deadline; negative after it, infinite if there is no deadline."""
        return self.deadline - perf_counter()
