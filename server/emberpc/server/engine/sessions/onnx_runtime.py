"""Run ONNX models with ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from emberpc.bundle import BundleError, Graph
from emberpc.bundle.contents import Contents
from emberpc.bundle.interface import SLOW_FUSIONS
from emberpc.bundle.onnx_file import external_locations
from emberpc.server.engine.sessions.session import Feeds, LoadCancellation, SessionError
from emberpc.server.engine.sessions.shared_tables import Tables, read_tables


class OnnxSession:
    """An ONNX model that was loaded by ONNX Runtime. Several threads may run the model at the same time.

    Versions of ONNX Runtime before 1.22 cannot cancel the loading.

    All weights are copied into memory, so later changes of the files have no effect.

    Args:
        path: the ONNX file.
        threads: number of threads that one run may use.
        tables: large lookup tables of the file, which another session has read; None: they are read from the file.
        cancellation: cancels the loading; None: loading cannot be cancelled.
        contents: reads the ONNX file and its external weight files; None: they are read from disk.
        hashes: expected SHA-256 (hex) of the ONNX file and of each external weight file, by path; None: no check.

    Raises:
        SessionError: a file cannot be read or loaded, the files have other hashes, or `cancellation` was cancelled.
        BundleError: `contents` stopped hashing.
    """

    def __init__(
        self,
        path: Path,
        threads: int = 1,
        tables: Tables | None = None,
        cancellation: LoadCancellation | None = None,
        contents: Contents | None = None,
        hashes: Mapping[Path, str] | None = None,
    ) -> None:
        self.path = path
        #: ONNX Runtime runs each batch on the thread that calls it.
        self.max_runs: int | None = None
        contents = contents or Contents()
        model, weights = _read(path, contents)
        files = [path, *(path.parent / location for location in weights)]
        if hashes is not None and {file: contents.sha256(file) for file in files} != hashes:
            raise SessionError(f"{path} changed since it was loaded")
        self._tables = read_tables(path, contents) if tables is None else tables
        # ONNX Runtime holds no reference to the values of the tables, so this object must keep them.
        self._values = {name: ort.OrtValue.ortvalue_from_numpy(table) for name, table in self._tables.items()}
        options = _options(threads)
        if cancellation is not None:
            cancellation.begin(lambda: _set_cancelled(options))
        try:
            for name, value in self._values.items():
                options.add_initializer(name, value)
            if weights:  # otherwise ONNX Runtime maps the files, and a served model changes when they change
                options.add_external_initializers_from_files_in_memory(
                    list(weights), list(weights.values()), [len(data) for data in weights.values()]
                )
            self._session = ort.InferenceSession(
                model, options, providers=["CPUExecutionProvider"], disabled_optimizers=list(SLOW_FUSIONS)
            )
        except Exception as error:  # ONNX Runtime's exceptions have no common base class
            raise SessionError(f"{path} cannot be loaded by ONNX Runtime {ort.__version__}") from error
        self._session._model_bytes = None  # ONNX Runtime holds the file's bytes and does not need them after loading
        self._hashes = {file: contents.sha256(file) for file in files}
        #: Inputs and outputs of the model.
        self.graph = Graph.of_onnx_runtime(self._session)

    #: ONNX Runtime runs any shape at once.
    compiles_shapes = False

    def with_threads(self, threads: int, cancellation: LoadCancellation | None = None) -> OnnxSession:
        """Load and return a second session of the same model, for runs on `threads` threads.

        Both sessions share the large lookup tables.

        Args:
            threads: number of threads that one run may use.
            cancellation: cancels the loading; None: loading cannot be cancelled.

        Raises:
            SessionError: the files cannot be loaded, changed since this session was loaded, or loading was cancelled.
        """
        contents = Contents(lambda: cancellation is not None and cancellation.cancelled)
        try:
            return OnnxSession(self.path, threads, self._tables, cancellation, contents, self._hashes)
        except BundleError as error:
            raise SessionError(f"{self.path} could not be loaded again for several threads") from error

    def run(self, feeds: Feeds, output: str) -> npt.NDArray[np.floating]:
        """Run one batch; see `Session.run`. The exceptions of ONNX Runtime have no common base class."""
        (found,) = self._session.run([output], feeds)
        return np.asarray(found)


def _read(path: Path, contents: Contents) -> tuple[bytes, dict[str, bytes]]:
    """Return the bytes of an ONNX file, and the bytes of each external weight file, by the path in the ONNX file.

    Raises:
        SessionError: a file cannot be read, or ONNX Runtime cannot take the external weights from memory, because of
            its version or their place in the model.
    """
    try:
        model = contents.read(path)
        weights = {name: contents.read(path.parent / name) for name in external_locations(path, contents)}
    except BundleError as error:
        raise SessionError(str(error)) from error
    if weights and not hasattr(ort.SessionOptions, "add_external_initializers_from_files_in_memory"):
        raise SessionError(
            f"{path} keeps weights in another file, and ONNX Runtime {ort.__version__} cannot take them from memory; "
            "upgrade onnxruntime, or save the model as one ONNX file"
        )
    return model, weights


def _options(threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # During a run on several threads, a thread that waits for the next operation spins and does not sleep: to wake it
    # would take as long as an operation on a short text. Between runs no thread spins, since it would take a core from
    # the server's workers.
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(threads > 1)))
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # The memory arena and the memory patterns would keep memory for every input shape, and a server sees many shapes.
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    options.log_severity_level = 3
    return options


def _set_cancelled(options: ort.SessionOptions) -> None:
    with suppress(AttributeError):  # ONNX Runtime before 1.22
        options.set_load_cancellation_flag(True)
