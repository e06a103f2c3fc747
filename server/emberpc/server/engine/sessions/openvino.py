"""Run ONNX models with OpenVINO. This module needs the extra `openvino`."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import openvino as ov

from emberpc.bundle import BundleError, Graph
from emberpc.bundle.contents import Contents
from emberpc.bundle.onnx_file import external_locations
from emberpc.server.engine.priority import lower_priority
from emberpc.server.engine.sessions.session import Feeds, LoadCancellation, SessionError

#: Names of OpenVINO for the precisions.
_PRECISIONS = {"fp32": "f32", "bf16": "bf16"}
#: Maximum number of compiled kernels that a session keeps; OpenVINO's default is 5,000. A shape of MiniLM needs about
#: 11 kernels, which take 0.5 MB in bf16 and 3 MB in int8. `Encoder` rounds shapes, so that they repeat.
_KERNELS = 1000


class OpenVinoSession:
    """An ONNX model that was compiled by OpenVINO. Several threads may run the model at the same time.

    OpenVINO runs a batch on threads of its own, the streams. They have the low priority of the server's workers.
    Loading cannot be cancelled. All weights are copied into memory, so later changes of the files have no effect.

    Args:
        path: the ONNX file.
        precision: precision of matrix products, `fp32` or `bf16`. With `bf16`, weights have half the size.
        streams: maximum number of runs at a time; further runs wait. OpenVINO lowers the number to that of the cores.
        threads: number of threads that one run may use; more than 1 only if `streams` is 1.
        contents: reads the ONNX file and its external weight files; None: they are read from disk.
        model: the model that another session has read; None: it is read from the file.

    Raises:
        SessionError: a file cannot be read or loaded, the ONNX file has external weights, or the processor has no
            instructions for `bf16`.
    """

    def __init__(
        self,
        path: Path,
        precision: str = "fp32",
        streams: int = 1,
        threads: int = 1,
        contents: Contents | None = None,
        model: ov.Model | None = None,
    ) -> None:
        self.path = path
        self._precision = precision
        core = ov.Core()
        if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise SessionError(f"{path}: the processor has no bf16 instructions; serve the model with --precision fp32")
        self._model = _read(path, core, contents or Contents()) if model is None else model
        try:
            self._compiled = _compile(core, self._model, _options(precision, streams, threads))
        except RuntimeError as error:
            raise SessionError(f"{path} cannot be compiled by OpenVINO {ov.__version__}") from error
        #: Number of runs that OpenVINO executes at a time.
        self.max_runs: int | None = max(1, int(self._compiled.get_property("NUM_STREAMS")))
        #: Requests that no thread uses. A request holds the buffers of one run.
        self._idle: list[ov.InferRequest] = []
        #: Inputs and outputs of the model.
        self.graph = Graph.of_openvino(self._model)

    #: OpenVINO compiles kernels for each shape.
    compiles_shapes = True

    def with_threads(self, threads: int, cancellation: LoadCancellation | None = None) -> OpenVinoSession:
        """Compile and return a second session of the same model, which runs one batch at a time on `threads` threads.

        Raises:
            SessionError: the model cannot be compiled again, or `cancellation` was cancelled before.
        """
        if cancellation is not None and cancellation.cancelled:
            raise SessionError(f"{self.path} was not loaded for several threads, since the loading was cancelled")
        return OpenVinoSession(self.path, self._precision, threads=threads, model=self._model)

    def run(self, feeds: Feeds, output: str) -> npt.NDArray[np.floating]:
        """Run one batch; see `Session.run`. OpenVINO raises RuntimeError."""
        try:
            request = self._idle.pop()
        except IndexError:
            request = self._compiled.create_infer_request()
        request.infer(dict(feeds), share_inputs=True)
        found: npt.NDArray[np.floating] = request.get_tensor(output).data.copy()
        self._idle.append(request)  # a request that failed is not used again
        return found


def _read(path: Path, core: ov.Core, contents: Contents) -> ov.Model:
    """Return the model of an ONNX file.

    Raises:
        SessionError: the file cannot be read or loaded, or keeps weights in another file.
    """
    try:
        data = contents.read(path)
        if external_locations(path, contents):
            raise SessionError(
                f"{path} keeps weights in another file, which OpenVINO cannot take from memory; serve the model with "
                "--engine onnxruntime, or save it as one ONNX file"
            )
    except BundleError as error:
        raise SessionError(str(error)) from error
    try:
        return core.read_model(data)
    except RuntimeError as error:
        raise SessionError(f"{path} cannot be loaded by OpenVINO {ov.__version__}") from error


def _options(precision: str, streams: int, threads: int) -> dict[str, object]:
    return {
        "INFERENCE_PRECISION_HINT": _PRECISIONS[precision],
        "NUM_STREAMS": streams,
        "INFERENCE_NUM_THREADS": max(streams, threads),
        # Pinned threads would all sit on the same cores in two servers on one host.
        "ENABLE_CPU_PINNING": False,
        "CPU_RUNTIME_CACHE_CAPACITY": _KERNELS,
    }


def _compile(core: ov.Core, model: ov.Model, options: Mapping[str, object]) -> ov.CompiledModel:
    """Compile a model on a thread of low priority: OpenVINO's streams inherit the priority of the compiling thread."""
    with ThreadPoolExecutor(1, thread_name_prefix="compile", initializer=lower_priority) as thread:
        return thread.submit(core.compile_model, model, "CPU", options).result()
