"""Load ONNX files with ONNX Runtime or OpenVINO, as functions that run one batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from emberpc.bundle import Graph
from emberpc.bundle.cores import multiplies_int8
from emberpc.bundle.interface import SLOW_FUSIONS
from emberpc.export.errors import ExportError
from emberpc.export.threads import session_options

if TYPE_CHECKING:
    import openvino

#: Values of a graph's inputs for a batch of texts, by the input's name, each int (texts, tokens).
Feeds = dict[str, npt.NDArray[np.integer]]


@dataclass(frozen=True)
class GraphSession:
    """An ONNX file that was loaded.

    Attributes:
        graph: inputs and outputs of the file.
        run: runs the graph on a batch, and returns the output of the given name. Several threads may call it at the
            same time. The exceptions of the engines have no common base class.
    """

    graph: Graph
    run: Callable[[Feeds, str], npt.NDArray[Any]]


def open_session(path: Path, engine: str, at_once: int) -> GraphSession:
    """Load an ONNX file for runs on one thread each.

    Args:
        path: the ONNX file.
        engine: `openvino`, which needs the extra of that name, or `onnxruntime`; empty: `onnxruntime`.
        at_once: number of runs that OpenVINO executes at a time; further runs wait.

    Raises:
        ExportError: OpenVINO is not installed, the processor has no int8 dot products, or there is no such engine.
        Exception: the file cannot be loaded; the exceptions of the engines have no common base class.
    """
    if engine == "openvino":
        return _open_openvino(path, at_once)
    if engine not in ("", "onnxruntime"):
        raise ExportError(f"{path.name} was made for {engine!r}, which this emberpc does not have; get a newer emberpc")
    session = ort.InferenceSession(
        str(path), session_options(1), providers=["CPUExecutionProvider"], disabled_optimizers=list(SLOW_FUSIONS)
    )
    return GraphSession(Graph.of_onnx_runtime(session), lambda feeds, output: session.run([output], feeds)[0])


def check_processor(name: str) -> None:
    """Raise ExportError if the processor has no int8 dot products, without which OpenVINO runs `name` wrongly."""
    if not multiplies_int8():
        raise ExportError(
            f"{name} needs a processor with int8 dot products, such as VNNI; use another host, or another variant"
        )


def look(path: Path) -> Graph:
    """Load an ONNX file with ONNX Runtime, and return the inputs and outputs of its graph.

    Raises:
        ExportError: the file cannot be loaded.
    """
    try:
        return Graph.of_onnx_runtime(ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]))
    except Exception as error:  # ONNX Runtime has no common base class of its exceptions
        raise ExportError(f"{path} cannot be loaded by ONNX Runtime {ort.__version__}; get the model again") from error


def _open_openvino(path: Path, at_once: int) -> GraphSession:
    check_processor(path.name)
    try:
        import openvino
    except ModuleNotFoundError as error:
        raise ExportError(
            f"{path.name} was made for OpenVINO, which is not installed; install the extra `openvino`"
        ) from error
    core = openvino.Core()
    model = core.read_model(path)
    options: Mapping[str, object] = {
        "INFERENCE_PRECISION_HINT": "f32",
        "NUM_STREAMS": at_once,
        "INFERENCE_NUM_THREADS": at_once,
        "ENABLE_CPU_PINNING": False,
        # Kernels of a shape of int8 take 3 MB for a small model, and OpenVINO keeps 5,000 kernels by default.
        "CPU_RUNTIME_CACHE_CAPACITY": 1000,
    }
    compiled = core.compile_model(model, "CPU", options)
    idle: list[openvino.InferRequest] = []

    def run(feeds: Feeds, output: str) -> npt.NDArray[Any]:
        try:
            request = idle.pop()
        except IndexError:
            request = compiled.create_infer_request()
        request.infer(dict(feeds), share_inputs=True)
        found: npt.NDArray[Any] = request.get_tensor(output).data.copy()
        idle.append(request)
        return found

    return GraphSession(Graph.of_openvino(model), run)
