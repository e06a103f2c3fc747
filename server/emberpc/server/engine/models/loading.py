"""Loads, reloads and unloads models while others, or older versions of them, are served."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from emberpc.server.deadlines import Deadline
from emberpc.server.engine.models.model import Model, ModelLoadError, Tell
from emberpc.server.engine.models.registry import Registry
from emberpc.server.errors import Code, ServiceError, invalid
from emberpc.server.memory import return_memory
from emberpc.server.names import NAME

log = logging.getLogger(__name__)

Result = TypeVar("Result")


class Loader:
    """Changes what a registry serves.

    What changes it runs by `submit`, on one thread, one after the other: two
    changes of one model never meet, and loading takes no thread that calls need.

    Args:
        registry: the models.
        models_dir: the folder that models may be loaded from by path; None: none may be.
        variants: which ONNX file of a model to serve, by the model's name; default: its first.
        options: what is stated of models that emberpc did not export, by their names.
    """

    def __init__(
        self,
        registry: Registry,
        models_dir: Path | None = None,
        variants: Mapping[str, str] | None = None,
        options: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        self._registry = registry
        self._models_dir = models_dir
        self._variants = variants or {}
        self._options = options or {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader")
        #: Not done yet; a set that only the methods below change.
        self._submitted: set[Future[Any]] = set()

    def submit(self, work: Callable[[], Result]) -> Future[Result]:
        """Run something after what was submitted before; it goes on if nobody waits for it any more."""
        future = self._thread.submit(work)
        self._submitted.add(future)
        future.add_done_callback(self._submitted.discard)
        return future

    def close(self, deadline: Deadline | None = None) -> bool:
        """Drop what waits, and wait for what is being done.

        Args:
            deadline: until when to wait; None: without limit.

        Returns:
            Whether nothing is being done any more.
        """
        self._thread.shutdown(wait=False, cancel_futures=True)
        return not wait(list(self._submitted), (deadline or Deadline()).seconds_left).not_done

    def load(self, name: str, path: str, variant: str = "", tell: Tell = lambda stage: None) -> Model:
        """Serve a bundle under a new name. Takes seconds.

        Args:
            name: the name.
            path: the folder, relative to the models directory.
            variant: which of its ONNX files; empty: the one that the server was told, else the first.
            tell: called with each stage as it begins.

        Raises:
            ServiceError: INVALID_ARGUMENT if the name is none or the path leads nowhere or out of the directory,
                ALREADY_EXISTS if the name is taken, FAILED_PRECONDITION if there is no models directory or the bundle
                cannot be served.
        """
        if not NAME.fullmatch(name):
            raise invalid("name", f"is {name!r}; it must be 1 to 128 letters, digits, '.', '_' and '-'")
        if any(model.name == name for model in self._registry.models()):
            raise ServiceError(
                Code.ALREADY_EXISTS,
                f"model {name!r} is served already; reload it, or choose another name",
                reason="MODEL_EXISTS",
                metadata={"model": name},
            )
        return self._serve(
            name, self._folder(path), variant or self._variants.get(name, ""), self._options.get(name, {}), tell
        )

    def reload(self, name: str, path: str = "", variant: str = "", tell: Tell = lambda stage: None) -> Model:
        """Serve what is now in a model's folder, or another bundle, under the model's name. Takes seconds.

        Calls that hold the old version finish on it. It stays if the new one cannot be served.

        Args:
            name: the model.
            path: another folder, relative to the models directory; empty: the one it was loaded from.
            variant: which of its ONNX files; empty: the one of the name that is served now.
            tell: called with each stage as it begins.

        Raises:
            ServiceError: NOT_FOUND if there is no such model, else as `load` says.
        """
        served = self._registry.get(name)
        folder = self._folder(path) if path else served.folder
        return self._serve(name, folder, variant or served.variant.name, served.options, tell, fresh=True)

    def unload(self, name: str) -> Future[None]:
        """Serve a model no more; new calls do not find it.

        Returns:
            A future that is done when the calls that hold it are done and its memory was returned.

        Raises:
            ServiceError: NOT_FOUND if there is no such model.
        """
        gone = self._registry.remove(name)
        log.info("model %s is served no more", name)
        return gone

    def _serve(
        self, name: str, folder: Path, variant: str, options: Mapping[str, str], tell: Tell, *, fresh: bool = False
    ) -> Model:
        try:
            model = self._registry.load(name, folder, variant, options, fresh=fresh, tell=tell)
        except ModelLoadError as error:
            raise ServiceError(
                Code.FAILED_PRECONDITION, str(error), reason="MODEL_UNFIT", metadata={"model": name}
            ) from error
        return_memory()  # reading a file of weights takes as much again as they take in the end
        return model

    def _folder(self, path: str) -> Path:
        """Return a folder inside the models directory.

        Raises:
            ServiceError: FAILED_PRECONDITION if there is no models directory, INVALID_ARGUMENT if the path leads
                nowhere, out of it or over a symbolic link.
        """
        if self._models_dir is None:
            raise ServiceError(
                Code.FAILED_PRECONDITION,
                "the server has no models directory to load from; start it with --models-dir DIR",
                reason="NO_MODELS_DIR",
            )
        pure = PurePosixPath(path)
        # Hidden names too: an export writes to one until it is whole.
        if not pure.parts or pure.is_absolute() or "\0" in path or any(part.startswith(".") for part in pure.parts):
            raise invalid(
                "path",
                f"is {path!r}; it must be that of a folder inside the server's models directory, relative to it, with "
                "no part that starts with a dot",
            )
        folder = self._models_dir
        try:
            for part in pure.parts:
                folder = folder / part
                if folder.is_symlink():
                    raise invalid(
                        "path", f"is {path!r}, which leads over a symbolic link; put the folder itself there, no link"
                    )
            there = folder.is_dir()
        except OSError:  # such as a name that is too long
            there = False
        if not there:
            raise invalid("path", f"is {path!r}, and the server's models directory has no such folder; put it there")
        return folder
