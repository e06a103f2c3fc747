"""What is added to a converted graph: pooling, normalisation, a classification head."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

#: What sentence-transformers and torch divide by where a mask or a vector is empty.
_MIN_TOKENS = 1e-9
_MIN_NORM = 1e-12
#: An ONNX file is one protobuf message, of 2 GiB at most; some room is left for what is not weights.
_MOST_BYTES = 2**31 - 2**24


class GraphEditor:
    """Adds nodes to the end of an ONNX graph.

    Args:
        path: the converted encoder.
    """

    def __init__(self, path: Path) -> None:
        self.model = onnx.load(str(path))
        self._constant("axis_1", np.array([1], dtype=np.int64))
        self._constant("axis_last", np.array([-1], dtype=np.int64))

    @property
    def hidden_size(self) -> int:
        """Size of a token's vector; not every config.json calls it by the same name."""
        output = next(output for output in self.model.graph.output if output.name == "last_hidden_state")
        return int(output.type.tensor_type.shape.dim[2].dim_value)

    def pool(self, pooling: str, dimensions: int, *, normalize: bool) -> None:
        """Add the output `sentence_embedding`, fp32 (texts, dimensions), as sentence-transformers computes it.

        Args:
            pooling: `mean`, `cls` or `max`.
            dimensions: size of a vector.
            normalize: whether to give vectors length 1.
        """
        pooled = {"mean": self._mean, "cls": self._cls, "max": self._max}[pooling]()
        if normalize:
            squares = self._node("Mul", [pooled, pooled])
            norm = self._node("Sqrt", [self._node("ReduceSum", [squares, "axis_1"], keepdims=1)])
            pooled = self._node("Div", [pooled, self._at_least(norm, _MIN_NORM)])
        self._output("sentence_embedding", pooled, dimensions)

    def classify(self, weights: npt.NDArray[np.float32], bias: npt.NDArray[np.float32]) -> None:
        """Put a linear head on `sentence_embedding`, and make the outputs `logits` and `sentence_embedding`.

        Args:
            weights: float32, shape (dimensions, labels).
            bias: float32, shape (labels,).
        """
        self._constant("head_weights", weights)
        self._constant("head_bias", bias)
        logits = self._node("Gemm", ["sentence_embedding", "head_weights", "head_bias"])
        self._output("logits", logits, weights.shape[1])
        outputs = {output.name: output for output in self.model.graph.output}
        del self.model.graph.output[:]
        self.model.graph.output.extend([outputs["logits"], outputs["sentence_embedding"]])

    def save(self, path: Path) -> None:
        """Write the graph and check it; weights that do not fit into the file go to `<name>_data` beside it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        data = path.with_name(f"{path.name}_data")
        if self.model.ByteSize() <= _MOST_BYTES:
            onnx.save(self.model, str(path))
        else:
            data.unlink(missing_ok=True)  # it would be appended to
            copy = onnx.ModelProto()  # which loses its weights to that file
            copy.CopyFrom(self.model)
            onnx.save(copy, str(path), save_as_external_data=True, location=data.name)
        onnx.checker.check_model(str(path))

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

    def _at_least(self, name: str, bound: float) -> str:
        constant = f"{name}_bound"
        self._constant(constant, np.array(bound, dtype=np.float32))
        return self._node("Max", [name, constant])

    def _constant(self, name: str, value: npt.NDArray[np.generic]) -> None:
        self.model.graph.initializer.append(numpy_helper.from_array(value, name))

    def _node(self, operator: str, inputs: list[str], **attributes: int) -> str:
        """Add a node; return the name of its one output."""
        name = f"emberpc_{operator.lower()}_{len(self.model.graph.node)}"
        self.model.graph.node.append(helper.make_node(operator, inputs, [name], name=name, **attributes))
        return name

    def _output(self, name: str, source: str, width: int) -> None:
        self.model.graph.node.append(helper.make_node("Identity", [source], [name], name=f"emberpc_{name}"))
        shape: list[str | int | None] = [self.model.graph.input[0].type.tensor_type.shape.dim[0].dim_param, width]
        self.model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
