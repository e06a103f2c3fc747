"""Run ONNX models with ONNX Runtime."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from emberpc.bundle import BundleError, Graph, Interface, Tensor
from emberpc.bundle.contents import Contents
from emberpc.bundle.onnx_file import external_locations
from emberpc.server.engine.sessions.shared_tables import Tables, read_tables
from emberpc.server.engine.tokenizing import TokenIds

Output = npt.NDArray[np.float32]


class SessionError(Exception):
    """An ONNX file, or one of its weight files, cannot be loaded.

    The message names one of these files; the cause may be only in `__cause__`.
    """


class LoadCancellation:
    """Cancels the loading of ONNX Runtime sessions from another thread. Thread-safe.

    Sessions with the same object must be loaded one after the other. ONNX Runtime before 1.22 cannot cancel: it loads a
    session to its end.
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
        """Make the loading of a session that is in progress fail, and all later loading with this object.

        ONNX Runtime before 1.22 loads the sessions all the same; then this only sets `cancelled`.
        """
        with self._lock:
            self._cancelled = True
            if self._loading is not None:
                _set_cancelled(self._loading)

    def begin(self, options: ort.SessionOptions) -> None:
        """Note the options of the session that is loaded next, so that `cancel` can make its loading fail.

        If `cancel` was called before, that loading will fail, except with ONNX Runtime before 1.22.
        """
        with self._lock:
            self._loading = options
            if self._cancelled:
                _set_cancelled(options)


def _set_cancelled(options: ort.SessionOptions) -> None:
    with suppress(AttributeError):  # ONNX Runtime before 1.22
        options.set_load_cancellation_flag(True)


class OnnxSession:
    """An ONNX model, loaded by ONNX Runtime, that runs on token ids. Several threads may run it at the same time.

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
            cancellation.begin(options)
        try:
            for name, value in self._values.items():
                options.add_initializer(name, value)
            if weights:  # otherwise ONNX Runtime maps the files, and a served model changes when they change
                options.add_external_initializers_from_files_in_memory(
                    list(weights), list(weights.values()), [len(data) for data in weights.values()]
                )
            self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's exceptions have no common base class
            raise SessionError(f"{path} cannot be loaded by ONNX Runtime {ort.__version__}") from error
        self._session._model_bytes = None  # ONNX Runtime holds the file's bytes and does not need them after loading
        self._hashes = {file: contents.sha256(file) for file in files}
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        #: Inputs and outputs of the model.
        self.graph = Graph(
            [Tensor(node.name, node.type, node.shape) for node in inputs],
            [Tensor(node.name, node.type, node.shape) for node in outputs],
        )

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

    def run(self, batch: Sequence[TokenIds], interface: Interface, pad_token_id: int) -> Output:
        """Run texts as one batch, padded to the length of the longest text.

        Args:
            batch: token ids of each text, at least one text.
            interface: roles of the model's inputs and outputs, and the pooling.
            pad_token_id: token id that fills up the shorter texts.

        Returns:
            float32, shape (texts, width): a vector, or logits, for each text.

        Raises:
            BundleError: the output has another number of axes than `interface` expects.
            Exception: ONNX Runtime failed; its exceptions have no common base class.
        """
        longest = max(len(ids) for ids in batch)
        input_ids = np.full((len(batch), longest), pad_token_id, dtype=np.int64)
        mask = np.zeros((len(batch), longest), dtype=np.int64)
        for row, ids in enumerate(batch):
            input_ids[row, : len(ids)] = ids
            mask[row, : len(ids)] = 1
        (output,) = self._session.run([interface.output], interface.inputs.feeds(input_ids, mask))
        return interface.finish(output, mask)


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
