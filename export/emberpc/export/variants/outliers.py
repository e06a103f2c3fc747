"""Find outliers: columns of a matrix product's input that are far larger than the others and cost int8 precision."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from emberpc.export.convert.sessions import Feeds
from emberpc.export.errors import ExportError
from emberpc.export.threads import session_options, usable_threads
from emberpc.export.variants.surgery import Columns, Weights, products

#: Number of columns that are split from an input of a matrix product. On all-MiniLM-L6-v2, nearly all outliers of an
#: input are in at most 8 columns.
COLUMNS = 8
#: Columns are split from an input only if the range of its other columns is smaller by at least this factor, since the
#: split takes time at each run.
_NARROWER = 3.0


def find_outliers(model: onnx.ModelProto, texts: Sequence[Feeds]) -> dict[str, Columns]:
    """Find the inputs of matrix products whose greatest magnitude falls to a third or less without outlier columns.

    The outlier columns of an input are the 8 columns with the greatest magnitudes in all texts. In int8, the
    activations of a batch have a single scale. If one column has values from -28 to 28, and all others have values from
    -4 to 4, the other columns use only a seventh of the int8 steps.

    Args:
        model: a bundle's graph.
        texts: inputs to run the graph on, each a batch of one text, since the activations of larger batches take much
            memory.

    Returns:
        By the name of the input: the indexes of its outlier columns, int64 (`COLUMNS`,), ascending. Inputs with at most
        32 columns are left out.

    Raises:
        ExportError: the graph cannot be run.
    """
    found = {}
    for name, peaks in _peaks(model, texts).items():
        order = np.argsort(-peaks)
        if len(peaks) > 4 * COLUMNS and peaks[order[0]] >= _NARROWER * peaks[order[COLUMNS]]:
            found[name] = np.sort(order[:COLUMNS]).astype(np.int64)
    return found


def _peaks(model: onnx.ModelProto, texts: Sequence[Feeds]) -> dict[str, Weights]:
    """Return the largest magnitude of each column of the inputs of the encoder's matrix products, over all texts.

    Returns:
        float32 (columns,), by the name of the input.

    Raises:
        ExportError: the graph cannot be run.
    """
    names = list(dict.fromkeys(node.input[0] for node in products(model)))
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    watched.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    options = session_options(usable_threads())
    try:
        session = ort.InferenceSession(watched.SerializeToString(), options, providers=["CPUExecutionProvider"])
        peaks: dict[str, Weights] = {}
        for feeds in texts:
            for name, values in zip(names, session.run(names, feeds), strict=True):
                own = np.abs(values).reshape(-1, values.shape[-1]).max(axis=0)
                peaks[name] = np.maximum(peaks.get(name, own), own)
    except Exception as error:  # ONNX Runtime has no common base class of its exceptions
        raise ExportError("its activations cannot be computed; leave this variant out") from error
    return peaks
