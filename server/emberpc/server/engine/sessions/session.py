"""The contract between the engine and the libraries that run ONNX models."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from emberpc.bundle import Graph

Output = npt.NDArray[np.float32]
#: Values of a graph's inputs for one batch, by the name of the input.
Feeds = Mapping[str, npt.NDArray[np.integer]]


class SessionError(Exception):
    """An ONNX file, or one of its weight files, cannot be loaded.

    The message names one of these files; the cause may be only in `__cause__`.
    """


class LoadCancellation:
    """Cancels the loading of sessions from another thread. Thread-safe.

    Sessions with the same object must be loaded one after the other. Some libraries cannot cancel: they load a session
    to its end.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cancel: Callable[[], None] = _nothing
        self._cancelled = False

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled

    def cancel(self) -> None:
        """Make the loading of a session that is in progress fail, and all later loading with this object.

        With a library that cannot cancel, the sessions are loaded all the same; then this only sets `cancelled`.
        """
        with self._lock:
            self._cancelled = True
            self._cancel()

    def begin(self, cancel: Callable[[], None]) -> None:
        """Note how to cancel the loading that begins now. If `cancel` was called before, cancel this loading at once.

        Args:
            cancel: makes the loading fail, if the library can; called on any thread.
        """
        with self._lock:
            self._cancel = cancel
            if self._cancelled:
                cancel()


class Session(Protocol):
    """An ONNX model that was loaded by a library. Several threads may run the model at the same time."""

    @property
    def path(self) -> Path:
        """The ONNX file."""
        ...

    @property
    def graph(self) -> Graph:
        """The inputs and outputs of the model."""
        ...

    @property
    def max_runs(self) -> int | None:
        """Number of runs that the library executes at a time; further runs wait. None: no limit."""
        ...

    @property
    def compiles_shapes(self) -> bool:
        """Whether the library compiles the model for each shape of a batch, so that repeated shapes are faster."""
        ...

    def run(self, feeds: Feeds, output: str) -> npt.NDArray[np.floating]:
        """Run one batch, padded to one length, and return the output of that name.

        Raises:
            Exception: the library failed; the exceptions of the libraries have no common base class.
        """
        ...

    def with_threads(self, threads: int, cancellation: LoadCancellation | None = None) -> Session:
        """Load and return a second session of the same model, for runs on `threads` threads.

        Raises:
            SessionError: the files cannot be loaded, changed since this session was loaded, or loading was cancelled.
        """
        ...


def _nothing() -> None:
    """Cancel nothing: no session is being loaded."""
