"""From PyTorch to ONNX: the one place that knows optimum."""

from __future__ import annotations

from pathlib import Path

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
