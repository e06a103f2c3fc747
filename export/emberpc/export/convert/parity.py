"""Compare an ONNX file's outputs with PyTorch's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from emberpc.bundle import Parity, cosines
from emberpc.bundle.limits import MAX_TOKENS
from emberpc.bundle.peers import read_json, read_positions, transformer_folder
from emberpc.export.convert.onnx_runner import Matrix
from emberpc.export.errors import ExportError

#: Limits of fp32: both sides compute the same operations in another order.
MIN_COSINE = 0.9999
MAX_ABS_DIFF = 1e-4
#: Logits that differ by less count as equal, for example those of a head that learned nothing.
_TIE = 1e-6


def compare(expected: Matrix, got: Matrix, *, labels: bool = False) -> Parity:
    """Compare outputs, both float32 (texts, dimensions or labels).

    Args:
        expected: outputs of PyTorch.
        got: outputs of ONNX Runtime.
        labels: whether the outputs are logits, so that the best label of each text is compared, too.

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
    """Return a message for each limit that fp32 misses; an empty list if it meets all.

    Args:
        parity: result of `compare`.
        scale: largest magnitude of the outputs; the limit of the difference is multiplied by it.
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
    """Raise ExportError if `parity` misses a limit of fp32; `name` is for the message, `expected` for the scale."""
    found = faults(parity, scale=max(1.0, float(np.abs(expected).max())))
    if found:
        raise ExportError(
            f"{name} does not give what PyTorch gives on {parity.texts} texts: {'; '.join(found)}; nothing was written"
        )


def torch_embeddings(folder: str, texts: Sequence[str], max_tokens: int, *, stated: bool = False) -> Matrix:
    """Embed texts with sentence-transformers in fp32, without any prompt; float32 (texts, dimensions).

    Args:
        folder: the model.
        texts: the texts.
        max_tokens: number of tokens at which the other side of the comparison truncates texts.
        stated: whether the user stated this limit; otherwise the model itself must have it.

    Raises:
        ExportError: sentence-transformers cannot load or run the model, or truncates texts at another limit.
    """
    from emberpc.export.libraries import calling_libraries

    with calling_libraries(f"{folder} cannot be run by sentence-transformers", "is it an encoder that it supports?"):
        import torch
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(folder, device="cpu", local_files_only=True)
        if not stated:
            require_limit(folder, model.max_seq_length, max_tokens, "sentence-transformers")
        # Here the model has this limit already, or a limit beyond its positions, with which it would fail.
        model.max_seq_length = max_tokens
        with torch.inference_mode():
            found = model.encode(list(texts), prompt="", convert_to_numpy=True, show_progress_bar=False)
    return np.asarray(found, dtype=np.float32)


def source_limit(folder: Path, own: float | None) -> int | None:
    """Return the number of tokens at which a model's own library truncates texts.

    Args:
        folder: the model.
        own: the limit of the loaded model in the library; None or an absurdly large number: no limit.

    Returns:
        That limit, or the number of the model's positions if it is less; None without either.
    """
    positions = read_positions(read_json(transformer_folder(folder) / "config.json"))
    limits = [int(limit) for limit in (own, positions) if limit is not None and limit <= MAX_TOKENS]
    return min(limits, default=None)


def require_limit(folder: str, own: float | None, max_tokens: int, library: str) -> None:
    """Raise ExportError unless a model's own library truncates texts at the same limit as the other side.

    Args:
        folder: the model.
        own: as for `source_limit`.
        max_tokens: number of tokens at which the other side truncates texts.
        library: name of the library, for the error.
    """
    limit = source_limit(Path(folder), own)
    if limit not in (None, max_tokens):
        raise ExportError(
            f"texts would be truncated at {max_tokens} tokens, but {library} truncates them at {limit} with {folder}; "
            f"export the model again, with --max-tokens {max_tokens} if that limit is wanted"
        )
