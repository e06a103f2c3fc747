"""Threads that run parts of a search, so that a search with many queries uses all cores.

hnswlib's own threads are not used: they end the process if the system cannot start another thread.
`ThreadPoolExecutor` is not used either: if it cannot start a thread, it raises an error after it has accepted the work.
Another of its threads may run that work later, while the graph is changed.
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
    """Runs the parts of some work on the calling thread and on worker threads. Safe to use from several threads.

    Args:
        maximum: maximum number of worker threads for all calls together. A worker thread starts when there is work for
            it, and never ends. By default one less than the cores, since the calling thread works too.
    """

    def __init__(self, maximum: int = usable_cores() - 1) -> None:
        self.maximum = maximum
        self._lock = threading.Lock()
        self._count = 0
        self._tasks: SimpleQueue[tuple[Future[Outcome], Callable[[Part], Outcome], Part]] = SimpleQueue()

    def each(self, work: Callable[[Part], Outcome], parts: Sequence[Part]) -> list[Outcome]:
        """Run `work` for each part, and return the results in the order of `parts`, which must not be empty.

        The calling thread runs the first part, and then the parts that no worker thread has begun. If `work` raises
        errors, that of the earliest part is raised here, and parts that have not begun are never run. When this returns
        or raises, no thread works on a part any more.
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
        """Start worker threads until there are `wanted` or `maximum`, or the system allows no more.

        Return whether the caller should use worker threads: there is at least one, and `wanted` is not 0.
        """
        with self._lock:
            try:
                while self._count < min(wanted, self.maximum):
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
