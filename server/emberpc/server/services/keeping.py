"""VerifyCollection: how the progress and the problems of a verification are told."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from emberpc.server.errors import Code
from emberpc.server.index import CollectionBackend, Verified
from emberpc.v1 import errors_pb2
from emberpc.v1 import index_pb2 as pb
from emberpc.wire import status

_DOMAIN = "emberpc"


async def verification(
    collection: CollectionBackend, in_pool: Callable[[Callable[[], Any]], Awaitable[Any]], *, full: bool = False
) -> AsyncIterator[pb.VerifyCollectionResponse]:
    """Verify a collection, a message for each step; a caller who goes away ends it after the step under way."""
    steps = collection.verify(full=full)
    while (step := await in_pool(lambda: next(steps, None))) is not None:
        yield _message(step)


def _message(step: Verified) -> pb.VerifyCollectionResponse:
    failures = [
        pb.RecordFailure(
            id=problem.id,
            error=status.make(
                Code.INTERNAL.value, problem.message, [errors_pb2.ErrorInfo(reason=problem.reason, domain=_DOMAIN)]
            ),
        )
        for problem in step.problems
    ]
    return pb.VerifyCollectionResponse(
        checked_count=step.checked, total_count=step.total, failures=failures, done=step.done
    )
