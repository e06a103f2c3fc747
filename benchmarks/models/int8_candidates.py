"""Compare methods to quantize a model to int8: build each candidate, and measure it against fp32.

BUNDLE is an embedding model written by `emberpc export embedding`. For each candidate, a method to quantize the model,
the table has:

- the mean and the minimum cosine of its vectors to those of fp32;
- the mean share of a text's 10 nearest texts that are also among its 10 nearest by fp32;
- texts per CPU-second as a multiple of fp32's: inference only, one thread, median over alternating rounds.

The texts that a method uses, for example to calibrate ranges, are not among those that are measured.

    python -m benchmarks.models.int8_candidates BUNDLE [--texts FILE] [--count 256] [--only NAME …]

FILE (CSV, TSV, JSONL or Parquet) has a column `text`. Without FILE, most of the texts are docstrings. `--help` lists
the names of the candidates.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from statistics import median
from time import process_time

import numpy as np
import onnx
import onnxruntime as ort
from onnx import NodeProto, TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType, quantize_dynamic
from onnxruntime.quantization.quantize import quantize_static
from rich.console import Console
from rich.table import Table

from emberpc.bundle import read_bundle, unit
from emberpc.bundle.agreement import neighbour_agreement
from emberpc.export.convert.onnx_runner import Matrix, OnnxRunner
from emberpc.export.convert.sessions import Feeds
from emberpc.export.data.datasets import read_texts
from emberpc.export.data.examples import evenly
from emberpc.export.data.stdlib_texts import sample_texts
from emberpc.export.variants.measurement import ROUNDS
from emberpc.export.variants.outliers import find_outliers
from emberpc.export.variants.surgery import products, split_outliers

#: Number of texts that `QuantizationMethod.make` gets; they are not measured.
LOOKED_AT = 64
#: Speed is measured on every fourth batch only, to save time.
TIMED_EVERY = 4
#: Number of tokens of each text for the calibration of static ranges; see `Texts`.
CUT_AT = 32
#: Name of the graph's output that has the embeddings.
OUTPUT = "sentence_embedding"


def dynamic(model: onnx.ModelProto, *, bits: int = 7, without: Sequence[NodeProto] = ()) -> onnx.ModelProto:
    """Return the model with int8 matrix products that choose the scale of their activations at run time.

    Each column of the weights has a scale of its own. All activations that a product reads for a batch share one scale.

    Args:
        model: the fp32 graph; it does not change.
        bits: bits of a weight: 7 or 8. With 7, products cannot saturate on processors without VNNI.
        without: matrix products that stay fp32.
    """
    left = {node.name for node in without}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        quantize_dynamic(
            model,
            path,
            op_types_to_quantize=["MatMul"],
            nodes_to_quantize=[node.name for node in products(model) if node.name not in left],
            per_channel=True,
            reduce_range=bits == 7,
            weight_type=QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True, "DefaultTensorType": TensorProto.FLOAT},
        )
        return onnx.load(str(path))


class Texts(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
    """Texts for a calibration: each call of `get_next` returns the model's inputs for one text, or None at the end.

    Only texts of at least `CUT_AT` tokens are returned, truncated to `CUT_AT` tokens. All inputs must have the same
    shape, because the calibration stacks the outputs.

    Args:
        feeds: texts, each as the inputs of a batch of its own.
    """

    def __init__(self, feeds: Sequence[Feeds]) -> None:
        long = [one for one in feeds if all(values.shape[1] >= CUT_AT for values in one.values())]
        self._feeds = iter([{name: values[:, :CUT_AT] for name, values in one.items()} for one in long])

    def get_next(self) -> Feeds | None:
        return next(self._feeds, None)


def static(model: onnx.ModelProto, feeds: Sequence[Feeds], percentile: float | None) -> onnx.ModelProto:
    """Return the model with int8 matrix products whose inputs and outputs have fixed ranges, calibrated on texts.

    Args:
        model: the fp32 graph; it cannot be used afterwards, since weights are moved from it to a temporary file.
        feeds: texts for the calibration, each as the inputs of a batch of its own; `Texts` leaves out short ones.
        percentile: percentile (0 to 100) of the magnitudes of the activations, at which the range ends on both sides of
            0; None: the range goes from the smallest to the greatest activation.

    Raises:
        ValueError: no text has at least `CUT_AT` tokens.
    """
    method = CalibrationMethod.MinMax if percentile is None else CalibrationMethod.Percentile
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):  # it prints its progress
        path = Path(folder) / "model.onnx"
        quantize_static(
            model,
            path,
            Texts(feeds),
            op_types_to_quantize=["MatMul"],
            nodes_to_quantize=[node.name for node in products(model)],
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=method,
            extra_options={} if percentile is None else {"CalibPercentile": percentile},
        )
        return onnx.load(str(path))


def second(model: onnx.ModelProto) -> list[NodeProto]:
    """Return the matrix products whose weights have more rows than columns.

    In a transformer encoder, this is the second product of each feed-forward block.
    """
    dims = {tensor.name: tensor.dims for tensor in model.graph.initializer}
    return [node for node in products(model) if dims[node.input[1]][0] > dims[node.input[1]][1]]


def clip_weights(model: onnx.ModelProto, percentile: float) -> None:
    """Clip the weights of the matrix products, in place: each column at a percentile (0 to 100) of its magnitudes."""
    wanted = {node.input[1] for node in products(model)}
    for tensor in model.graph.initializer:
        if tensor.name in wanted:
            weights = numpy_helper.to_array(tensor)
            maximum = np.percentile(np.abs(weights), percentile, axis=0, keepdims=True).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(np.clip(weights, -maximum, maximum), tensor.name))


def smooth(model: onnx.ModelProto, feeds: Sequence[Feeds], nodes: Sequence[NodeProto], alpha: float = 0.5) -> None:
    """Divide activations and multiply weights by the same scales, to even out the activations, as in SmoothQuant.

    The graph is changed in place. Its outputs stay the same, except for rounding: x @ W = (x / s) @ (s W), with a scale
    s for each column of x. Products with the same x share the scales. A scale is peak^alpha / weight^(1 - alpha), where
    peak and weight are the greatest magnitudes of the column's activations and of the weights that are multiplied by
    them; it is at least 0.001.

    Args:
        model: the fp32 graph.
        feeds: texts to measure the activations with, each as the inputs of a batch of its own.
        nodes: the matrix products to change.
        alpha: the exponent, in [0, 1]. With 1, all columns of activations get the same peak.
    """
    names = list(dict.fromkeys(node.input[0] for node in nodes))
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    watched.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    session = session_of(watched)
    found = [session.run(names, one) for one in feeds]
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for number, (name, values) in enumerate(zip(names, zip(*found, strict=True), strict=True)):
        peaks = np.max([np.abs(part).reshape(-1, part.shape[-1]).max(axis=0) for part in values], axis=0)
        own = [node for node in nodes if node.input[0] == name]
        weights = np.max([np.abs(numpy_helper.to_array(tensors[node.input[1]])).max(axis=1) for node in own], axis=0)
        scale = np.maximum(peaks**alpha / np.maximum(weights, 1e-6) ** (1 - alpha), 1e-3).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(1 / scale, f"smooth_{number}"))
        place = min(list(model.graph.node).index(node) for node in own)
        smoothed = helper.make_node("Mul", [name, f"smooth_{number}"], [f"smoothed_{number}"], name=f"smooth_{number}")
        for node in own:
            tensor = tensors[node.input[1]]
            tensor.CopyFrom(numpy_helper.from_array(scale[:, None] * numpy_helper.to_array(tensor), tensor.name))
            node.input[0] = f"smoothed_{number}"
        model.graph.node.insert(place, smoothed)


@dataclass(frozen=True)
class QuantizationMethod:
    """A method to quantize a model.

    Attributes:
        name: the name in the table and for `--only`.
        make: returns the int8 graph. Its arguments are the fp32 graph, which it may change, and texts for calibration,
            each as the inputs of a batch of its own.
        exact: passed to `session_of`.
    """

    name: str
    make: Callable[[onnx.ModelProto, Sequence[Feeds]], onnx.ModelProto]
    exact: bool = False


def _clipped(percentile: float) -> Callable[[onnx.ModelProto, Sequence[Feeds]], onnx.ModelProto]:
    def make(model: onnx.ModelProto, _feeds: Sequence[Feeds]) -> onnx.ModelProto:
        clip_weights(model, percentile)
        return dynamic(model)

    return make


def _apart(model: onnx.ModelProto, feeds: Sequence[Feeds]) -> onnx.ModelProto:
    split_outliers(model, find_outliers(model, feeds))
    return dynamic(model)


def _smoothed(choose: Callable[[onnx.ModelProto], list[NodeProto]]) -> Callable[..., onnx.ModelProto]:
    def make(model: onnx.ModelProto, feeds: Sequence[Feeds]) -> onnx.ModelProto:
        smooth(model, feeds, choose(model))
        return dynamic(model)

    return make


CANDIDATES = (
    QuantizationMethod("8-bit", lambda model, _: dynamic(model, bits=8)),
    QuantizationMethod("8-bit-exact", lambda model, _: dynamic(model, bits=8), exact=True),
    QuantizationMethod("7-bit", lambda model, _: dynamic(model)),
    QuantizationMethod("7-bit-second-fp32", lambda model, _: dynamic(model, without=second(model))),
    QuantizationMethod("7-bit-outliers-apart", _apart),
    QuantizationMethod("7-bit-smooth-second", _smoothed(second)),
    QuantizationMethod("7-bit-smooth-all", _smoothed(products)),
    QuantizationMethod("7-bit-weights-99.9", _clipped(99.9)),
    QuantizationMethod("7-bit-weights-99", _clipped(99.0)),
    QuantizationMethod("static-minmax", lambda model, feeds: static(model, feeds, None)),
    QuantizationMethod("static-99.999", lambda model, feeds: static(model, feeds, 99.999)),
    QuantizationMethod("static-99.99", lambda model, feeds: static(model, feeds, 99.99)),
    QuantizationMethod("static-99.9", lambda model, feeds: static(model, feeds, 99.9)),
)


def session_of(model: onnx.ModelProto, *, exact: bool = False) -> ort.InferenceSession:
    """Load a graph into an inference session with one thread.

    Args:
        model: the graph.
        exact: whether to use slower kernels for 8-bit products, whose sums cannot saturate on processors without VNNI
            either.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if exact:
        options.add_session_config_entry("session.x64quantprecision", "1")
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def embed(session: ort.InferenceSession, batches: Sequence[Feeds]) -> Matrix:
    return np.concatenate([session.run([OUTPUT], batch)[0] for batch in batches])


def speedup(fp32: ort.InferenceSession, own: ort.InferenceSession, batches: Sequence[Feeds]) -> float:
    def seconds(session: ort.InferenceSession) -> float:
        start = process_time()
        embed(session, batches)
        return process_time() - start

    seconds(fp32), seconds(own)
    return median(seconds(fp32) / seconds(own) for _ in range(ROUNDS))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--texts", type=Path, help="a file with a column `text` (default: docstrings)")
    parser.add_argument("--count", type=int, default=256, help="texts to measure on (default: %(default)s)")
    names = [candidate.name for candidate in CANDIDATES]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help="; ".join(names))
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)  # the quantizers log advice on every call
    manifest = read_bundle(arguments.bundle).manifest
    path = arguments.bundle / manifest.variant().path
    maximum = arguments.count + LOOKED_AT
    texts = list(dict.fromkeys(read_texts(arguments.texts))) if arguments.texts else sample_texts(maximum)
    texts = [manifest.prompts.passage + texts[row] for row in evenly(len(texts), maximum)]
    looked_at = [texts[row] for row in evenly(len(texts), LOOKED_AT)]
    measured_on = [text for text in texts if text not in set(looked_at)]
    runner = OnnxRunner(
        path, arguments.bundle / "tokenizer.json", manifest.max_tokens, manifest.pad_token_id, threads=1
    )
    batches = runner.prepare(measured_on)
    feeds = [batch for text in looked_at for batch in runner.prepare([text])]
    fp32 = session_of(onnx.load(str(path)))
    expected = embed(fp32, batches)
    table = Table("candidate", "mean cosine", "minimum cosine", "same 10 nearest", "times fp32")
    for candidate in CANDIDATES:
        if candidate.name not in arguments.only:
            continue
        session = session_of(candidate.make(onnx.load(str(path)), feeds), exact=candidate.exact)
        got = embed(session, batches)
        cosines = (unit(got) * unit(expected)).sum(axis=1)
        agreement = neighbour_agreement(expected, got)
        cells = [f"{cosines.mean():.4f}", f"{cosines.min():.4f}", f"{agreement:.3f}"]
        cells.append(f"{speedup(fp32, session, batches[::TIMED_EVERY]):.2f}")
        Console(stderr=True).print(candidate.name, *cells)
        table.add_row(candidate.name, *cells)
    print(f"{len(measured_on)} texts, ONNX Runtime {ort.__version__}")
    Console(width=100).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
