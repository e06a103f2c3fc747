"""From PyTorch to ONNX: the one place that knows optimum."""

from __future__ import annotations

from pathlib import Path

from emberpc.export.errors import ExportError
from emberpc.export.libraries import calling_libraries


def convert(folder: Path, target: Path) -> Path:
    """Convert an encoder; the graph gives `last_hidden_state`, fp32 (texts, tokens, hidden size).

    Args:
        folder: the encoder, in Hugging Face's form.
        target: where the ONNX file goes, with configuration and tokenizer beside it.

    Returns:
        The ONNX file.

    Raises:
        ExportError: it cannot be converted.
    """
    with calling_libraries(
        f"{folder} cannot be converted to ONNX", "is it a text encoder of an architecture that optimum supports?"
    ):
        from optimum.exporters.onnx import main_export

        _check_weights(folder)
        main_export(
            str(folder),
            str(target),
            task="feature-extraction",
            library_name="transformers",
            device="cpu",
            do_validation=False,  # it compares on made-up ids; parity on real texts follows
            trust_remote_code=False,
            local_files_only=True,
        )
    return target / "model.onnx"


def _check_weights(folder: Path) -> None:
    """Refuse weights that lack some of the model's: transformers would make up random ones, and only warn."""
    from transformers import AutoModel

    _, info = AutoModel.from_pretrained(
        str(folder), local_files_only=True, trust_remote_code=False, use_safetensors=True, output_loading_info=True
    )
    # The pooler of BERT and its like plays no part in `last_hidden_state`, and is mostly missing.
    missing = [key for key in info["missing_keys"] if "pooler" not in key.split(".")]
    if missing:
        raise ExportError(f"the weights in {folder} lack {len(missing)} tensors, such as {missing[0]}; get them again")
