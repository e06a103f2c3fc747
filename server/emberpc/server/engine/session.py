"""The one place that knows ONNX Runtime."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from emberpc.bundle import BundleError, Graph, Interface, Tensor
from emberpc.bundle.onnx_file import external_files
from emberpc.server.engine.tables import Tables, read_tables
from emberpc.server.engine.tokenizing import TokenIds

Output = npt.NDArray[np.float32]


class SessionError(Exception):
    """An ONNX file cannot be loaded; the message says which."""


class LoadCancellation:
    """Cancels the loading of sessions, from another thread. Thread-safe.

    ONNX Runtime before 1.22 cannot cancel: a session that is being loaded is then loaded to its end.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loading: ort.SessionOptions | None = None
        self._cancelled = False

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled

    def cancel(self) -> None:
        """Cancel the session that is being loaded, and all that follow."""
        with self._lock:
            self._cancelled = True
            if self._loading is not None:
                _set_cancelled(self._loading)

    def begin(self, options: ort.SessionOptions) -> None:
        """Make the loading that begins with these options the one that `cancel` cancels."""
        with self._lock:
            self._loading = options
            if self._cancelled:
                _set_cancelled(options)


def _set_cancelled(options: ort.SessionOptions) -> None:
    with suppress(AttributeError):  # ONNX Runtime before 1.22
        options.set_load_cancellation_flag(True)


class OnnxSession:
    """An ONNX model, run on token ids. Safe to run from several threads.

    Args:
        path: the ONNX file.
        threads: that one run may use.
        tables: those of the file, if another session has them in memory; None: they are read.
        cancellation: cancels the loading; None: nothing does.

    Raises:
        SessionError: the file does not load, or loading was cancelled.
    """

    def __init__(
        self,
        path: Path,
        threads: int = 1,
        tables: Tables | None = None,
        cancellation: LoadCancellation | None = None,
    ) -> None:
        self.path = path
        self._written = _written(path)
        self._tables = read_tables(path) if tables is None else tables
        # ONNX Runtime does not keep them: they must live as long as the session.
        self._values = {name: ort.OrtValue.ortvalue_from_numpy(table) for name, table in self._tables.items()}
        options = _options(threads)
        if cancellation is not None:
            cancellation.begin(options)
        try:
            for name, value in self._values.items():
                options.add_initializer(name, value)
            self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
            raise SessionError(f"{path} cannot be loaded by ONNX Runtime {ort.__version__}") from error
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        #: What the model takes and gives.
        self.graph = Graph(
            [Tensor(node.name, node.type, node.shape) for node in inputs],
            [Tensor(node.name, node.type, node.shape) for node in outputs],
        )

    def with_threads(self, threads: int, cancellation: LoadCancellation | None = None) -> OnnxSession:
        """Return a session of the same model that uses `threads` threads; they share the large tables.

        Args:
            threads: that one run may use.
            cancellation: cancels the loading; None: nothing does.

        Raises:
            SessionError: the file does not load any more, is not the one that it was, or loading was cancelled.
        """
        session = OnnxSession(self.path, threads, self._tables, cancellation)
        if session._written != self._written:
            raise SessionError(f"{self.path} was written again since it was loaded")
        return session

    def check_unchanged(self) -> None:
        """See that the files are those that were loaded.

        Raises:
            SessionError: one was written since.
        """
        if _written(self.path) != self._written:
            raise SessionError(f"{self.path} was written while it was loaded; load it again")

    def run(self, batch: Sequence[TokenIds], interface: Interface, pad_token_id: int) -> Output:
        """Run texts as one batch, padded to the longest.

        Args:
            batch: token ids of each text, at least one text.
            interface: how to call the model.
            pad_token_id: what fills up the shorter texts.

        Returns:
            float32, shape (texts, width of the output).
        """
        longest = max(len(ids) for ids in batch)
        input_ids = np.full((len(batch), longest), pad_token_id, dtype=np.int64)
        mask = np.zeros((len(batch), longest), dtype=np.int64)
        for row, ids in enumerate(batch):
            input_ids[row, : len(ids)] = ids
            mask[row, : len(ids)] = 1
        (output,) = self._session.run([interface.output], interface.inputs.feeds(input_ids, mask))
        return interface.finish(output, mask)


def _written(path: Path) -> tuple[tuple[int, ...], ...]:
    """Return what changes when an ONNX file, or a file with weights of it, is written; empty for a missing file."""
    try:
        files = [path, *(path.parent / name for name in external_files(path.parent, path.name))]
    except BundleError:  # the session says what is wrong with it
        files = [path]
    return tuple(_status(each) for each in files)


def _status(path: Path) -> tuple[int, ...]:
    try:
        status = path.stat()
    except OSError:
        return ()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _options(threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Threads that wait for the next operation of a run must not sleep: waking them takes as long as one of a short
    # text. Between runs none spins: the server's workers are the parallelism, and it would take a core from them.
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(threads > 1)))
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # Both keep memory for every shape ever seen, and a server sees every shape.
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    options.log_severity_level = 3
    return options
