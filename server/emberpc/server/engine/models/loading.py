"""Load, reload and unload models while the server serves."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from emberpc.server.deadlines import Deadline
from emberpc.server.engine.models.model import Model, ModelLoadError, OnStage
from emberpc.server.engine.models.registry import Registry
from emberpc.server.errors import Code, ServiceError, invalid
from emberpc.server.memory import return_memory
from emberpc.server.names import NAME

log = logging.getLogger(__name__)

Result = TypeVar("Result")


class Loader:
    """Loads, reloads and unloads the models of a registry.

    `load`, `reload` and `unload` run on the calling thread. Callers pass them to `submit`, which runs them one after
    the other on one thread. So two changes of one model never overlap, and loading takes no thread that calls need.

    Args:
        registry: the models.
        models_dir: folder that models may be loaded from by path; None: models cannot be loaded by path.
        variants: name of the variant that `load` serves if its caller names none, by the name of the model; for other
            models the first variant.
        options: options of foreign models, by the name of the model.
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
        #: Futures of the work that waits or runs, so that `close` can wait for it.
        self._submitted: set[Future[Any]] = set()

    def submit(self, work: Callable[[], Result]) -> Future[Result]:
        """Let the loader's thread run `work` after all work that was submitted before; return the future at once.

        Work that has begun runs to its end. Work that waits does not run if the future is cancelled or the loader is
        closed. The future receives the result or the error of the work.

        Raises:
            RuntimeError: the loader is closed.
        """
        future = self._thread.submit(work)
        self._submitted.add(future)
        future.add_done_callback(self._submitted.discard)
        return future

    def close(self, deadline: Deadline | None = None) -> bool:
        """Cancel the waiting work, and wait for the running work. After that, `submit` raises RuntimeError.

        Args:
            deadline: until when to wait; None: without limit.

        Returns:
            Whether no work is running any more.
        """
        self._thread.shutdown(wait=False, cancel_futures=True)
        return not wait(list(self._submitted), (deadline or Deadline()).seconds_left).not_done

    def load(self, name: str, path: str, variant: str = "", on_stage: OnStage = lambda stage: None) -> Model:
        """Load a bundle or foreign folder, serve it under a new name, and return the model. Takes seconds.

        Args:
            name: the name.
            path: the folder, relative to the models directory.
            variant: name of the variant; empty: the variant of the server's settings, else the first of the folder.
            on_stage: called on this thread with the name of each stage as it begins.

        Raises:
            ServiceError: INVALID_ARGUMENT if the name is malformed, or the path is absolute, names no folder inside the
                models directory, contains a symbolic link, or has a part that starts with a dot; ALREADY_EXISTS if a
                model has the name; FAILED_PRECONDITION if there is no models directory, or the folder cannot be served
                or has no such variant.
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
            name, self._folder(path), variant or self._variants.get(name, ""), self._options.get(name, {}), on_stage
        )

    def reload(self, name: str, path: str = "", variant: str = "", on_stage: OnStage = lambda stage: None) -> Model:
        """Load a model's folder again, or another folder, and serve the result under the model's name. Takes seconds.

        Calls that use the old version finish with it. If the new version cannot be served, the old version stays. Model
        options of the old version, which only a foreign folder has, hold for the new version too.

        Args:
            name: name of the model.
            path: another folder, relative to the models directory; empty: the folder that the model was loaded from.
            variant: name of the variant; empty: the variant that is served now, also in another folder.
            on_stage: called on this thread with the name of each stage as it begins.

        Returns:
            The new version.

        Raises:
            ServiceError: NOT_FOUND if no model has that name; INVALID_ARGUMENT if the path is wrong, as for `load`;
                FAILED_PRECONDITION if there is a path but no models directory, or the folder cannot be served or has no
                such variant.
        """
        served = self._registry.get(name)
        folder = self._folder(path) if path else served.folder
        return self._serve(name, folder, variant or served.variant.name, served.options, on_stage, fresh=True)

    def unload(self, name: str) -> Future[None]:
        """Stop serving a model; new calls do not find it.

        Returns:
            A future that is done when the calls that use the model have ended and, if nothing else needs its memory,
            the memory was returned to the system.

        Raises:
            ServiceError: NOT_FOUND if no model has that name.
        """
        gone = self._registry.remove(name)
        log.info("model %s is unloaded", name)
        return gone

    def _serve(
        self,
        name: str,
        folder: Path,
        variant: str,
        options: Mapping[str, str],
        on_stage: OnStage,
        *,
        fresh: bool = False,
    ) -> Model:
        try:
            model = self._registry.load(name, folder, variant, options, fresh=fresh, on_stage=on_stage)
        except ModelLoadError as error:
            raise ServiceError(
                Code.FAILED_PRECONDITION, str(error), reason="MODEL_UNFIT", metadata={"model": name}
            ) from error
        return_memory()  # loading takes twice the memory of the weights for a moment
        return model

    def _folder(self, path: str) -> Path:
        """Return the folder inside the models directory that a relative path names.

        Raises:
            ServiceError: FAILED_PRECONDITION if there is no models directory; INVALID_ARGUMENT if the path is absolute,
                names no folder inside the directory, contains a symbolic link, or has a part that starts with a dot.
        """
        if self._models_dir is None:
            raise ServiceError(
                Code.FAILED_PRECONDITION,
                "the server has no models directory to load from; start it with --models-dir DIR",
                reason="NO_MODELS_DIR",
            )
        pure = PurePosixPath(path)
        # Names that start with a dot are refused too: an export writes to such a folder until the bundle is complete.
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
        except OSError:  # for example, a name that is too long
            there = False
        if not there:
            raise invalid("path", f"is {path!r}, and the server's models directory has no such folder; put it there")
        return folder
