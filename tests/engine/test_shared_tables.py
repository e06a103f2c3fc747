"""Large lookup tables of an ONNX file are found, correct, and shared by sessions without changed results."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from emberpc.bundle.contents import Contents
from emberpc.server.engine.sessions import shared_tables
from emberpc.server.engine.sessions.onnx_runtime import OnnxSession
from emberpc.server.engine.sessions.shared_tables import read_tables

WORDS = np.arange(300 * 8, dtype=np.float32).reshape(300, 8)


@pytest.fixture(autouse=True)
def every_table_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_tables, "_MIN_BYTES", 1024)


def graph(*extra: onnx.NodeProto, weights: np.ndarray = WORDS) -> onnx.ModelProto:
    """A model that looks up token ids in a table, and multiplies what it finds with a matrix."""
    square = numpy_helper.from_array(np.eye(8, dtype=np.float32).repeat(8, 0).reshape(8, 64)[:, :8], "square")
    nodes = [
        helper.make_node("Gather", ["words", "ids"], ["found"]),
        helper.make_node("MatMul", ["found", "square"], ["out"]),
        *extra,
    ]
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, [None])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, [None, 8])],
        [square, numpy_helper.from_array(weights, "words")],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def saved(model: onnx.ModelProto, path: Path) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


def test_a_table_that_is_used_only_for_lookups_is_found_and_copied(tmp_path: Path) -> None:
    path = saved(graph(), tmp_path / "model.onnx")
    found = read_tables(path, Contents())
    path.write_bytes(b"\0" * path.stat().st_size)
    assert list(found) == ["words"]
    np.testing.assert_array_equal(found["words"], WORDS)


def test_a_table_with_other_uses_is_left_to_the_session(tmp_path: Path) -> None:
    used_twice = helper.make_node("Transpose", ["words"], ["turned"])
    assert read_tables(saved(graph(used_twice), tmp_path / "model.onnx"), Contents()) == {}


@pytest.mark.parametrize("dtype", [np.float16, np.int8, np.uint8, np.float32])
def test_tables_of_every_precision_are_found(dtype: type, tmp_path: Path) -> None:
    weights: np.ndarray = (WORDS % 100).astype(dtype)
    found = read_tables(saved(graph(weights=weights), tmp_path / "model.onnx"), Contents())
    np.testing.assert_array_equal(found["words"], weights)
    assert found["words"].dtype == dtype


def test_tables_of_other_types_and_small_tables_are_left_out(tmp_path: Path) -> None:
    assert read_tables(saved(graph(weights=WORDS.astype(np.float64)), tmp_path / "double.onnx"), Contents()) == {}
    assert read_tables(saved(graph(weights=WORDS[:20]), tmp_path / "small.onnx"), Contents()) == {}


@given(cut=st.integers(0, 9000), place=st.integers(0, 9000), byte=st.integers(0, 255))
def test_a_damaged_onnx_file_raises_no_error_and_gives_no_empty_table(
    cut: int, place: int, byte: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    whole = bytearray(graph().SerializeToString())
    whole[place % len(whole)] = byte
    path = tmp_path_factory.mktemp("damaged") / "model.onnx"
    path.write_bytes(whole[:cut])
    assert all(table.size for table in read_tables(path, Contents()).values())


def test_a_missing_or_empty_onnx_file_has_no_tables(tmp_path: Path) -> None:
    assert read_tables(tmp_path / "none.onnx", Contents()) == {}
    (tmp_path / "empty.onnx").touch()
    assert read_tables(tmp_path / "empty.onnx", Contents()) == {}


@pytest.mark.parametrize("offset", [0, 64])
def test_tables_in_external_files_are_found_and_copied(offset: int, tmp_path: Path) -> None:
    model, path = graph(), tmp_path / "model.onnx"
    onnx.save(model, str(path), save_as_external_data=True, location="w", size_threshold=0)
    if offset:
        words = next(each for each in model.graph.initializer if each.name == "words")
        (tmp_path / "w").write_bytes(b"\0" * offset + WORDS.tobytes())
        del words.external_data[2:]
        place = {"location": "w", "offset": str(offset)}
        del words.external_data[:]
        words.external_data.extend(onnx.StringStringEntryProto(key=key, value=value) for key, value in place.items())
        path.write_bytes(model.SerializeToString())
    found = read_tables(path, Contents())
    (tmp_path / "w").write_bytes(b"")
    np.testing.assert_array_equal(found["words"], WORDS)


def test_sessions_of_one_model_share_tables(tmp_path: Path) -> None:
    session = OnnxSession(saved(graph(), tmp_path / "model.onnx"))
    other = session.with_threads(2)
    assert other._tables is session._tables
    ids = np.array([3, 299, 0])
    outputs = [each._session.run(None, {"ids": ids})[0] for each in (session, other)]
    np.testing.assert_array_equal(outputs[0], outputs[1])
    np.testing.assert_allclose(outputs[0], WORDS[ids] @ np.eye(8, dtype=np.float32).repeat(8, 0).reshape(8, 64)[:, :8])
