"""Messages of gRPC in the log of the server."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import grpc
import grpc.aio
import pytest

from aio_server import channel_to
from emberpc.server.start import _GRPC_LOGGER, set_up_logging


@pytest.fixture
def grpc_logger() -> Iterator[logging.Logger]:
    """The logger of gRPC as `serve` configures it."""
    logger = logging.getLogger(_GRPC_LOGGER)
    before = list(logger.filters)
    set_up_logging("info")
    yield logger
    logger.filters[:] = before


async def test_a_response_that_cannot_be_sent_is_logged_as_a_warning_without_traceback(
    grpc_logger: logging.Logger, caplog: pytest.LogCaptureFixture
) -> None:
    async def answer(request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        context.set_trailing_metadata((("no valid key", ""),))
        return b""

    server = grpc.aio.server()
    method: Any = grpc.unary_unary_rpc_method_handler(answer)
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("Service", {"Method": method})])
    logged = asyncio.Event()

    def note(_: logging.LogRecord) -> bool:
        logged.set()
        return True

    grpc_logger.addFilter(note)
    async with channel_to(server) as channel:
        call: Any = channel.unary_unary("/Service/Method")
        calling = asyncio.ensure_future(call(b""))
        await logged.wait()
        calling.cancel()  # grpcio 1.76 ends the call only at its deadline
        with suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
            await calling
    (record,) = [record for record in caplog.records if record.name == grpc_logger.name]
    assert (record.levelno, record.exc_info) == (logging.WARNING, None)
    assert "could not be sent" in record.getMessage()
    assert "/Service/Method" in record.getMessage()


def test_other_errors_of_grpc_are_logged_unchanged(
    grpc_logger: logging.Logger, caplog: pytest.LogCaptureFixture
) -> None:
    grpc_logger.error("Unexpected [%s] raised by servicer method", "ValueError", exc_info=ValueError("x"))
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.exc_info
