"""Where a product's input has columns far larger than the rest, which would cost int8 most of its precision."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from emberpc.export.errors import ExportError
from emberpc.export.runner import Feeds
from emberpc.export.variants.surgery import Columns, Weights, products

#: Columns that are taken out of an input: on all-MiniLM-L6-v2, 4 or 8 hold nearly all of what is far out.
COLUMNS = 8
#: Inputs are left whole unless what stays has so much smaller a range: taking columns out costs time.
_NARROWER = 3.0


def find_outliers(model: onnx.ModelProto, texts: Sequence[Feeds]) -> dict[str, Columns]:
    """Find the inputs of products that need a far smaller range without their few largest columns.

    Activations have one scale for a whole batch: a single column of 28 where all others stay below 4 leaves those
    with a seventh of the steps.

    Args:
        model: a bundle's graph.
        texts: what to run; each alone, for what is kept of each is large.

    Returns:
        By the name of an input, the indexes of its columns to compute apart, int64 (`COLUMNS`,), ascending.
    """
    found = {}
    for name, peaks in _peaks(model, texts).items():
        order = np.argsort(-peaks)
        if len(peaks) > 4 * COLUMNS and peaks[order[0]] >= _NARROWER * peaks[order[COLUMNS]]:
            found[name] = np.sort(order[:COLUMNS]).astype(np.int64)
    return found


def _peaks(model: onnx.ModelProto, texts: Sequence[Feeds]) -> dict[str, Weights]:
    """Return the largest magnitude of each column of each product's input."""
    names = list(dict.fromkeys(node.input[0] for node in products(model)))
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    watched.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = ort.InferenceSession(watched.SerializeToString(), options, providers=["CPUExecutionProvider"])
        peaks: dict[str, Weights] = {}
        for feeds in texts:
            for name, values in zip(names, session.run(names, feeds), strict=True):
                own = np.abs(values).reshape(-1, values.shape[-1]).max(axis=0)
                peaks[name] = np.maximum(peaks.get(name, own), own)
    except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
        raise ExportError("its activations cannot be looked at; leave this variant out") from error
    return peaks
