"""Compare the outputs of an ONNX file with those of PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from emberpc.bundle import Parity, cosines
from emberpc.bundle.limits import MAX_TOKENS
from emberpc.bundle.transformers_settings import read_json, read_positions, transformer_folder
from emberpc.export.convert.onnx_runner import Matrix
from emberpc.export.errors import ExportError

#: Minimum cosine between a text's outputs by an fp32 ONNX file and by PyTorch. The two compute the same operations in
#: another order, so only rounding may differ.
MIN_COSINE = 0.9999
#: Greatest absolute difference of an output value between an fp32 ONNX file and PyTorch. If the largest magnitude of
#: PyTorch's outputs is above 1, the limit is multiplied by this magnitude.
MAX_ABS_DIFF = 1e-4
#: Logits of a text that differ by at most this much count as equal when best labels are compared. A head that learned
#: nothing gives all labels nearly equal logits, and then rounding decides which is the best.
_TIE = 1e-6


def compare(expected: Matrix, got: Matrix, *, labels: bool = False) -> Parity:
    """Compare outputs of PyTorch and of ONNX Runtime for the same texts, at least one.

    Args:
        expected: outputs of PyTorch, float32 (texts, dimensions or labels).
        got: outputs of ONNX Runtime, of the same shape.
        labels: whether the outputs are logits, so that the best label of each text is compared, too.

    Returns:
        The number of texts, the greatest absolute difference of a value, the minimum cosine of a text's outputs, and
        the share of texts with the same best label (1.0 unless `labels`). If several labels are the best up to `_TIE`
        in `got`, any of them counts as the best.

    Raises:
        ExportError: the outputs have different shapes.
    """
    if expected.shape != got.shape:
        raise ExportError(
            f"PyTorch gives outputs of the shape {expected.shape}, and ONNX Runtime {got.shape}; check modules.json "
            "and the configurations of its modules: two modules of one name cannot be exported, nor can a "
            "module_input_name or module_output_name other than sentence_embedding"
        )
    agreement = 1.0
    if labels:
        chosen = got[np.arange(len(got)), expected.argmax(axis=1)]
        agreement = float((chosen >= got.max(axis=1) - _TIE).mean())
    return Parity(
        texts=len(expected),
        max_abs_diff=float(np.abs(expected - got).max()),
        cosine_min=float(cosines(expected, got).min()),
        label_agreement=agreement,
    )


def faults(parity: Parity, scale: float = 1.0) -> list[str]:
    """Return a message for each limit of an fp32 ONNX file that `parity` misses; an empty list if it meets all limits.

    Args:
        parity: result of `compare`.
        scale: factor of `MAX_ABS_DIFF`: give the largest magnitude of the expected outputs, or 1 if that is less.
    """
    found = []
    if not parity.cosine_min >= MIN_COSINE:
        found.append(f"a cosine of {parity.cosine_min:.6f}, it must be at least {MIN_COSINE}")
    if not parity.max_abs_diff <= MAX_ABS_DIFF * scale:
        found.append(f"a difference of {parity.max_abs_diff:.2g}, it must be at most {MAX_ABS_DIFF * scale:.2g}")
    if not parity.label_agreement >= 1:
        found.append(f"the same label for {parity.label_agreement:.1%} of the texts, it must be for all")
    return found


def require(name: str, parity: Parity, expected: Matrix) -> None:
    """Raise ExportError if `parity` misses a limit of an fp32 ONNX file.

    Args:
        name: name of the model, for the error.
        parity: result of `compare`.
        expected: outputs of PyTorch, whose largest magnitude scales the limit of the difference.
    """
    found = faults(parity, scale=max(1.0, float(np.abs(expected).max())))
    if found:
        raise ExportError(
            f"{name} does not give what PyTorch gives on {parity.texts} texts: {'; '.join(found)}; nothing was written"
        )


def torch_vectors(folder: str, texts: Sequence[str], max_tokens: int, *, stated: bool = False) -> Matrix:
    """Return the vectors of texts by sentence-transformers in fp32, without any prompt, float32 (texts, dimensions).

    Args:
        folder: folder of the model.
        texts: the texts.
        max_tokens: number of tokens to which texts are truncated: the limit of the ONNX model in the comparison.
        stated: whether the user stated `max_tokens`. If not, `require_limit` compares it with the limit of the model in
            sentence-transformers.

    Raises:
        ExportError: sentence-transformers cannot load or run the model; or without `stated`, it truncates texts to
            another number of tokens.
    """
    from emberpc.export.libraries import calling_libraries, load_sentence_transformer

    model = load_sentence_transformer(Path(folder))
    if not stated:
        require_limit(folder, model.max_seq_length, max_tokens, "sentence-transformers")
    with calling_libraries(f"{folder} cannot be run by sentence-transformers", "is it an encoder that it supports?"):
        import torch

        # If the user did not state the limit, the model has the same limit already, no limit, or one beyond its
        # positions. With the last, PyTorch would fail on a text with more tokens than positions.
        model.max_seq_length = max_tokens
        with torch.inference_mode():
            found = model.encode(list(texts), prompt="", convert_to_numpy=True, show_progress_bar=False)
    return np.asarray(found, dtype=np.float32)


def source_limit(folder: Path, own: float | None) -> int | None:
    """Return the number of tokens to which a model's own library truncates texts, or can truncate them.

    Args:
        folder: folder of the model.
        own: limit in tokens of the model as the library loaded it; None or above `MAX_TOKENS`: no limit.

    Returns:
        The smaller of `own` and the model's number of positions (see `read_positions`); None if there is neither.

    Raises:
        BundleError: config.json or modules.json is damaged.
    """
    positions = read_positions(read_json(transformer_folder(folder) / "config.json"))
    limits = [int(limit) for limit in (own, positions) if limit is not None and limit <= MAX_TOKENS]
    return min(limits, default=None)


def require_limit(folder: str, own: float | None, max_tokens: int, library: str) -> None:
    """Raise ExportError if a model's own library truncates texts to another number of tokens than the ONNX model.

    The number is that of `source_limit`, which may raise BundleError. A model without a limit passes.

    Args:
        folder: folder of the model.
        own: limit in tokens of the model as the library loaded it; None or above `MAX_TOKENS`: no limit.
        max_tokens: number of tokens to which the ONNX model truncates texts.
        library: name of the library, for the error.
    """
    limit = source_limit(Path(folder), own)
    if limit not in (None, max_tokens):
        raise ExportError(
            f"texts would be truncated at {max_tokens} tokens, but {library} truncates them at {limit} with {folder}; "
            f"export the model again, with --max-tokens {max_tokens} if that limit is wanted"
        )
