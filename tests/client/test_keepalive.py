"""Calls that are silent for longer than three pings of HTTP/2, with the intervals of both sides at 1/100."""

from __future__ import annotations

from typing import Any

import pytest

from emberpc.client import Unavailable
from emberpc.client._core import connection
from fake_server import FakeServer
from ping_proxy import PingProxy

pytestmark = pytest.mark.server  # the intervals of the real server

#: Pings during a call. A gRPC server closes a connection at its fourth ping if pings come too often; the call must last
#: longer than that.
PINGS = 8
#: A long timeout for answers to pings, since a slow host may answer late; the tests do not check this timeout.
PATIENCE = ("grpc.keepalive_timeout_ms", 60_000)
PING_INTERVAL = "grpc.http2.min_ping_interval_without_data_ms"
#: The default of a gRPC server for PING_INTERVAL.
DEFAULT_INTERVAL_MS = 300_000


def hastened(options: Any) -> list[tuple[str, Any]]:
    """Return the options of pings with 1/100 of their intervals."""
    return [PATIENCE if name == PATIENCE[0] else (name, value // 100) for name, value in options]


@pytest.fixture(autouse=True)
def frequent_pings(monkeypatch: pytest.MonkeyPatch) -> None:
    # By default, the client sends only one ping a minute after two pings without data in between.
    options = [*hastened(connection._KEEPALIVE), ("grpc.http2.max_pings_without_data", 0)]
    monkeypatch.setattr(connection, "_KEEPALIVE", options)


@pytest.mark.parametrize(
    ("rpc", "name", "arguments"), [("Embed", "embed", (["a"],)), ("VerifyCollection", "verify_collection", ("c",))]
)
def test_a_call_that_is_silent_for_longer_than_three_pings_succeeds(
    shell_type: Any, rpc: str, name: str, arguments: tuple[Any, ...]
) -> None:
    from emberpc.server.app import _KEEPALIVE

    with FakeServer(options=hastened(_KEEPALIVE)) as server, PingProxy(server.target, PINGS) as proxy:
        shell = shell_type(proxy.target, timeout=300)
        try:
            shell("create_collection", "c")
            server.hooks[rpc] = lambda _: proxy.enough.wait(100)
            shell(name, *arguments)
        finally:
            shell.close()
        assert proxy.count >= PINGS
        assert len(server.asked[rpc]) == 1


def test_a_server_with_the_default_interval_of_grpc_ends_a_silent_call(shell_type: Any) -> None:
    """This shows that pings are refused at all; the test above would pass otherwise too."""
    from emberpc.server.app import _KEEPALIVE

    options = [(name, value) for name, value in hastened(_KEEPALIVE) if name != PING_INTERVAL]
    with (
        FakeServer(options=[*options, (PING_INTERVAL, DEFAULT_INTERVAL_MS // 100)]) as server,
        PingProxy(server.target, PINGS) as proxy,
    ):
        shell = shell_type(proxy.target, timeout=300)
        ended: list[str] = []
        server.hooks["Embed"] = lambda _: proxy.enough.wait(100)
        try:
            shell("embed", ["a"])
        except Unavailable as error:
            ended.append(error.message)
        finally:
            shell.close()
        # The connection is closed, and the client sends the request again over another one.
        assert ended or len(server.asked["Embed"]) > 1
