"""Decide how many threads training, cross-validation, tuning and embedding use, and run tasks side by side in them.

Threads that wait sleep instead of spinning: spinning threads take the cores from each other and from other processes,
and count as CPU time. A small problem runs on one thread, and several of them run side by side (docs/decisions/0023).
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import TYPE_CHECKING, TypeVar

from emberpc.bundle.cores import usable_cores

if TYPE_CHECKING:
    import onnxruntime as ort

#: Settings under which the threads of OpenMP sleep while they wait. Its libraries read them when they are loaded: GNU's
#: reads the first, LLVM's and Intel's read both.
_SLEEPING = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
#: Seconds between two reports while no task finishes. A report may raise, for example after a time limit.
_REPORT_SECONDS = 0.1

T = TypeVar("T")
#: Raises `StoppedError` if the task that calls it should stop.
Check = Callable[[], None]


class StoppedError(Exception):
    """A task was stopped, since its result is not needed any more."""


def usable_threads() -> int:
    """Return the most threads that compute at a time: one for each usable core, or OMP_NUM_THREADS if it is lower."""
    wanted = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    cores = usable_cores()
    return min(cores, int(wanted)) if wanted.isdecimal() and int(wanted) else cores


def _set_sleeping() -> tuple[set[str], bool]:
    """Set the environment variables of `_SLEEPING` for libraries that are loaded later; a user's own values stay.

    Returns:
        The names of the variables that were set, and whether the threads of torch will sleep while they wait. They may
        spin if torch was loaded before, or if the user wants that.
    """
    own = set(_SLEEPING) & set(os.environ)
    if "torch" not in sys.modules:
        os.environ.update({name: value for name, value in _SLEEPING.items() if name not in own})
    sleep = os.environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE"
    return set(_SLEEPING) & set(os.environ) - own, sleep


#: `emberpc.export` imports this module first, before any other of its modules imports torch.
_added, _torch_sleeps = _set_sleeping()


@contextmanager
def bounded_threads(most: int | None = None) -> Iterator[None]:
    """Bound the threads of torch and of numpy's BLAS inside the block; restore the caller's settings afterwards.

    torch uses all usable threads, but no more than the caller allowed before, and only one if its waiting threads may
    spin. BLAS uses one: numpy's products are small here. Environment variables that this module set are removed as soon
    as torch is loaded, since it reads them then.

    Args:
        most: most threads of torch; 1 for small problems, which threads make slower.
    """
    import torch
    from threadpoolctl import threadpool_limits

    while _added:
        os.environ.pop(_added.pop(), None)
    before = torch.get_num_threads()
    usable = usable_threads() if _torch_sleeps else 1
    with threadpool_limits(1, user_api="blas"):
        torch.set_num_threads(min(before, usable, most or usable))
        try:
            yield
        finally:
            torch.set_num_threads(before)


def run_in_threads(
    tasks: Sequence[Callable[[Check], T]],
    report: Callable[[int], None] = lambda _done: None,
    *,
    most: int | None = None,
) -> list[T]:
    """Run tasks side by side, each on one thread, and return their results in order.

    A task computes the same as it would alone, so the results do not depend on the number of threads.

    Args:
        tasks: functions of one argument, a function that raises `StoppedError` if the task should stop. Long tasks
            call it at every step.
        report: called in the caller's thread with the number of tasks done, after each task and every 0.1 s. If it
            raises, as at the end of a time limit, all tasks stop, as at an interrupt.
        most: most tasks to run at a time; default: as many as threads are usable.

    Raises:
        Exception: what `report` raised, or the task that failed first; the other tasks are stopped.
    """
    results: dict[int, T] = {}
    todo, stop = deque(enumerate(tasks)), Event()
    finished: SimpleQueue[BaseException | None] = SimpleQueue()

    def check() -> None:
        if stop.is_set():
            raise StoppedError

    def work() -> None:
        with suppress(IndexError, StoppedError):
            while not stop.is_set():
                number, task = todo.popleft()
                try:
                    results[number] = task(check)
                except StoppedError:
                    raise
                except BaseException as error:
                    finished.put(error)
                    return
                finished.put(None)

    count = min(usable_threads(), len(tasks), most or len(tasks))
    threads = [Thread(target=work, name=f"emberpc-export-{number}", daemon=True) for number in range(count)]
    try:
        for thread in threads:
            thread.start()
        for done in range(1, len(tasks) + 1):
            _wait(finished, partial(report, done - 1))
            report(done)
    finally:
        stop.set()
        for thread in threads:
            if thread.ident is not None:
                thread.join()
    return [results[number] for number in range(len(tasks))]


def _wait(finished: SimpleQueue[BaseException | None], report: Callable[[], None]) -> None:
    """Wait until a task finishes, and call `report` meanwhile; raise what the task raised."""
    while True:
        try:
            error = finished.get(timeout=_REPORT_SECONDS)
        except Empty:
            report()
            continue
        if error is not None:
            raise error
        return


def session_options(threads: int) -> ort.SessionOptions:
    """Return options of an ONNX Runtime session whose threads sleep while they wait, and which logs no warnings."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options
