"""The one place that knows ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from emberpc.server.engine.tokenizing import TokenIds

Output = npt.NDArray[np.float32]

_INPUTS = {"input_ids", "attention_mask", "token_type_ids"}


class SessionError(Exception):
    """An ONNX file is not one that can be served; the message says why."""


class OnnxSession:
    """An ONNX model, run on token ids. Safe to run from several threads.

    Args:
        path: the ONNX file.
        output: the name of the one output to compute, of shape (texts, width).
        pad_token_id: what fills up the shorter texts of a batch.

    Raises:
        SessionError: the file does not load, or lacks what is asked of it.
    """

    def __init__(self, path: Path, output: str, pad_token_id: int) -> None:
        try:
            self._session = ort.InferenceSession(str(path), _options(), providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
            raise SessionError(f"{path} cannot be loaded by ONNX Runtime {ort.__version__}") from error
        self._inputs = {node.name for node in self._session.get_inputs()}
        if "input_ids" not in self._inputs or not self._inputs <= _INPUTS:
            raise SessionError(
                f"{path} has the inputs {', '.join(sorted(self._inputs))}; it must take input_ids, "
                "and may take attention_mask and token_type_ids"
            )
        outputs = {node.name: node.shape for node in self._session.get_outputs()}
        if output not in outputs:
            raise SessionError(f"{path} has the outputs {', '.join(outputs)}; it must have {output!r}")
        self._output = output
        self._pad_token_id = pad_token_id

    def run(self, batch: Sequence[TokenIds]) -> Output:
        """Run texts as one batch, padded to the longest.

        Args:
            batch: token ids of each text, at least one text.

        Returns:
            float32, shape (texts, width of the output).
        """
        longest = max(len(ids) for ids in batch)
        input_ids = np.full((len(batch), longest), self._pad_token_id, dtype=np.int64)
        mask = np.zeros((len(batch), longest), dtype=np.int64)
        for row, ids in enumerate(batch):
            input_ids[row, : len(ids)] = ids
            mask[row, : len(ids)] = 1
        feeds = {"input_ids": input_ids, "attention_mask": mask, "token_type_ids": np.zeros_like(mask)}
        outputs = self._session.run([self._output], {name: feeds[name] for name in self._inputs})
        return np.asarray(outputs[0], dtype=np.float32)


def _options() -> ort.SessionOptions:
    """One thread for each run and none spinning: the server's workers are the parallelism."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Both keep memory for every shape ever seen, and a server sees every shape.
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    options.log_severity_level = 3
    return options
