"""Threads that take on parts of a search, so that one of many queries has all cores.

Not hnswlib's own threads: where the system gives none any more, they end the process. And no `ThreadPoolExecutor`: one
that cannot start a thread has taken the work already, and does it later, when the graph may be about to change.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from queue import SimpleQueue
from typing import Generic, TypeVar

from emberpc.server.cores import usable_cores

Part = TypeVar("Part")
Outcome = TypeVar("Outcome")


class WorkerThreads(Generic[Part, Outcome]):
    """Does the parts of some work side by side. Safe to use from several threads.

    Args:
        most: helping threads, beside those that bring the work; they are started when there is work for them.
    """

    def __init__(self, most: int = usable_cores() - 1) -> None:
        self.most = most
        self._lock = threading.Lock()
        self._count = 0
        self._tasks: SimpleQueue[tuple[Future[Outcome], Callable[[Part], Outcome], Part]] = SimpleQueue()

    def each(self, work: Callable[[Part], Outcome], parts: Sequence[Part]) -> list[Outcome]:
        """Return what becomes of each part, at least one; when this returns or raises, nobody is at one any more.

        Those that no helper has begun when the caller is done with its own are for the caller.
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
        """Have so many threads, as far as may be and the system gives any; return whether there is one at all."""
        with self._lock:
            try:
                while self._count < min(wanted, self.most):
                    threading.Thread(target=self._work, name="helper", daemon=True).start()
                    self._count += 1
            except RuntimeError:
                pass  # the others help, or nobody does
            return wanted > 0 and self._count > 0

    def _work(self) -> None:
        while True:
            outcome, work, part = self._tasks.get()
            if not outcome.set_running_or_notify_cancel():
                continue
            try:
                outcome.set_result(work(part))
            except BaseException as error:  # for the one who waits
                outcome.set_exception(error)
            del outcome, work, part  # or they would be kept until the next
