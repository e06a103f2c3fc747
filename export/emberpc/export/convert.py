"""From PyTorch to ONNX: the one place that knows optimum."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from emberpc.bundle.peers import read_json
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
    _check_tokenizer(folder)
    model_type = read_json(folder / "config.json").get("model_type")
    with calling_libraries(
        f"{folder} cannot be converted to ONNX",
        f"is {model_type!r} an architecture of text encoders that optimum {version('optimum-onnx')} supports?",
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


def _check_tokenizer(folder: Path) -> None:
    """Refuse a tokenizer that no tokenizer.json can be made of: the server reads nothing else."""
    with calling_libraries(
        f"{folder} has no tokenizer that can be read", "get the model again, with its tokenizer.json"
    ):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        if not tokenizer.is_fast:
            raise ExportError(
                f"{folder} has no tokenizer.json, and transformers can make none of its {type(tokenizer).__name__}; "
                "choose a model that has one"
            )


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
