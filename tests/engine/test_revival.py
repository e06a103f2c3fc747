"""The health status is NOT_SERVING while no worker lives, and SERVING again with new workers."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest
from grpc_health.v1 import health, health_pb2

from emberpc.server import app
from emberpc.server.engine import Engine


class Reviving:
    """An engine that can start threads again after some tries."""

    def __init__(self, alive: list[int]) -> None:
        self.alive = alive

    def revive(self) -> int:
        return self.alive.pop(0)


async def test_the_health_status_follows_the_living_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    statuses, reported = health.aio.HealthServicer(), []
    monkeypatch.setattr(app, "_REVIVAL_SECONDS", 0)
    set_health = app._set_health

    async def telling(servicer: health.aio.HealthServicer, *, serving: bool) -> None:
        reported.append(serving)
        await set_health(servicer, serving=serving)

    monkeypatch.setattr(app, "_set_health", telling)
    await asyncio.wait_for(app._revive(cast(Engine, Reviving([0, 0, 1, 2])), 2, statuses), 300)
    assert reported == [False, False, True, True]
    answer = await statuses.Check(health_pb2.HealthCheckRequest(), cast(Any, None))
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
