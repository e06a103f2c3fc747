"""Decide how many threads training, cross-validation, tuning and embedding use, and run tasks side by side in threads.

Threads that wait should sleep and not spin: spinning threads take the cores from each other and from other processes,
and count as CPU time. A small problem runs on one thread, and several small problems run side by side
(docs/decisions/0023).
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

#: Environment variables with which the threads of OpenMP sleep while they wait. An OpenMP library reads them when it is
#: loaded: GNU's reads the first, LLVM's and Intel's read both.
_SLEEPING = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
#: Seconds between two reports while no task finishes. A report may raise, for example after a time limit, so a longer
#: interval would stop tasks later.
_REPORT_SECONDS = 0.1

T = TypeVar("T")
#: A function without arguments that a task calls: it raises `StoppedError` if the task should stop.
Check = Callable[[], None]


class StoppedError(Exception):
    """A task of `run_in_threads` was stopped, since its result is not needed any more."""


def usable_threads() -> int:
    """Return the number of threads that may compute at a time.

    It is the number of usable cores, or the first number in the environment variable OMP_NUM_THREADS if that is lower
    and not 0.
    """
    wanted = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    cores = usable_cores()
    return min(cores, int(wanted)) if wanted.isdecimal() and int(wanted) else cores


def _set_sleeping() -> tuple[set[str], bool]:
    """Set the environment variables of `_SLEEPING` for libraries that are loaded later; a user's own values stay.

    If torch is loaded already, nothing is set.

    Returns:
        The names of the variables that were set, and whether OMP_WAIT_POLICY is PASSIVE now. If not, the threads of
        torch may spin while they wait: torch was loaded before, or the user set another value.
    """
    own = set(_SLEEPING) & set(os.environ)
    if "torch" not in sys.modules:
        os.environ.update({name: value for name, value in _SLEEPING.items() if name not in own})
    sleep = os.environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE"
    return set(_SLEEPING) & set(os.environ) - own, sleep


#: Names of the environment variables that this module set and has not removed, and whether waiting threads of torch
#: sleep. `emberpc.export` imports this module first, so the variables are set before its other modules load torch.
_added, _torch_sleeps = _set_sleeping()


@contextmanager
def bounded_threads(maximum: int | None = None) -> Iterator[None]:
    """Bound the threads of torch and of BLAS inside the block; restore the caller's settings afterwards.

    torch uses all usable threads, but no more than `torch.get_num_threads` returned before the block, and only one if
    its waiting threads may spin. BLAS uses one: the products of numpy and SciPy are small here. The environment
    variables that this module set are removed, since torch has read them.

    Args:
        maximum: maximum number of threads of torch; 1 for small problems, which are slower on several threads. None: no
            such limit.
    """
    import scipy.linalg  # noqa: F401 - brings a BLAS of its own, which is only limited if it is loaded before
    import torch
    from threadpoolctl import threadpool_limits

    while _added:
        os.environ.pop(_added.pop(), None)
    before = torch.get_num_threads()
    usable = usable_threads() if _torch_sleeps else 1
    with threadpool_limits(1, user_api="blas"):
        torch.set_num_threads(min(before, usable, maximum or usable))
        try:
            yield
        finally:
            torch.set_num_threads(before)


def run_in_threads(
    tasks: Sequence[Callable[[Check], T]],
    report: Callable[[int], None] = lambda _done: None,
    *,
    maximum: int | None = None,
) -> list[T]:
    """Run tasks side by side, each on one thread, and return their results in the order of `tasks`.

    Args:
        tasks: functions that share no state, so that the results do not depend on the number of threads. A task's
            argument is a function that raises `StoppedError` if the task should stop; long tasks call it at every step.
        report: called in the caller's thread with the number of tasks done, after each task, and every 0.1 s while no
            task finishes. It may raise, for example after a time limit.
        maximum: maximum number of tasks to run at a time; default: `usable_threads()`, which is never exceeded.

    Raises:
        BaseException: what `report` or the first task that failed raised, KeyboardInterrupt included. Before this is
            raised, the other tasks get a request to stop, and this call waits until they have ended.
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

    count = min(usable_threads(), len(tasks), maximum or len(tasks))
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
    """Wait until a task finishes, and call `report` every 0.1 s meanwhile; raise what the task raised."""
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
    """Return options of an ONNX Runtime session whose threads sleep while they wait, and which logs only errors.

    `threads` is the number of threads that run an operator together.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options
