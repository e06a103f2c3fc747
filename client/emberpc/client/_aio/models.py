# Generated from ../_sync/models.py by tools/generate_async_client.py. Edit that file and run the script.
"""Methods about models, classifiers, and the server itself: version, limits, health."""

from __future__ import annotations

from emberpc.client._aio.runner import AsyncRunner
from emberpc.client._core import models
from emberpc.client.classification import Classifier
from emberpc.client.types import Health, Model, ServerInfo, Stages


class AsyncModelMethods:
    """Methods of `AsyncClient` about models, classifiers and the server itself."""

    _runner: AsyncRunner

    async def models(self, *, page_size: int = 0, timeout: float | None = None) -> list[Model]:
        """Return the models that the server serves, sorted by name. For many models, several requests are sent.

        Args:
            page_size: maximum number of models of one response, at most 1000; 0: the server's default.
            timeout: seconds that one request may take, with all its tries; None: the `timeout` of the constructor.

        Raises:
            EmberpcError: a request failed, for example with InvalidArgument for a `page_size` above 1000.
        """
        return await self._runner.all_items(lambda token: models.list_models(token, page_size), timeout)

    async def get_model(self, name: str, *, timeout: float | None = None) -> Model:
        """Return a model: its task, state, dimensions, maximum number of tokens of a text, and quality.

        Args:
            name: name of the model; empty: the only model of the server.
            timeout: seconds that one request may take, with all its tries; None: the `timeout` of the constructor.

        Raises:
            NotFound: the server serves no model of this name.
            InvalidArgument: the name is empty, and the server has several models.
            FailedPrecondition: the name is empty, and the server has no model.
        """
        return await self._runner.run_one(models.get_model(name), timeout)

    async def classifiers(self, *, page_size: int = 0, timeout: float | None = None) -> list[Classifier]:
        """Return the classifiers that the server serves, sorted by name. For many of them, several requests are sent.

        Args:
            page_size: maximum number of classifiers of one response, at most 1000; 0: the server's default.
            timeout: seconds that one request may take, with all its tries; None: the `timeout` of the constructor.

        Raises:
            Unimplemented: the server's version of emberpc is older than this method.
        """
        return await self._runner.all_items(lambda token: models.list_classifiers(token, page_size), timeout)

    async def get_classifier(self, name: str = "", *, timeout: float | None = None) -> Classifier:
        """Return a classifier: its labels, thresholds, calibration and quality.

        Args:
            name: name of the classifier; empty: the only classifier of the server.
            timeout: seconds that one request may take, with all its tries; None: the `timeout` of the constructor.

        Raises:
            NotFound: the server serves no model of this name.
            FailedPrecondition: the model is not a classifier; or the name is empty, and the server has no classifier.
            InvalidArgument: the name is empty, and the server has several classifiers.
            Unimplemented: the server's version of emberpc is older than this method.
        """
        return await self._runner.run_one(models.get_classifier(name), timeout)

    async def load_model(
        self,
        name: str,
        path: str,
        *,
        variant: str = "",
        progress: Stages | None = None,
        timeout: float | None = None,
    ) -> Model:
        """Load a bundle or a foreign folder on the server, and serve the model under a new name.

        If the call times out, the server may still load the model: `get_model` shows later whether the model is served.

        Args:
            name: name of the model: 1 to 128 letters, digits, `.`, `_` and `-`, starting with a letter or digit.
            path: the bundle or foreign folder, relative to the server's models directory.
            variant: variant to serve; empty: the variant that the server's settings name for this model; if they name
                none, the first variant, which is `fp32` in a bundle that an export made.
            progress: called with the name of each step as it begins, such as "warming up", and with "ready" at the end;
                None: no calls.
            timeout: seconds that one request may take, with all its tries; None: the `timeout` of the constructor.

        Returns:
            The model as the server serves it.

        Raises:
            AlreadyExists: the name is taken, perhaps by a try of this call whose response was lost.
            InvalidArgument: the name is invalid; or the path names no folder in the models directory, leads over a
                symbolic link, or has a part that starts with a dot.
            FailedPrecondition: the server cannot serve the folder, the folder has no such variant, or the server has no
                models directory.
            PermissionDenied: the server does not allow changes of its models.
            EmberpcError: the call failed otherwise.
        """
        return await self._runner.run_steps(models.load_model(name, path, variant), progress, timeout)

    async def reload_model(
        self,
        name: str,
        path: str = "",
        *,
        variant: str = "",
        progress: Stages | None = None,
        timeout: float | None = None,
    ) -> Model:
        """Replace a served model by the model that is now in its folder, or by the model in another folder.

        Calls in flight finish on the old model. If the server cannot serve the new model, the old model stays. If the
        call times out, the server may still replace the model.

        Args:
            name: name of the model.
            path: another bundle or foreign folder, relative to the server's models directory; empty: the folder that
                the model was loaded from.
            variant: variant to serve; empty: the variant that is served now, which the new model must have too.
            progress: called with the name of each step as it begins, such as "warming up", and with "ready" at the end;
                None: no calls.
            timeout: seconds that one request may take, with all its tries; None: the `timeout` of the constructor.

        Returns:
            The new model as the server serves it.

        Raises:
            NotFound: the server serves no model of this name.
            InvalidArgument: the path names no folder in the models directory, leads over a symbolic link, or has a part
                that starts with a dot.
            FailedPrecondition: the server cannot serve the folder, the folder has no such variant, or a path is given
                and the server has no models directory.
            PermissionDenied: the server does not allow changes of its models.
            EmberpcError: the call failed otherwise.
        """
        return await self._runner.run_steps(models.reload_model(name, path, variant), progress, timeout)

    async def unload_model(self, name: str, *, timeout: float | None = None) -> None:
        """Stop serving a model. Returns when the calls in flight that use the model have finished.

        If the call times out, the model may be served or not: `models` shows which.

        Args:
            name: name of the model.
            timeout: seconds that one request may take, with all its tries; None: the `timeout` of the constructor.

        Raises:
            NotFound: the server serves no model of this name, perhaps since a try of this call whose response was lost
                has unloaded the model.
            PermissionDenied: the server does not allow changes of its models.
            EmberpcError: the call failed otherwise.
        """
        return await self._runner.run_one(models.unload_model(name), timeout)

    async def server_info(self, *, timeout: float | None = None) -> ServerInfo:
        """Return the server's version, its limits of requests and responses, and its optional features.

        Args:
            timeout: seconds that one request may take, with all its tries; None: the `timeout` of the constructor.

        Raises:
            Unimplemented: the server's version of emberpc is older than this method.
        """
        return await self._runner.run_one(models.server_info(), timeout)

    async def health(self, service: str = "", *, timeout: float | None = None) -> Health:
        """Return whether the server, or one of its services, accepts calls, by the standard protocol grpc.health.v1.

        Args:
            service: full name of a gRPC service, such as `emberpc.v1.IndexService`; empty: the server as a whole.
            timeout: seconds that one request may take, with all its tries; None: the `timeout` of the constructor.

        Raises:
            NotFound: the server has no service of this name.
            Unavailable: the server cannot be reached.
            EmberpcError: the call failed otherwise, for example DeadlineExceeded if the server does not answer in time.
        """
        return await self._runner.run_one(models.health(service), timeout)
