"""Make a variant's graph from that of fp32: split outliers, int8 products and tables, fp16 storage."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from emberpc.export.convert.graph import ADDED
from emberpc.export.errors import ExportError
from emberpc.export.libraries import calling_libraries

#: Minimum number of values of a tensor that `quantize_tables` and `store_as_fp16` store in fewer bits; smaller tensors
#: save hardly any bytes.
_WORTH_IT = 4096
_INT8_MAX = 127
_FP16_MAX = float(np.finfo(np.float16).max)
#: Prefix of the names of nodes that compute outliers separately; `products` leaves these nodes out.
_OUTLIERS = "outliers_"

Weights = npt.NDArray[np.float32]
Columns = npt.NDArray[np.int64]


def products(model: onnx.ModelProto) -> list[NodeProto]:
    """Return the encoder's MatMul nodes with a constant matrix as the second input, but not those of split outliers.

    Changes of a returned node change the graph.
    """
    matrices = {tensor.name for tensor in model.graph.initializer if len(tensor.dims) == 2}
    return [
        node
        for node in model.graph.node
        if node.op_type == "MatMul" and node.input[1] in matrices and not node.name.startswith((ADDED, _OUTLIERS))
    ]


def split_outliers(model: onnx.ModelProto, columns: Mapping[str, Columns]) -> None:
    """Change a graph in place so that it computes outlier columns of the inputs of matrix products separately in fp32.

    With outlier columns C, x @ W becomes (x with the columns C set to 0) @ W + (columns C of x) @ (rows C of W), which
    is equal in exact arithmetic. The split follows LLM.int8() (Dettmers et al. 2022, https://arxiv.org/abs/2208.07339),
    except that the columns are chosen once and not for each x.

    Args:
        model: a bundle's graph.
        columns: indexes of the outlier columns, int64 (columns,), by the name of a product's input. Inputs that are not
            named are not split.
    """
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    wanted: dict[str, list[NodeProto]] = {}
    for node in products(model):
        if node.input[0] in columns:
            wanted.setdefault(node.input[0], []).append(node)
    before: dict[str, list[NodeProto]] = {}
    after: dict[str, list[NodeProto]] = {}
    for number, (name, nodes) in enumerate(wanted.items()):
        rest, few, mask, indexes = (f"{_OUTLIERS}{number}_{part}" for part in ("rest", "few", "mask", "columns"))
        before[nodes[0].output[0]] = [
            helper.make_node("Mul", [name, mask], [rest], name=rest),
            helper.make_node("Gather", [name, indexes], [few], name=few, axis=-1),
        ]
        kept = np.ones(tensors[nodes[0].input[1]].dims[0], dtype=np.float32)
        kept[columns[name]] = 0
        model.graph.initializer.append(numpy_helper.from_array(kept, mask))
        model.graph.initializer.append(numpy_helper.from_array(columns[name], indexes))
        for i, node in enumerate(nodes):
            weights = numpy_helper.to_array(tensors[node.input[1]])
            rows, apart, most = (f"{few}_{i}_{part}" for part in ("weights", "product", "most"))
            model.graph.initializer.append(numpy_helper.from_array(weights[columns[name]], rows))
            output = node.output[0]
            node.input[0], node.output[0] = rest, most
            after[most] = [
                helper.make_node("MatMul", [few, rows], [apart], name=apart),
                helper.make_node("Add", [most, apart], [output], name=f"{apart}_sum"),
            ]
            before[most] = before.pop(output, [])
    ordered = []
    for node in model.graph.node:
        output = node.output[0]
        ordered += [*before.get(output, []), node, *after.get(output, [])]
    _set_nodes(model, ordered)


def quantize(model: onnx.ModelProto) -> None:
    """Change a graph in place so that the encoder's products with constant weights are computed in int8.

    Everything else stays fp32, also the products of split outliers. Weights are quantized now, with one scale for each
    column. Activations are quantized at run time. Weights are signed and have 7 bits. With 8 bits, processors without
    VNNI add two products in 16 bits, which may be too few, so vectors would depend on the processor
    (https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html, "U8S8").

    Args:
        model: a bundle's graph.

    Raises:
        ExportError: the encoder has no products with constant weights, or ONNX Runtime cannot quantize the graph.
        OSError: the disk is full.
    """
    names = [node.name for node in products(model)]
    if not names:
        raise ExportError("the graph has no matrix products with constant weights to quantize")
    with calling_libraries("ONNX Runtime cannot quantize the graph", "leave this variant out"):
        from onnxruntime.quantization import QuantType, quantize_dynamic

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "quantized.onnx"
            quantize_dynamic(
                model,
                path,
                op_types_to_quantize=["MatMul"],
                nodes_to_quantize=names,
                per_channel=True,
                reduce_range=True,
                weight_type=QuantType.QInt8,
                extra_options={"MatMulConstBOnly": True, "DefaultTensorType": TensorProto.FLOAT},
            )
            quantized = onnx.load(str(path))
    model.CopyFrom(quantized)


def quantize_tables(model: onnx.ModelProto) -> None:
    """Change a graph in place so that embedding tables are stored as int8 with one fp32 scale for each row.

    A lookup converts the rows that it reads to fp32. A table does not change if it has fewer than 4,096 values, or if
    more than one node uses it.
    """

    def stored(name: str, table: Weights) -> tuple[list[TensorProto], Callable[[NodeProto], list[NodeProto]]]:
        scales = np.maximum(np.abs(table).max(axis=1, keepdims=True), np.finfo(np.float32).tiny) / _INT8_MAX
        tensors = [
            numpy_helper.from_array(np.rint(table / scales).astype(np.int8), f"{name}_int8"),
            numpy_helper.from_array(scales.astype(np.float32), f"{name}_scales"),
        ]

        def look_up(node: NodeProto) -> list[NodeProto]:
            row, scale, real = (f"{node.output[0]}_{part}" for part in ("int8", "scale", "real"))
            return [
                helper.make_node("Gather", [f"{name}_int8", node.input[1]], [row], name=row),
                helper.make_node("Gather", [f"{name}_scales", node.input[1]], [scale], name=scale),
                helper.make_node("Cast", [row], [real], name=real, to=TensorProto.FLOAT),
                helper.make_node("Mul", [real, scale], [node.output[0]], name=f"{node.output[0]}_row"),
            ]

        return tensors, look_up

    _replace_tables(model, stored)


def store_as_fp16(model: onnx.ModelProto) -> None:
    """Change a graph in place so that weights are stored as fp16; all computation stays in fp32.

    In an embedding table that only one node uses, a lookup converts the rows that it reads to fp32; values beyond
    fp16's range become infinite. Other tensors are converted when ONNX Runtime loads the graph, since it folds a Cast
    of a constant; they do not change if a value is beyond fp16's range. No tensor with fewer than 4,096 values changes.
    """

    def stored(name: str, table: Weights) -> tuple[list[TensorProto], Callable[[NodeProto], list[NodeProto]]]:
        def look_up(node: NodeProto) -> list[NodeProto]:
            row = f"{node.output[0]}_fp16"
            return [
                helper.make_node("Gather", [f"{name}_fp16", node.input[1]], [row], name=row),
                helper.make_node("Cast", [row], [node.output[0]], name=f"{row}_cast", to=TensorProto.FLOAT),
            ]

        return [numpy_helper.from_array(table.astype(np.float16), f"{name}_fp16")], look_up

    _replace_tables(model, stored)
    casts = []
    for tensor in list(model.graph.initializer):
        if tensor.data_type != TensorProto.FLOAT or np.prod(tensor.dims) < _WORTH_IT:
            continue
        values = numpy_helper.to_array(tensor)
        if np.abs(values).max() > _FP16_MAX:
            continue
        name = f"{tensor.name}_fp16"
        casts.append(helper.make_node("Cast", [name], [tensor.name], name=f"{name}_cast", to=TensorProto.FLOAT))
        tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), name))
    _set_nodes(model, [*casts, *model.graph.node])


def _replace_tables(
    model: onnx.ModelProto,
    store: Callable[[str, Weights], tuple[list[TensorProto], Callable[[NodeProto], list[NodeProto]]]],
) -> None:
    """Change a graph in place: replace each table that only a single lookup of rows uses, and the lookup's node.

    A table is a float32 matrix with at least 4,096 values.

    Args:
        model: a bundle's graph.
        store: function of a table's name and values. It returns the tensors to store instead of the table, and a
            function of the lookup's node that returns the nodes to put in its place.
    """
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = []
    for node in model.graph.node:
        name = node.input[0] if node.op_type == "Gather" else ""
        table = tensors.get(name)
        uses = sum(list(other.input).count(name) for other in model.graph.node) if name else 0
        whole_rows = all(attribute.name != "axis" or attribute.i == 0 for attribute in node.attribute)
        if (
            table is None
            or uses != 1
            or not whole_rows
            or table.data_type != TensorProto.FLOAT
            or len(table.dims) != 2
            or table.dims[0] * table.dims[1] < _WORTH_IT
        ):
            nodes.append(node)
            continue
        stored, look_up = store(name, numpy_helper.to_array(table))
        nodes += look_up(node)
        model.graph.initializer.remove(table)
        model.graph.initializer.extend(stored)
    _set_nodes(model, nodes)


def _set_nodes(model: onnx.ModelProto, nodes: Sequence[NodeProto]) -> None:
    # Copy the nodes first: deleting nodes of the graph would empty those in `nodes`.
    copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)
