"""What the server logs of gRPC's own messages."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from emberpc.server.start import _GRPC_LOGGER, set_up_logging


@pytest.fixture
def grpc_logger() -> Iterator[logging.Logger]:
    """Return gRPC's logger as `serve` sets it up."""
    logger = logging.getLogger(_GRPC_LOGGER)
    before = list(logger.filters)
    set_up_logging("info")
    yield logger
    logger.filters[:] = before


def log_failure(logger: logging.Logger, message: str) -> None:
    logger.error(message, "/emberpc.v1.EmbeddingService/Embed", exc_info=RuntimeError("Failed grpc_call_start_batch"))


def test_a_caller_who_leaves_before_the_response_is_no_error(
    grpc_logger: logging.Logger, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        # `test_requests_whose_callers_leave_hold_up_nobody` fails if gRPC changes this message.
        log_failure(grpc_logger, "ExecuteBatchError raised in core by servicer method [%s]")
    (record,) = caplog.records
    assert (record.levelno, record.exc_info) == (logging.DEBUG, None)
    assert "/emberpc.v1.EmbeddingService/Embed" in record.getMessage()


def test_other_errors_of_grpc_are_logged(grpc_logger: logging.Logger, caplog: pytest.LogCaptureFixture) -> None:
    log_failure(grpc_logger, "Unexpected [RuntimeError] raised by servicer method [%s]")
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.exc_info
