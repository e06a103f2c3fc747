"""What `Client` does with a server's models, and its health."""

from __future__ import annotations

# What the methods have in common is said once, in the docstring of `Client`.
# ruff: noqa: D417
from emberpc.client import _models
from emberpc.client._running import Runner
from emberpc.client.types import Health, Model, ServerInfo, Stages


class ModelCalls:
    """The part of `Client` that is about models."""

    _runner: Runner

    def models(self, *, timeout: float | None = None) -> list[Model]:
        """List the models served, by name."""
        return list(self._runner.pages(_models.list_models, timeout))

    def get_model(self, name: str, *, timeout: float | None = None) -> Model:
        """Describe a model; raises NotFound if none of that name is served."""
        return self._runner.run_one(_models.get_model(name), timeout)

    def load_model(
        self,
        name: str,
        path: str,
        *,
        variant: str = "",
        progress: Stages | None = None,
        timeout: float | None = None,
    ) -> Model:
        """Have the server load a bundle and serve it under a new name.

        The server goes on with it if the deadline passes, so ask `get_model` then.

        Args:
            name: 1 to 128 letters, digits, `.`, `_` and `-`.
            path: the bundle's folder, relative to the server's models directory.
            variant: which of its ONNX files; empty: the one that the server was told, else the first, fp32.
            progress: told what is being done, such as "warming up".

        Returns:
            The model as it is served.

        Raises:
            AlreadyExists: the name is taken, perhaps by a try of this very call whose answer was lost.
            InvalidArgument: the name is none, or the path leads nowhere or out of the models directory.
            FailedPrecondition: the bundle cannot be served, or the server has no models directory.
            PermissionDenied: the server does not let its models be changed.
            EmberpcError: the call failed otherwise.
        """
        return self._runner.follow(_models.load_model(name, path, variant), progress, timeout)

    def reload_model(
        self,
        name: str,
        path: str = "",
        *,
        variant: str = "",
        progress: Stages | None = None,
        timeout: float | None = None,
    ) -> Model:
        """Have the server serve another bundle, or the same one as it is now, under a name that it serves.

        Calls in flight finish on the old one, which stays if the new one cannot
        be served. The other arguments and errors are those of `load_model`.

        Args:
            name: the model.
            path: another folder; empty: the one it was loaded from.
            variant: which of its ONNX files; empty: the one of the name that is served now.

        Raises:
            NotFound: no model of that name is served.
        """
        return self._runner.follow(_models.reload_model(name, path, variant), progress, timeout)

    def unload_model(self, name: str, *, timeout: float | None = None) -> None:
        """Have the server serve a model no more; returns when the calls in flight on it are done.

        Raises:
            NotFound: no model of that name is served.
            PermissionDenied: the server does not let its models be changed.
            EmberpcError: the call failed otherwise.
        """
        return self._runner.run_one(_models.unload_model(name), timeout)

    def server_info(self, *, timeout: float | None = None) -> ServerInfo:
        """Return the server's version, limits and features.

        Raises:
            Unimplemented: the server is older than this call.
        """
        return self._runner.run_one(_models.server_info(), timeout)

    def health(self, service: str = "", *, timeout: float | None = None) -> Health:
        """Ask whether the server takes calls, by the standard grpc.health.v1.

        Args:
            service: full name of one of its services; empty: the server as a whole.

        Raises:
            NotFound: it has no service of that name.
            Unavailable: no server answers.
        """
        return self._runner.run_one(_models.health(service), timeout)
