"""Run the ONNX file of a bundle or a foreign folder on texts: with ONNX Runtime or OpenVINO, and without PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from emberpc.bundle import BundleError, Interface, find_inputs
from emberpc.export.convert.sessions import Feeds, open_session
from emberpc.export.errors import ExportError
from emberpc.export.progress import Progress, no_progress
from emberpc.export.threads import Check, run_in_threads, usable_threads

#: Default number of texts of a batch. Small batches of texts of similar length are the fastest on a CPU.
_BATCH = 16
#: Maximum number of batches that run at a time, since each needs memory. Each batch runs on one thread: on two cores,
#: two batches at a time took 5 to 20 % less CPU time than one batch at a time on two threads (docs/decisions/0023).
_MAX_AT_ONCE = 16

Matrix = npt.NDArray[np.float32]


class OnnxRunner:
    """An ONNX encoder or classifier with its tokenizer.

    Args:
        model: the ONNX file.
        tokenizer: `tokenizer.json` of the model.
        max_tokens: maximum number of tokens of a text, special tokens included; longer texts are truncated at their
            end.
        pad_token_id: token id that fills up the shorter texts of a batch.
        threads: maximum number of batches that `run` runs at a time, each on one thread, but at most 16 and at most as
            many as threads are usable; 0: no further limit.
        interface: how to call the graph of a foreign folder, and how to turn its output into a vector, or logits, for
            each text. None: the graph is that of a bundle, whose outputs need no change.
        engine: the library that runs the model, `onnxruntime` or `openvino`; empty: ONNX Runtime.

    Raises:
        ExportError: a file cannot be loaded; the engine is not installed; or without `interface`, the graph has inputs
            other than those of a text encoder.
    """

    def __init__(
        self,
        model: Path,
        tokenizer: Path,
        max_tokens: int,
        pad_token_id: int,
        *,
        threads: int = 0,
        interface: Interface | None = None,
        engine: str = "",
    ) -> None:
        self._at_once = min(threads or usable_threads(), _MAX_AT_ONCE)
        try:
            self._session = open_session(model, engine, self._at_once)
            self._tokenizer = Tokenizer.from_file(str(tokenizer))
            self._tokenizer.enable_truncation(max_tokens)
            self._tokenizer.enable_padding(pad_id=pad_token_id)
        except ExportError:
            raise
        except Exception as error:  # the engines and tokenizers have no common base class of their exceptions
            raise ExportError(
                f"{model} cannot be loaded with {tokenizer.name} and {max_tokens} tokens ({type(error).__name__}); "
                "export the model again"
            ) from error
        #: Names of the graph's outputs, in the graph's order.
        self.outputs = [output.name for output in self._session.graph.outputs]
        self._interface = interface
        try:
            self._inputs = interface.inputs if interface else find_inputs(self._session.graph)
        except BundleError as error:
            raise ExportError(f"{model}: {error}; export it again") from error

    def run(
        self, texts: Sequence[str], output: str, *, batch_size: int = _BATCH, progress: Progress = no_progress
    ) -> Matrix:
        """Run the model on texts in batches, and return one of its outputs.

        Args:
            texts: at least one text, with its prompt if it needs one.
            output: name of the output, such as `sentence_embedding` or `logits`.
            batch_size: maximum number of texts of a batch; a batch has texts of similar numbers of characters.
            progress: called after each batch and every 0.1 s, with the step `embedding` and the number of texts done.
                An exception that it raises stops the run, and is raised.

        Returns:
            float32 (texts, dimensions or labels), in the order of `texts`.

        Raises:
            ExportError: the model cannot be run, or its output cannot be used.
        """
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]

        def task(batch: Sequence[int], _check: Check) -> Matrix:
            return self._batch([texts[i] for i in batch], output)

        found = np.concatenate(
            run_in_threads(
                [partial(task, batch) for batch in batches],
                lambda done: progress("embedding", min(done * batch_size, len(texts)), len(texts)),
                maximum=self._at_once,
            )
        )
        rows = np.empty_like(found)
        rows[order] = found
        return rows

    def prepare(self, texts: Sequence[str]) -> list[Feeds]:
        """Tokenize texts, and return inputs for `infer`: batches of at most 16 texts, not in the order of `texts`.

        The texts are sorted by their numbers of characters, the shortest first.
        """
        ordered = sorted(texts, key=len)
        return [self._feeds(ordered[start : start + _BATCH]) for start in range(0, len(ordered), _BATCH)]

    def _batch(self, texts: Sequence[str], output: str) -> Matrix:
        return self.infer(self._feeds(texts), output)

    def _feeds(self, texts: Sequence[str]) -> Feeds:
        encodings = self._tokenizer.encode_batch(list(texts))
        ids = np.array([encoding.ids for encoding in encodings], dtype=np.int64)
        mask = np.array([encoding.attention_mask for encoding in encodings], dtype=np.int64)
        return self._inputs.feeds(ids, mask)

    def infer(self, feeds: Feeds, output: str) -> Matrix:
        """Run the model on one batch, and return one of its outputs, float32 (texts, dimensions or labels).

        Args:
            feeds: a batch from `prepare`.
            output: name of the output, such as `sentence_embedding` or `logits`.

        Raises:
            ExportError: the model cannot be run, or its output cannot be used.
        """
        try:
            found = self._session.run(feeds, output)
            if self._interface is not None:
                ids = feeds[self._inputs.input_ids]
                return self._interface.finish(found, feeds.get(self._inputs.attention_mask, np.ones_like(ids)))
        except BundleError as error:
            raise ExportError(str(error)) from error
        except Exception as error:  # the engines have no common base class of their exceptions
            rows, width = feeds[self._inputs.input_ids].shape
            raise ExportError(
                f"the ONNX model does not run on {rows} texts of {width} tokens; export it again"
            ) from error
        return np.asarray(found, dtype=np.float32)
