"""Measure the wall and CPU time of a block of code."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter, process_time


@dataclass
class Cost:
    """Context manager that measures the time of a block.

    `seconds` is wall time, and `cpu_seconds` is the CPU time of all threads of this process. A later block with the
    same object adds its time to both.
    """

    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def __enter__(self) -> Cost:
        self._wall, self._cpu = perf_counter(), process_time()
        return self

    def __exit__(self, *_error: object) -> None:
        self.seconds += perf_counter() - self._wall
        self.cpu_seconds += process_time() - self._cpu
