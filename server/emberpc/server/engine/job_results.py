"""Send the results and errors of jobs from the workers' threads to the event loops of their callers."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence

from emberpc.server.engine.batching import Job, JobResult
from emberpc.server.errors import Code, ServiceError

log = logging.getLogger(__name__)


def failure() -> ServiceError:
    """Return the INTERNAL error of a call on whose texts the model failed."""
    return ServiceError(Code.INTERNAL, "the model failed on this call")


def result_of(job: Job, end: float) -> JobResult:
    """Return the result of a job that has all rows.

    Args:
        job: the job.
        end: when the last batch of the job ended, in seconds of `perf_counter`.
    """
    rows = [row for row in job.rows if row is not None]
    return JobResult(rows, job.started - job.submitted, end - job.started)


def fail(jobs: Iterable[Job], error: ServiceError) -> None:
    """Send an error to the callers of the jobs that are not over, and mark these jobs as over."""
    send([(job, error) for job in jobs])


def send(outcomes: Sequence[tuple[Job, JobResult | ServiceError]]) -> None:
    """Send results and errors to the callers of the jobs that are not over, and mark these jobs as over.

    May be called from any thread. Each event loop is woken once for all of its jobs, since to wake an event loop takes
    a system call, and makes the thread of the loop run. Nothing is sent to a closed loop or to a caller that left.
    """
    loops: defaultdict[asyncio.AbstractEventLoop, list[tuple[Job, JobResult | ServiceError]]] = defaultdict(list)
    for job, outcome in outcomes:
        if not job.over:
            loops[job.future.get_loop()].append((job, outcome))
    for loop, own in loops.items():
        try:
            loop.call_soon_threadsafe(_settle, own)
        except RuntimeError:  # the loop is closed
            log.debug("the event loop of %d callers is closed", len(own))
        for job, _ in own:
            job.over = True


def _settle(outcomes: Iterable[tuple[Job, JobResult | ServiceError]]) -> None:
    for job, outcome in outcomes:
        if job.future.done():
            log.debug("a caller left before its result was ready")
        elif isinstance(outcome, ServiceError):
            job.future.set_exception(outcome)
        else:
            job.future.set_result(outcome)
