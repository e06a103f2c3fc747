"""Convert encoders from PyTorch to ONNX. This is the only module that imports optimum."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from emberpc.bundle.transformers_settings import read_json
from emberpc.export.errors import ExportError
from emberpc.export.libraries import calling_libraries


def convert(folder: Path, target: Path) -> Path:
    """Convert an encoder from PyTorch to ONNX with optimum.

    The graph has the output `last_hidden_state`, float32 (texts, tokens, hidden size).

    Args:
        folder: the encoder, in Hugging Face's format.
        target: folder to which optimum writes the ONNX file, the configuration and the tokenizer.

    Returns:
        The path of the ONNX file.

    Raises:
        ExportError: the encoder cannot be converted, weights are missing, or the tokenizer is not supported (see
            `_check_tokenizer`).
        BundleError: config.json holds no JSON object.
        OSError: the disk is full.
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
            do_validation=False,  # it would compare on random ids; `parity` compares on real texts later
            trust_remote_code=False,
            local_files_only=True,
        )
    return target / "model.onnx"


def _check_tokenizer(folder: Path) -> None:
    """Raise ExportError unless a tokenizer.json alone can describe the folder's tokenizer.

    The tokenizer must be a fast one, or one that transformers can convert to a fast one, and must not split special
    tokens.
    """
    with calling_libraries(
        f"{folder} has no tokenizer that can be read", "get the model again, with its tokenizer.json"
    ):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        if not tokenizer.is_fast:
            raise ExportError(
                f"{folder} has no tokenizer.json, and transformers cannot make one from its "
                f"{type(tokenizer).__name__}; choose a model with a tokenizer.json"
            )
        if tokenizer.split_special_tokens:
            raise ExportError(
                f"{folder}: tokenizer_config.json states split_special_tokens, which tokenizer.json cannot; set it to "
                "false, or choose another model"
            )


def _check_weights(folder: Path) -> None:
    """Raise ExportError if weights are missing: transformers would use random weights in their place and only warn.

    Weights of a pooler may be missing. Call this function in a block of `calling_libraries`, since the errors of
    transformers pass through.
    """
    from transformers import AutoModel

    _, info = AutoModel.from_pretrained(
        str(folder), local_files_only=True, trust_remote_code=False, use_safetensors=True, output_loading_info=True
    )
    # BERT's pooler does not affect `last_hidden_state`, and many models have no weights for it.
    missing = [key for key in info["missing_keys"] if "pooler" not in key.split(".")]
    if missing:
        raise ExportError(f"the weights in {folder} lack {len(missing)} tensors, such as {missing[0]}; get them again")
