"""The bytes of large messages that the server holds at a time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emberpc.server.errors import Code, ServiceError
from emberpc.server.in_flight import LARGE, BytesInFlight, Held, Streams

LIMIT = 10 * LARGE


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2 * LIMIT)), max_size=40))
def test_no_more_bytes_are_held_than_the_limit_but_for_one_message(messages: list[tuple[int, int]]) -> None:
    in_flight = BytesInFlight(LIMIT)
    calls = [Held(in_flight, Streams(4)) for _ in range(4)]
    sizes = [0] * 4
    for i, size in messages:
        try:
            calls[i].replace(size)
            sizes[i] = size if size >= LARGE else 0
        except ServiceError as error:
            assert error.code is Code.RESOURCE_EXHAUSTED
            assert error.retry_after
            sizes[i] = 0
            assert sum(sizes) + size > LIMIT
        assert in_flight.total == sum(sizes)
        assert in_flight.total <= LIMIT or sum(size > 0 for size in sizes) == 1
    for call in calls:
        call.replace(0)
    assert in_flight.total == 0


def test_one_message_may_have_more_bytes_than_the_limit() -> None:
    in_flight = BytesInFlight(LIMIT)
    in_flight.add(LIMIT + 1)
    with pytest.raises(ServiceError, match="max_in_flight_bytes"):
        in_flight.add(LARGE)
    in_flight.remove(LIMIT + 1)
    in_flight.add(LARGE)


def test_no_more_streams_are_open_than_the_limit() -> None:
    streams = Streams(2)
    calls = [Held(BytesInFlight(LIMIT), streams) for _ in range(3)]
    calls[0].open_stream()
    calls[1].open_stream()
    with pytest.raises(ServiceError, match="max_streams") as refused:
        calls[2].open_stream()
    assert refused.value.code is Code.RESOURCE_EXHAUSTED
    assert refused.value.retry_after
    calls[2].release()
    assert streams.open == 2
    calls[0].release()
    calls[0].release()
    assert streams.open == 1
    calls[2].open_stream()
