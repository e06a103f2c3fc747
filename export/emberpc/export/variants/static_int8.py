"""Static int8: matrix products in int8 with fixed ranges of their inputs, made by NNCF for OpenVINO.

This module needs the extra `int8-static`.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout

import onnx
import onnxruntime as ort

from emberpc.export.convert.sessions import Feeds, check_processor
from emberpc.export.errors import ExportError
from emberpc.export.libraries import calling_libraries

#: Levels of ONNX Runtime's log.
_WARNINGS, _ERRORS = 2, 3


@contextmanager
def _errors_only() -> Iterator[None]:
    """Let ONNX Runtime log errors only inside the block; its default, warnings too, is restored afterwards."""
    ort.set_default_logger_severity(_ERRORS)
    try:
        yield
    finally:
        ort.set_default_logger_severity(_WARNINGS)


def quantize_static(model: onnx.ModelProto, texts: Sequence[Feeds]) -> onnx.ModelProto:
    """Return a graph whose matrix products have int8 weights and int8 inputs.

    NNCF inserts pairs of QuantizeLinear and DequantizeLinear, whose scales it takes from the values that `texts` give.
    First, NNCF moves outliers from the inputs of a product to its weights (SmoothQuant, https://arxiv.org/abs/2211.10438).
    Last, it corrects the biases. The result runs in any engine, but only OpenVINO runs it fast.

    Args:
        model: a bundle's graph in fp32.
        texts: inputs of the graph for some texts, each a batch of one text.

    Raises:
        ExportError: NNCF is not installed, the processor has no int8 dot products, or NNCF cannot quantize the graph.
    """
    check_processor("int8-static")
    try:
        import nncf
    except ModuleNotFoundError as error:
        raise ExportError("NNCF is not installed; install the extra `int8-static`") from error
    problem, remedy = "NNCF cannot quantize this model", "leave this variant out"
    # NNCF draws progress bars on stdout, and makes sessions of ONNX Runtime that log warnings about the graph.
    with calling_libraries(problem, remedy), redirect_stdout(io.StringIO()), _errors_only():
        quantized: onnx.ModelProto = nncf.quantize(
            model,
            nncf.Dataset(list(texts)),
            preset=nncf.QuantizationPreset.MIXED,
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(texts),
        )
    return quantized
