"""Add pooling, normalization and a classification head to a converted ONNX graph."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from emberpc.export.errors import ExportError
from emberpc.export.source.encoder import Dense

#: Prefix of the names of the nodes that an export adds to a converted graph. By the prefix, the code that makes a
#: variant leaves these nodes out: it optimizes and quantizes only the nodes of the encoder.
ADDED = "emberpc_"
#: Minimum divisor of a mean over tokens, so that an empty mask does not divide by 0; sentence-transformers uses the
#: same value.
_MIN_TOKENS = 1e-9
#: Minimum length that a vector is divided by, so that a zero vector does not divide by 0; torch uses the same value.
_MIN_NORM = 1e-12
#: Maximum number of bytes of a graph that is written as one file: protobuf allows less than 2 GiB, and 16 MiB are a
#: reserve.
_MAX_BYTES = 2**31 - 2**24


Matrix = npt.NDArray[np.float32]


class GraphEditor:
    """Loads an ONNX graph and changes it in memory; the file does not change. `save` writes the changed graph.

    Args:
        path: ONNX file of a converted encoder. The graph must have the output `last_hidden_state`.
    """

    def __init__(self, path: Path) -> None:
        self.model = onnx.load(str(path))
        self._constant("axis_1", np.array([1], dtype=np.int64))
        self._constant("axis_1_scalar", np.array(1, dtype=np.int64))
        self._constant("axis_last", np.array([-1], dtype=np.int64))

    @property
    def hidden_size(self) -> int:
        """Dimensions of a token's vector.

        This number is read from the graph, since config.json files use several names for it.
        """
        output = next(output for output in self.model.graph.output if output.name == "last_hidden_state")
        return int(output.type.tensor_type.shape.dim[2].dim_value)

    def pool(self, pooling: str, dense: Sequence[Dense], *, normalize: bool) -> int:
        """Add the output `sentence_embedding`, float32 (texts, dimensions), as sentence-transformers computes it.

        Call this method once.

        Args:
            pooling: `mean`, `cls`, `max` or `lasttoken`.
            dense: layers behind the pooling, in the order of computation.
            normalize: whether to scale vectors to length 1 at the end; zero vectors stay zero.

        Returns:
            The number of dimensions of the output.
        """
        poolings = {"mean": self._mean, "cls": self._cls, "max": self._max, "lasttoken": self._last}
        pooled = poolings[pooling]()
        dimensions = self.hidden_size
        for i, layer in enumerate(dense):
            self._constant(f"dense_{i}_weights", layer.weights)
            self._constant(f"dense_{i}_bias", layer.bias)
            pooled = self._node("Gemm", [pooled, f"dense_{i}_weights", f"dense_{i}_bias"])
            pooled = self._node(layer.activation, [pooled]) if layer.activation else pooled
            dimensions = len(layer.bias)
        if normalize:
            pooled = self._unit(pooled)
        self._output("sentence_embedding", pooled, dimensions)
        return dimensions

    def classify(self, weights: Matrix, bias: Matrix, temperature: float, *, multi_label: bool) -> None:
        """Add a linear head. New nodes scale the vectors of `sentence_embedding` to length 1 before the head.

        Call `pool` before, and this method once. Afterwards, the graph's outputs are, in this order, `logits`, float32
        (texts, labels), `sentence_embedding`, float32 (texts, dimensions) and not changed, and `probabilities`, float32
        (texts, labels). The output `last_hidden_state` is removed.

        Args:
            weights: float32 (dimensions, labels).
            bias: float32 (labels,).
            temperature: number above 0 that divides the logits before they become probabilities.
            multi_label: whether each label has its own probability (sigmoid); otherwise a text's probabilities add up
                to 1 (softmax).
        """
        self._constant("head_weights", weights)
        self._constant("head_bias", bias)
        self._constant("temperature", np.array(temperature, dtype=np.float32))
        unit = self._unit("sentence_embedding")
        logits = self._node("Gemm", [unit, "head_weights", "head_bias"])
        self._output("logits", logits, weights.shape[1])
        scaled = self._node("Div", [logits, "temperature"])
        found = self._node("Sigmoid", [scaled]) if multi_label else self._node("Softmax", [scaled], axis=1)
        self._output("probabilities", found, weights.shape[1])
        outputs = {output.name: output for output in self.model.graph.output}
        del self.model.graph.output[:]
        self.model.graph.output.extend(outputs[name] for name in ("logits", "sentence_embedding", "probabilities"))

    def save(self, path: Path) -> None:
        """Write the graph to an ONNX file, and check the file; see `save_model`.

        Raises:
            OSError: a file cannot be written.
            onnx.checker.ValidationError: the graph is not valid; the written file is not deleted.
        """
        save_model(self.model, path)

    def _mean(self) -> str:
        mask = self._node("Cast", ["attention_mask"], to=TensorProto.FLOAT)
        masked = self._node("Mul", ["last_hidden_state", self._node("Unsqueeze", [mask, "axis_last"])])
        total = self._node("ReduceSum", [masked, "axis_1"], keepdims=0)
        count = self._node("ReduceSum", [mask, "axis_1"], keepdims=1)
        return self._node("Div", [total, self._at_least(count, _MIN_TOKENS)])

    def _cls(self) -> str:
        self._constant("first", np.array(0, dtype=np.int64))
        return self._node("Gather", ["last_hidden_state", "first"], axis=1)

    def _max(self) -> str:
        self._constant("lowest", np.array(-1e9, dtype=np.float32))
        present = self._node("Cast", ["attention_mask"], to=TensorProto.BOOL)
        masked = self._node("Where", [self._node("Unsqueeze", [present, "axis_last"]), "last_hidden_state", "lowest"])
        return self._node("ReduceMax", [masked, "axis_1"], keepdims=0)

    def _last(self) -> str:
        """Add nodes that take the vector of each text's last token; return the name of their output.

        The last token is where the running count of tokens reaches the text's number of tokens.
        """
        counted = self._node("CumSum", ["attention_mask", "axis_1_scalar"])
        count = self._node("ReduceSum", ["attention_mask", "axis_1"], keepdims=1)
        here = self._node("Cast", [self._node("Equal", [counted, count])], to=TensorProto.FLOAT)
        # The running count stays the same in the padding behind the last token, so the mask removes the padding.
        here = self._node("Mul", [here, self._node("Cast", ["attention_mask"], to=TensorProto.FLOAT)])
        chosen = self._node("Mul", ["last_hidden_state", self._node("Unsqueeze", [here, "axis_last"])])
        return self._node("ReduceSum", [chosen, "axis_1"], keepdims=0)

    def _unit(self, vectors: str) -> str:
        """Add nodes that scale vectors to length 1, and return the name of the result; zero vectors stay zero.

        `vectors` is the name of a value in the graph, float32 (texts, dimensions).
        """
        squares = self._node("Mul", [vectors, vectors])
        norm = self._node("Sqrt", [self._node("ReduceSum", [squares, "axis_1"], keepdims=1)])
        return self._node("Div", [vectors, self._at_least(norm, _MIN_NORM)])

    def _at_least(self, name: str, bound: float) -> str:
        constant = f"{name}_bound"
        self._constant(constant, np.array(bound, dtype=np.float32))
        return self._node("Max", [name, constant])

    def _constant(self, name: str, value: npt.NDArray[np.generic]) -> None:
        self.model.graph.initializer.append(numpy_helper.from_array(value, name))

    def _node(self, operator: str, inputs: list[str], **attributes: int) -> str:
        """Append a node with one output to the graph's list of nodes, and return the name of the output."""
        name = f"{ADDED}{operator.lower()}_{len(self.model.graph.node)}"
        self.model.graph.node.append(helper.make_node(operator, inputs, [name], name=name, **attributes))
        return name

    def _output(self, name: str, source: str, width: int) -> None:
        self.model.graph.node.append(helper.make_node("Identity", [source], [name], name=f"{ADDED}{name}"))
        shape: list[str | int | None] = [self.model.graph.input[0].type.tensor_type.shape.dim[0].dim_param, width]
        self.model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))


def save_model(model: onnx.ModelProto, path: Path) -> None:
    """Write a graph to an ONNX file, and check the file.

    If the graph is larger than `_MAX_BYTES`, its large weights go to a second file beside the ONNX file, with `_data`
    appended to its name.

    Args:
        model: the graph; it does not change.
        path: the ONNX file; an existing file is replaced, and missing folders are created.

    Raises:
        OSError: a file cannot be written.
        onnx.checker.ValidationError: the graph is not valid; the written file is not deleted.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    data = path.with_name(f"{path.name}_data")
    if model.ByteSize() <= _MAX_BYTES:
        onnx.save(model, str(path))
    else:
        data.unlink(missing_ok=True)  # onnx would append to an existing file
        copy = onnx.ModelProto()  # a copy, since saving moves the weights out of the object
        copy.CopyFrom(model)
        onnx.save(copy, str(path), save_as_external_data=True, location=data.name)
    onnx.checker.check_model(str(path))


def check_size(model: onnx.ModelProto) -> None:
    """Raise ExportError for a graph larger than `_MAX_BYTES`, which the quantizer and the optimizer do not support."""
    if model.ByteSize() > _MAX_BYTES:
        raise ExportError("the model is larger than 2 GiB; variants of such models are not supported yet")
