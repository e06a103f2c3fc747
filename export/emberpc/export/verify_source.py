"""Compare a variant of a bundle or foreign folder with a PyTorch model, its source."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from emberpc.bundle import Bundle, Task
from emberpc.bundle.agreement import neighbour_agreement
from emberpc.export.convert.onnx_runner import Matrix, OnnxRunner
from emberpc.export.convert.parity import compare, faults, require_limit, torch_vectors
from emberpc.export.data.stdlib_texts import sample_texts
from emberpc.export.errors import ExportError
from emberpc.export.libraries import calling_libraries
from emberpc.export.source.find_source import find_source
from emberpc.export.threads import bounded_threads

#: Number of texts to compare, enough to compare the 10 nearest texts of each text.
_TEXTS = 64


@bounded_threads()
def compare_with_source(bundle: Bundle, variant: str, runner: OnnxRunner, source: str | Path) -> tuple[None, str]:
    """Compare a variant with PyTorch on 64 texts without prompt, mostly docstrings of Python's standard library.

    Vectors are compared, also of a classifier in a bundle; of a classifier in a foreign folder, logits. If emberpc
    fine-tuned the encoder of a classifier, give the fine-tuned encoder as the source, not its base.

    Args:
        bundle: the bundle or foreign folder.
        variant: name of the variant.
        runner: runner of the variant.
        source: the PyTorch model: a folder, an installed package that holds one, or a hub id.

    Returns:
        None, and the result in words.

    Raises:
        ExportError: the source cannot be found; the source or the variant cannot be run; the source has another limit
            of tokens than the bundle, and the user did not state the limit; the outputs have another shape; or the
            outputs miss `cosine_min` or `difference_max` of the variant's bound (without a bound, a limit of the parity
            check).
        OSError: the disk is full.
    """
    folder = find_source(source).folder
    texts = sample_texts(_TEXTS)
    logits = bundle.foreign is not None and bundle.manifest.task is Task.CLASSIFICATION
    output = bundle.foreign.output if bundle.foreign else "sentence_embedding"
    manifest = bundle.manifest
    run = _torch_logits if logits else torch_vectors
    expected = run(str(folder), texts, manifest.max_tokens, stated=manifest.max_tokens_stated)
    got = runner.run(texts, output)
    if got.shape != expected.shape:
        raise ExportError(
            f"{output} has the shape {got.shape}, and {source} returns {expected.shape}; give the model's own source"
        )
    parity = compare(expected, got, labels=logits)
    agreement = neighbour_agreement(expected, got)
    words = (
        f"{output} on {len(texts)} texts: minimum cosine {parity.cosine_min:.6f}, greatest difference "
        f"{parity.max_abs_diff:.2g}, {agreement:.1%} of the 10 nearest"
    )
    bound = bundle.manifest.variant(variant).bound
    found = bound.faults(expected, got) if bound else faults(parity, scale=max(1.0, float(np.abs(expected).max())))
    if found:
        raise ExportError(f"{words}; {'; '.join(found)}; export the model again")
    return None, words


def _torch_logits(folder: str, texts: Sequence[str], max_tokens: int, *, stated: bool) -> Matrix:
    """Return the logits of texts by transformers in fp32, float32 (texts, labels).

    Args:
        folder: folder of the PyTorch model.
        texts: the texts.
        max_tokens: number of tokens at which texts are truncated.
        stated: whether the user stated `max_tokens`. If not, and transformers has a limit for the model, the limit must
            be `max_tokens`.

    Raises:
        ExportError: transformers cannot run the model, or has another limit.
    """
    with calling_libraries(f"{folder} cannot be run by transformers", "is it a text classifier?"):
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if not stated:
            require_limit(folder, tokenizer.model_max_length, max_tokens, "transformers")
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
        ).eval()
        with torch.inference_mode():
            rows = [
                model(**tokenizer(text, truncation=True, max_length=max_tokens, return_tensors="pt")).logits
                for text in texts
            ]
        return np.asarray(torch.cat(rows).numpy(), dtype=np.float32)
