"""What became of jobs, and telling it to their callers: from the workers' threads to the event loops."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence

from emberpc.server.engine.batching import Job, JobResult
from emberpc.server.errors import Code, ServiceError

log = logging.getLogger(__name__)


def failure() -> ServiceError:
    """Return the error of a call whose texts could not be run."""
    return ServiceError(Code.INTERNAL, "the model failed on this call")


def result_of(job: Job, end: float) -> JobResult:
    """Return what a job gave whose rows are all there, the last of them since `end`."""
    rows = [row for row in job.rows if row is not None]
    return JobResult(rows, job.started - job.submitted, end - job.started)


def fail(jobs: Iterable[Job], error: ServiceError) -> None:
    """Tell the callers of jobs that they failed."""
    tell([(job, error) for job in jobs])


def tell(outcomes: Sequence[tuple[Job, JobResult | ServiceError]]) -> None:
    """Tell callers what became of their calls, those of one event loop at once: each waking of it costs a thread."""
    loops: defaultdict[asyncio.AbstractEventLoop, list[tuple[Job, JobResult | ServiceError]]] = defaultdict(list)
    for job, outcome in outcomes:
        if not job.over:
            loops[job.future.get_loop()].append((job, outcome))
    for loop, own in loops.items():
        try:
            loop.call_soon_threadsafe(_settle, own)
        except RuntimeError:  # it is closed
            log.debug("%d callers left with their event loop", len(own))
        for job, _ in own:
            job.over = True


def _settle(outcomes: Iterable[tuple[Job, JobResult | ServiceError]]) -> None:
    for job, outcome in outcomes:
        if job.future.done():
            log.debug("a caller left before its outcome was there")
        elif isinstance(outcome, ServiceError):
            job.future.set_exception(outcome)
        else:
            job.future.set_result(outcome)
