"""Files with weights are found in the ONNX file itself, and a digest covers all that decides an output."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from emberpc.bundle import BundleError
from emberpc.bundle.onnx_file import external_files, output_digest

Change = Callable[[onnx.ModelProto], None]
MODEL = "onnx/model.onnx"


def graph(names: str = "") -> onnx.ModelProto:
    """Return a small graph with two weights and a constant; `names` is added to the names of its values."""
    x, w, b, c, y = (f"{name}{names}" for name in "xwbcy")
    constant = numpy_helper.from_array(np.array([2.0], dtype=np.float32))
    nodes = [
        helper.make_node("Constant", [], [c], value=constant),
        helper.make_node("MatMul", ["in", w], [x]),
        helper.make_node("Add", [x, b], [y]),
        helper.make_node("Mul", [y, c], ["out"]),
    ]
    weights = [
        numpy_helper.from_array(np.arange(16, dtype=np.float32).reshape(4, 4), w),
        numpy_helper.from_array(np.ones(4, dtype=np.float32), b),
    ]
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, 4]) for name in ("in", "out")]
    made = helper.make_graph(nodes, "g", value[:1], value[1:], weights)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def saved(folder: Path, model: onnx.ModelProto, location: str = "") -> Path:
    """Write a graph; unless `location` is empty, its weights go into a file of that name."""
    (folder / "onnx").mkdir(parents=True)
    external = {"save_as_external_data": True, "location": location, "size_threshold": 0} if location else {}
    onnx.save(model, str(folder / MODEL), **external)
    return folder


def digest(folder: Path) -> str:
    return output_digest(folder, MODEL, "out")


@pytest.mark.parametrize("location", ["model.onnx.data", "model.onnx_data", "weights.bin"])
def test_the_digest_covers_weights_inside_and_outside_the_onnx_file(tmp_path: Path, location: str) -> None:
    inside = saved(tmp_path / "inside", graph())
    beside = saved(tmp_path / "beside", graph(), location)
    assert external_files(inside, MODEL) == ()
    assert external_files(beside, MODEL) == (f"onnx/{location}",)
    assert digest(inside) == digest(beside)
    path = beside / "onnx" / location
    path.write_bytes(path.read_bytes()[::-1])
    assert digest(inside) != digest(beside)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(BundleError, match="is shorter than the ONNX file says"):
        digest(beside)
    path.unlink()
    with pytest.raises(BundleError, match="is missing, which holds weights"):
        digest(beside)


def another_operator(model: onnx.ModelProto) -> None:
    model.graph.node[2].op_type = "Sub"


def another_order(model: onnx.ModelProto) -> None:
    model.graph.node[2].input[:] = reversed(model.graph.node[2].input)


def another_weight(model: onnx.ModelProto) -> None:
    model.graph.initializer[1].CopyFrom(numpy_helper.from_array(np.zeros(4, dtype=np.float32), "b"))


def another_shape(model: onnx.ModelProto) -> None:
    model.graph.initializer[1].dims[:] = [1, 4]


def another_constant(model: onnx.ModelProto) -> None:
    model.graph.node[0].attribute[0].t.raw_data = np.array([3.0], dtype=np.float32).tobytes()


def another_opset(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 18


@pytest.mark.parametrize(
    "change", [another_operator, another_order, another_weight, another_shape, another_constant, another_opset]
)
def test_every_change_that_affects_the_output_changes_its_digest(tmp_path: Path, change: Change) -> None:
    model = graph()
    change(model)
    assert digest(saved(tmp_path / "changed", model)) != digest(saved(tmp_path / "as it was", graph()))


def test_the_digest_covers_numbers_that_are_not_packed(tmp_path: Path) -> None:
    found = set()
    for i, last in enumerate((1.0, 2.0)):
        model = graph()
        weight = model.graph.initializer[1]
        weight.ClearField("raw_data")
        fields = b"".join(b"\x25" + struct.pack("<f", number) for number in (1.0, 1.0, 1.0, last))
        weight.doc_string = "x" * (len(fields) - 2)
        placeholder = b"\x62" + bytes([len(weight.doc_string)]) + weight.doc_string.encode()
        data = model.SerializeToString()
        assert data.count(placeholder) == 1
        folder = saved(tmp_path / str(i), model)
        (folder / MODEL).write_bytes(data.replace(placeholder, fields))
        assert list(onnx.load(folder / MODEL).graph.initializer[1].float_data) == [1.0, 1.0, 1.0, last]
        found.add(digest(folder))
    assert len(found) == 2


def a_head(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Neg", ["out"], ["logits"]))
    model.graph.output.append(helper.make_tensor_value_info("logits", TensorProto.FLOAT, [None, 4]))


def documentation(model: onnx.ModelProto) -> None:
    model.producer_name = model.graph.name = model.graph.node[1].name = model.graph.node[1].doc_string = "other"


@pytest.mark.parametrize("change", [a_head, documentation])
def test_changes_that_do_not_affect_the_output_keep_its_digest(tmp_path: Path, change: Change) -> None:
    model = graph("_of_another_tool")
    change(model)
    assert digest(saved(tmp_path / "changed", model)) == digest(saved(tmp_path / "as it was", graph()))


def a_branch(model: onnx.ModelProto) -> None:
    """Add a subgraph. The digest does not search a subgraph for the parts that an output needs."""
    inner = helper.make_graph(
        [helper.make_node("Identity", ["out"], ["inner"])],
        "g",
        [],
        [helper.make_tensor_value_info("inner", TensorProto.FLOAT, [None, 4])],
    )
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    model.graph.node.append(helper.make_node("If", ["yes"], ["chosen"], then_branch=inner, else_branch=inner))
    model.graph.output.append(helper.make_tensor_value_info("chosen", TensorProto.FLOAT, [None, 4]))


def test_the_digest_covers_all_bytes_of_a_graph_with_a_subgraph(tmp_path: Path) -> None:
    folders: list[Path] = []
    for name in ("first", "second"):
        model = graph()
        a_branch(model)
        if folders:
            documentation(model)
        folders.append(saved(tmp_path / name, model, "w"))
    first, second = folders
    assert digest(first) == digest(second)
    before = output_digest(first, MODEL, "chosen")
    assert before != output_digest(second, MODEL, "chosen")
    (first / "onnx" / "w").write_bytes((first / "onnx" / "w").read_bytes() + b"x")
    assert output_digest(first, MODEL, "chosen") != before


@pytest.mark.parametrize("location", ["../w", "/etc/passwd", "a/../../../w", "a\\w", "*/_ORT_MEM_ADDR_/*", ""])
def test_weights_outside_the_folder_are_refused(tmp_path: Path, location: str) -> None:
    model = graph()
    folder = saved(tmp_path / "model", model, "w")
    (tmp_path / "w").write_bytes(b"x" * 100)
    model = onnx.load(str(folder / MODEL), load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = location
    (folder / MODEL).write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match=r"leads out of the model's folder|is missing"):
        external_files(folder, MODEL)


def test_a_link_to_weights_outside_the_folder_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", graph(), "w")
    (folder / "onnx" / "w").rename(tmp_path / "w")
    (folder / "onnx" / "w").symlink_to(tmp_path / "w")
    with pytest.raises(BundleError, match="leads out of the model's folder"):
        external_files(folder, MODEL)


@given(cut=st.integers(0, 2000), place=st.integers(0, 2000), byte=st.integers(0, 255))
def test_a_damaged_file_has_a_digest_or_is_refused_with_a_bundle_error(
    cut: int, place: int, byte: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "onnx").mkdir()
    whole = bytearray(graph().SerializeToString())
    whole[place % len(whole)] = byte
    (folder / MODEL).write_bytes(whole[: len(whole) - cut % len(whole)])
    try:
        found = digest(folder)
    except BundleError as error:
        assert MODEL in str(error)
    else:
        assert len(found) == 64
