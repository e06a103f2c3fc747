"""VerifyCollection: how the progress and the problems of a verification are told."""

from __future__ import annotations

from collections.abc import AsyncIterator

from emberpc.server.collections import CollectionBackend, Verified
from emberpc.server.errors import Code
from emberpc.server.services.index_pool import IndexPool
from emberpc.server.services.requests import Context
from emberpc.v1 import errors_pb2
from emberpc.v1 import index_pb2 as pb
from emberpc.wire import status

_DOMAIN = "emberpc"


async def verification(
    collection: CollectionBackend, pool: IndexPool, context: Context, *, full: bool = False
) -> AsyncIterator[pb.VerifyCollectionResponse]:
    """Verify a collection, a message for each step; a caller who goes away ends it within the step under way.

    Raises:
        ServiceError: as the collection says; RESOURCE_EXHAUSTED if too many calls wait for the first step.
    """
    steps = collection.verify(full=full)
    first = True
    while (step := await pool.run(lambda: next(steps, None), context, heavy=True, refuse=first)) is not None:
        first = False
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
