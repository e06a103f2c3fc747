"""What `AsyncClient` asks about the server's models, and its health."""

from __future__ import annotations

from emberpc.client import _models
from emberpc.client._aio_running import AsyncRunner
from emberpc.client.types import Health, Model, ServerInfo, Stages


class AsyncModelCalls:
    """The part of `AsyncClient` that looks after models."""

    _runner: AsyncRunner

    async def models(self, *, timeout: float | None = None) -> list[Model]:
        """Do what `Client.models` does."""
        return [model async for model in self._runner.pages(_models.list_models, timeout)]

    async def get_model(self, name: str, *, timeout: float | None = None) -> Model:
        """Do what `Client.get_model` does."""
        return await self._runner.run_one(_models.get_model(name), timeout)

    async def load_model(
        self,
        name: str,
        path: str,
        *,
        variant: str = "",
        progress: Stages | None = None,
        timeout: float | None = None,
    ) -> Model:
        """Do what `Client.load_model` does."""
        return await self._runner.follow(_models.load_model(name, path, variant), progress, timeout)

    async def reload_model(
        self,
        name: str,
        path: str = "",
        *,
        variant: str = "",
        progress: Stages | None = None,
        timeout: float | None = None,
    ) -> Model:
        """Do what `Client.reload_model` does."""
        return await self._runner.follow(_models.reload_model(name, path, variant), progress, timeout)

    async def unload_model(self, name: str, *, timeout: float | None = None) -> None:
        """Do what `Client.unload_model` does."""
        return await self._runner.run_one(_models.unload_model(name), timeout)

    async def server_info(self, *, timeout: float | None = None) -> ServerInfo:
        """Do what `Client.server_info` does."""
        return await self._runner.run_one(_models.server_info(), timeout)

    async def health(self, service: str = "", *, timeout: float | None = None) -> Health:
        """Do what `Client.health` does."""
        return await self._runner.run_one(_models.health(service), timeout)
