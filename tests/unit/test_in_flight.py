"""The limit of the bytes of large messages that the server keeps at once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emberpc.server.errors import Code, ServiceError
from emberpc.server.in_flight import LARGE, BytesInFlight, Held, Streams

LIMIT = 10 * LARGE


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(-2, 2 * LIMIT)), max_size=60))
def test_bytes_in_flight_exceed_the_limit_only_for_a_single_message(steps: list[tuple[int, int]]) -> None:
    """Four calls read messages of given sizes; a negative size means that a call answers its oldest message."""
    in_flight = BytesInFlight(LIMIT)
    calls = [Held(in_flight, Streams(4)) for _ in range(4)]
    held: list[list[int]] = [[] for _ in calls]

    def counted() -> list[int]:
        return [sum(sizes) for sizes in held if sum(sizes) >= LARGE]

    for i, size in steps:
        if size < 0:
            if held[i]:
                calls[i].remove(held[i].pop(0))
        else:
            held[i].append(size)
            try:
                calls[i].add(size)
            except ServiceError as error:
                assert error.code is Code.RESOURCE_EXHAUSTED
                assert error.retry_after
                assert sum(counted()) > LIMIT
                held[i].pop()
        assert in_flight.total == sum(counted())
        assert in_flight.total <= LIMIT or len(counted()) == 1
    for call in calls:
        call.release()
    assert in_flight.total == 0


def test_small_messages_of_one_stream_are_counted_together() -> None:
    in_flight = BytesInFlight(LIMIT)
    call = Held(in_flight, Streams(1))
    for _ in range(4):
        call.add(LARGE // 4)
    assert in_flight.total == LARGE
    call.remove(LARGE // 4)
    assert in_flight.total == 0


def test_one_message_may_have_more_bytes_than_the_limit() -> None:
    in_flight = BytesInFlight(LIMIT)
    in_flight.add(LIMIT + 1)
    with pytest.raises(ServiceError, match="max_in_flight_bytes"):
        in_flight.add(LARGE)
    in_flight.remove(LIMIT + 1)
    in_flight.add(LARGE)


def test_open_streams_have_a_limit() -> None:
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
