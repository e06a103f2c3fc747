"""Send the results and errors of submissions from the workers' threads to the event loops of their callers."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TypeAlias

from emberpc.server.engine.batching import Submission, SubmissionResult
from emberpc.server.errors import Code, ServiceError

log = logging.getLogger(__name__)

_Outcome: TypeAlias = tuple[Submission, SubmissionResult | ServiceError]


def failure() -> ServiceError:
    """Return the INTERNAL error of a call on whose texts the model failed."""
    return ServiceError(Code.INTERNAL, "the model failed on this call")


def result_of(submission: Submission, end: float) -> SubmissionResult:
    """Return the result of a submission that has all rows.

    Args:
        submission: the submission.
        end: when the last batch of the submission ended, in seconds of `perf_counter`.
    """
    rows = [row for row in submission.rows if row is not None]
    return SubmissionResult(rows, submission.started - submission.submitted, end - submission.started)


def fail(submissions: Iterable[Submission], error: ServiceError) -> None:
    """Send an error to the callers of the submissions that are not over, and mark these submissions as over."""
    send([(submission, error) for submission in submissions])


def send(outcomes: Sequence[_Outcome]) -> None:
    """Send results and errors to the callers of the submissions that are not over, and mark these submissions as over.

    May be called from any thread. Each event loop is woken once for all of its submissions, since to wake an event loop
    takes a system call, and makes the thread of the loop run. Nothing is sent to a closed loop or a caller that left.
    """
    loops: defaultdict[asyncio.AbstractEventLoop, list[_Outcome]] = defaultdict(list)
    for submission, outcome in outcomes:
        if not submission.over:
            loops[submission.future.get_loop()].append((submission, outcome))
    for loop, own in loops.items():
        try:
            loop.call_soon_threadsafe(_settle, own)
        except RuntimeError:  # the loop is closed
            log.debug("the event loop of %d callers is closed", len(own))
        for submission, _ in own:
            submission.over = True


def _settle(outcomes: Iterable[_Outcome]) -> None:
    for submission, outcome in outcomes:
        if submission.future.done():
            log.debug("a caller left before its result was ready")
        elif isinstance(outcome, ServiceError):
            submission.future.set_exception(outcome)
        else:
            submission.future.set_result(outcome)
