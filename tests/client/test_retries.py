"""Repetition of calls by the clients, and the pauses before it."""

from __future__ import annotations

from time import monotonic
from typing import Any

import grpc
import pytest

from emberpc.client import Client, EmberpcError, Internal, Unavailable
from emberpc.client._core import retries
from fake_server import FakeServer, Fault

Shell = Any


def test_a_retry_waits_as_long_as_the_server_states(
    fake: FakeServer, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float | None] = []
    tries: list[float] = []

    def watched(self: retries.Retries, error: EmberpcError, of: Any = retries.Retries.pause) -> float | None:
        pauses.append(of(self, error))
        return pauses[-1]

    monkeypatch.setattr(retries.Retries, "pause", watched)
    fake.hooks["Embed"] = lambda _: tries.append(monotonic())
    fake.faults["Embed"].append(Fault(grpc.StatusCode.UNAVAILABLE, "draining", "DRAINING", pushback_ms=700))
    shell("embed", ["a"])
    assert pauses == [0.7]  # without the server's delay, at most 0.12 s
    first, second = tries
    assert second - first >= 0.7


def test_grpc_itself_repeats_no_call() -> None:
    """A call that gRPC repeats begins again, however long it has run, and the client does not notice it."""
    with Client("localhost:1") as client:
        options = dict(client._runner._connection.options)
    assert "retryPolicy" not in str(options["grpc.service_config"])


def test_a_pause_or_a_late_end_of_one_try_does_not_affect_the_next() -> None:
    attempts = retries.Retries(60, allowed=True)
    first = attempts.begin()
    assert attempts.pause(Unavailable("no", retry_after=1.5)) == 1.5
    assert attempts.pause(Unavailable("no", retry_after=90)) is None  # past the deadline
    assert attempts.pause(Internal("no")) is None
    attempts.begin()
    attempts.end(first)
    assert attempts.ended is None
    once = retries.Retries(60, allowed=False)
    once.begin()
    assert once.pause(Unavailable("no")) is None
