"""Threads that run parts of a search, so that a search with many queries uses all cores.

hnswlib's own threads are not used: they end the process if the system cannot start another thread. Nor is
`ThreadPoolExecutor`: if it cannot start a thread, it has already accepted the work and runs it later, when the graph
may be about to change.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from queue import SimpleQueue
from typing import Generic, TypeVar

from emberpc.bundle.cores import usable_cores

Part = TypeVar("Part")
Outcome = TypeVar("Outcome")


class WorkerThreads(Generic[Part, Outcome]):
    """Runs the parts of some work in parallel. Safe to use from several threads.

    Args:
        most: limit of worker threads, besides the calling threads; they start when there is work for them.
    """

    def __init__(self, most: int = usable_cores() - 1) -> None:
        self.most = most
        self._lock = threading.Lock()
        self._count = 0
        self._tasks: SimpleQueue[tuple[Future[Outcome], Callable[[Part], Outcome], Part]] = SimpleQueue()

    def each(self, work: Callable[[Part], Outcome], parts: Sequence[Part]) -> list[Outcome]:
        """Return the result of each part, at least one; no thread works on a part when this returns or raises.

        The caller runs the first part, and then the parts that no worker thread has begun.
        """
        helped = [self._submit(work, part) for part in parts[1:]] if self._start(len(parts) - 1) else []
        try:
            done = [work(parts[0])]
            if not helped:
                return done + [work(part) for part in parts[1:]]
            return done + [
                work(part) if each.cancel() else each.result() for part, each in zip(parts[1:], helped, strict=True)
            ]
        finally:
            wait([each for each in helped if not each.cancel()])

    def _submit(self, work: Callable[[Part], Outcome], part: Part) -> Future[Outcome]:
        outcome: Future[Outcome] = Future()
        self._tasks.put((outcome, work, part))
        return outcome

    def _start(self, wanted: int) -> bool:
        """Start threads up to `wanted`, the limit and what the system allows; return whether there is any thread."""
        with self._lock:
            try:
                while self._count < min(wanted, self.most):
                    threading.Thread(target=self._work, name="helper", daemon=True).start()
                    self._count += 1
            except RuntimeError:
                pass  # the existing threads work, or the caller does all
            return wanted > 0 and self._count > 0

    def _work(self) -> None:
        while True:
            outcome, work, part = self._tasks.get()
            if not outcome.set_running_or_notify_cancel():
                continue
            try:
                outcome.set_result(work(part))
            except BaseException as error:  # raised in the calling thread
                outcome.set_exception(error)
            del outcome, work, part  # otherwise they would be kept until the next part
