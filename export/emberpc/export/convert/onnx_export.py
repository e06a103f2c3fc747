"""Convert encoders from PyTorch to ONNX, and compare the two. This is the only module that imports optimum.

PyTorch's exporter that is based on `torch.export` (`dynamo=True`) writes the graph. The older one, based on
TorchScript, wrote wrong graphs of six architectures with transformers 5 without any error.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from emberpc.bundle.reading import TOKENIZER_NAME
from emberpc.bundle.transformers_settings import read_json, read_positions
from emberpc.export.convert.parity import MAX_ABS_DIFF
from emberpc.export.convert.sessions import open_session
from emberpc.export.errors import ExportError
from emberpc.export.libraries import calling_libraries

if TYPE_CHECKING:
    import torch

#: ONNX's version 20 has exact GELU as one operator, which ONNX Runtime 1.17 and newer and OpenVINO know.
_OPSET = 20
#: Texts and tokens of the inputs that the exporter traces. The graph accepts all others.
_TRACED = (2, 7)
#: Texts and tokens of inputs on which the graph is compared with PyTorch. `_shapes` adds one with many tokens.
_COMPARED = ((1, 1), (1, 5), (3, 18))
#: Keys of config.json that state how far a token attends, as a number of tokens, for architectures with windows.
_WINDOWS = ("local_attention", "sliding_window")
#: Bounds of the number of tokens of the longest inputs that are compared.
_LONG = (64, 2048)


def convert(folder: Path, target: Path) -> Path:
    """Convert an encoder from PyTorch to ONNX, and compare the graph with PyTorch on random inputs of several shapes.

    The graph has the inputs `input_ids`, `attention_mask` and, if the encoder distinguishes two parts of a text,
    `token_type_ids`, each int64 (texts, tokens), and the output `last_hidden_state`, float32 (texts, tokens, hidden
    size).

    Args:
        folder: the encoder, in Hugging Face's format.
        target: folder to which the ONNX file and the tokenizer are written.

    Returns:
        The path of the ONNX file.

    Raises:
        ExportError: the encoder cannot be converted, weights are missing, the graph and PyTorch disagree, or the
            tokenizer is not supported (see `_load_tokenizer`).
        BundleError: config.json holds no JSON object.
        OSError: the disk is full.
    """
    config = read_json(folder / "config.json")
    tokenizer = _load_tokenizer(folder)
    path = target / "model.onnx"
    with calling_libraries(
        f"{folder} cannot be converted to ONNX",
        f"is {config.get('model_type')!r} an architecture of text encoders that transformers and torch.onnx support?",
    ):
        import torch

        tokenizer.save_pretrained(str(target))
        model = _load(folder)
        names = _inputs(model, tokenizer.model_input_names)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            _write(model, names, path)
            _compare(model, names, path, _shapes(config))
    return path


def _load_tokenizer(folder: Path) -> Any:
    """Return the folder's tokenizer; raise ExportError unless a tokenizer.json alone can describe it.

    The folder must have a file of the tokenizer. The tokenizer must be a fast one, or one that transformers can convert
    to a fast one, and must not split special tokens.
    """
    problem, remedy = f"{folder} has no tokenizer that can be read", "get the model again, with its tokenizer.json"
    with calling_libraries(problem, remedy):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        if not tokenizer.is_fast:
            raise ExportError(
                f"{folder} has no tokenizer.json, and transformers cannot make one from its "
                f"{type(tokenizer).__name__}; choose a model with a tokenizer.json"
            )
        # Without any of its files, transformers makes a tokenizer that knows no words.
        if not any((folder / name).is_file() for name in (TOKENIZER_NAME, *tokenizer.vocab_files_names.values())):
            raise ExportError(f"{problem}; {remedy}")
        if tokenizer.split_special_tokens:
            raise ExportError(
                f"{folder}: tokenizer_config.json states split_special_tokens, which tokenizer.json cannot; set it to "
                "false, or choose another model"
            )
    return tokenizer


def _load(folder: Path) -> Any:
    """Load an encoder in float32, ready to be traced.

    Attention is computed by plain matrix products (`eager`): the graph of PyTorch's fused function has more nodes, and
    took 2.5 % more CPU time in ONNX Runtime and 4 to 6 % more in OpenVINO (docs/decisions/0029).

    Raises:
        ExportError: the model has a decoder, or weights other than a pooler's are missing: transformers would use
            random weights in their place and only warn.
    """
    import torch
    from transformers import AutoModel

    model, info = AutoModel.from_pretrained(
        str(folder),
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
        attn_implementation="eager",
        dtype=torch.float32,
    )
    if model.config.is_encoder_decoder:
        raise ExportError(f"{folder} has a decoder, so it is not just a text encoder; choose a text encoder")
    # BERT's pooler does not affect `last_hidden_state`, and many models have no weights for it.
    missing = sorted(key for key in info["missing_keys"] if "pooler" not in key.split("."))
    if missing:
        raise ExportError(f"the weights in {folder} lack {len(missing)} tensors, such as {missing[0]}; get them again")
    return model.eval()


def _inputs(model: Any, stated: Sequence[str]) -> list[str]:
    """Return the names of the graph's inputs.

    Args:
        model: the encoder.
        stated: names of the inputs that the encoder's tokenizer gives.
    """
    names = ["input_ids", "attention_mask"]
    accepted = inspect.signature(model.forward).parameters
    if "token_type_ids" in stated and "token_type_ids" in accepted and getattr(model.config, "type_vocab_size", 0) > 1:
        names.append("token_type_ids")
    return names


def _feeds(model: Any, names: Sequence[str], shape: tuple[int, int], side: str) -> dict[str, torch.Tensor]:
    """Return random inputs, each int64 (texts, tokens). All texts but the first are padded on one side."""
    import torch
    from optimum.utils import DummyTextInputGenerator, NormalizedTextConfig

    texts, tokens = shape
    dummy = DummyTextInputGenerator(
        "feature-extraction", NormalizedTextConfig(model.config), batch_size=texts, sequence_length=tokens
    )
    mask = torch.ones(shape, dtype=torch.int64)
    mask[1:, tokens - tokens // 3 :] = 0
    feeds = {"attention_mask": mask if side == "right" else mask.flip(1)}
    for name in names:
        if name not in feeds:
            feeds[name] = dummy.generate(name, framework="pt")
    return feeds


def _write(model: Any, names: Sequence[str], path: Path) -> None:
    """Write the graph of an encoder to an ONNX file. Its number of texts and its number of tokens are free."""
    import torch

    class Encoder(torch.nn.Module):
        """The encoder with the graph's inputs as parameters, and with one output."""

        def __init__(self) -> None:
            super().__init__()
            self.encoder = model

        def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.encoder(**dict(zip(names, inputs, strict=True))).last_hidden_state
            return found

    feeds = _feeds(model, names, _TRACED, "right")
    program = torch.onnx.export(
        Encoder(),
        tuple(feeds[name] for name in names),
        dynamo=True,
        dynamic_shapes=(tuple({0: "batch_size", 1: "sequence_length"} for _ in names),),
        input_names=list(names),
        output_names=["last_hidden_state"],
        opset_version=_OPSET,
        verbose=False,
    )
    if program is None:
        raise ExportError("torch.onnx wrote no program; use the version of PyTorch in constraints.txt")
    for node in program.model.graph:
        node.metadata_props.clear()  # paths of source files on this host
    program.save(str(path))


def _shapes(config: dict[str, Any]) -> list[tuple[int, int]]:
    """Return the shapes of the inputs to compare: small ones, and two texts that are longer than a window's tokens.

    Windows that would need more than 2,048 tokens are not compared.
    """
    positions = read_positions(config) or _LONG[1]
    windows = [value + value // 4 for key in _WINDOWS if isinstance(value := config.get(key), int)]
    longest = min(positions, max([_LONG[0], *(tokens for tokens in windows if tokens <= _LONG[1])]))
    return [*((texts, tokens) for texts, tokens in _COMPARED if tokens <= positions), (2, longest)]


def _compare(model: Any, names: Sequence[str], path: Path, shapes: Sequence[tuple[int, int]]) -> None:
    """Raise ExportError unless the graph gives the states of PyTorch for random texts of several shapes.

    Texts are padded at the end, and then at the start. States of padding are not compared.
    """
    import torch

    session = open_session(path, "onnxruntime", 1)
    for shape in shapes:
        for side in ("right", "left"):
            feeds = _feeds(model, names, shape, side)
            with torch.inference_mode():
                expected = model(**feeds).last_hidden_state.numpy()
            got = session.run({name: value.numpy() for name, value in feeds.items()}, "last_hidden_state")
            kept = feeds["attention_mask"].numpy() == 1
            difference = float(np.abs(expected - got)[kept].max()) if got.shape == expected.shape else np.inf
            limit = MAX_ABS_DIFF * max(1.0, float(np.abs(expected[kept]).max()))
            if not difference <= limit:
                raise ExportError(
                    f"the ONNX graph differs from PyTorch by {difference:.2g} on {shape[0]} texts of {shape[1]} tokens "
                    f"padded on the {side}, it may by {limit:.2g}; nothing was written"
                )
