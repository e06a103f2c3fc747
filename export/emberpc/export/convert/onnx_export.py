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
from tokenizers import Tokenizer

from emberpc.bundle import BundleError
from emberpc.bundle.reading import TOKENIZER_NAME
from emberpc.bundle.tokenizer_settings import check_tokenizer
from emberpc.bundle.transformers_settings import read_json
from emberpc.export.convert.parity import compare, faults
from emberpc.export.convert.sessions import open_session
from emberpc.export.data.stdlib_texts import sample_texts
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
#: Minimum and maximum number of tokens of the longest inputs that are compared.
_LONG = (64, 2048)
#: Maximum number of tokens of the vocabulary on which two tokenizers are compared.
_COMPARED_WORDS = 5000
#: Names of stored tensors that are no weights: older versions of transformers stored these constants.
_CONSTANTS = ("position_ids", "token_type_ids", "inv_freq", "masked_bias")


def convert(folder: Path, target: Path, max_tokens: int) -> Path:
    """Convert an encoder from PyTorch to ONNX, and compare the graph with PyTorch on random inputs of several shapes.

    The graph has the inputs `input_ids`, `attention_mask` and perhaps `token_type_ids` (see `_inputs`), each int64
    (texts, tokens), and the output `last_hidden_state`, float32 (texts, tokens, hidden size).

    Args:
        folder: the encoder, in Hugging Face's format.
        target: folder to which the ONNX file and the tokenizer are written.
        max_tokens: maximum number of tokens of a text. No random text has more, except that at least two are traced.

    Returns:
        The path of the ONNX file.

    Raises:
        ExportError: the encoder cannot be converted, transformers reads its configuration, weights or tokenizer not or
            otherwise than they are stored, or the graph and PyTorch disagree.
        BundleError: config.json holds no JSON object.
        OSError: the disk is full.
    """
    model_type = read_json(folder / "config.json").get("model_type")
    problem = f"{folder} cannot be converted to ONNX"
    remedy = f"is {model_type!r} an architecture of text encoders that transformers and torch.onnx support?"
    with calling_libraries(problem, remedy):
        from transformers import AutoConfig

        # The tokenizer needs the configuration, and its error would be about the tokenizer.
        AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    tokenizer = _load_tokenizer(folder)
    path = target / "model.onnx"
    with calling_libraries(problem, remedy):
        import torch

        tokenizer.save_pretrained(str(target))
        _compare_tokenizers(folder, target)
        model = _load(folder)
        names = _inputs(model, tokenizer.model_input_names)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            _write(model, names, path, max_tokens)
            _compare(model, names, path, _shapes(model.config.get_text_config(), max_tokens))
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


def _compare_tokenizers(folder: Path, target: Path) -> None:
    """Raise ExportError if transformers reads a tokenizer otherwise than its tokenizer.json states.

    For some classes, transformers 5 takes the vocabulary of the file and makes the other parts itself, such as the
    normalizer. sentence-transformers does the same, so the comparison of vectors does not find other tokens.

    Two differences are allowed: the folder has no tokenizer.json, or it has a setting that contradicts tokenizer.json,
    which transformers 4 followed too.

    Args:
        folder: the encoder.
        target: folder with the tokenizer.json that transformers wrote.
    """
    if not (folder / TOKENIZER_NAME).is_file():
        return
    stored, read = (Tokenizer.from_file(str(place / TOKENIZER_NAME)) for place in (folder, target))
    for tokenizer in (stored, read):
        tokenizer.no_truncation()
        tokenizer.no_padding()
    size = stored.get_vocab_size()
    words = stored.decode_batch(
        [[number] for number in range(0, size, -(-size // _COMPARED_WORDS))], skip_special_tokens=False
    )
    texts = [*sample_texts(64), *words]
    pairs = zip(texts, stored.encode_batch(texts), read.encode_batch(texts), strict=True)
    different = next((text for text, first, second in pairs if first.ids != second.ids), None)
    if different is None:
        return
    try:
        check_tokenizer(folder, feeds_types=False)
    except BundleError:
        return
    raise ExportError(
        f"transformers does not read the tokenizer of {folder} as its tokenizer.json states: a text such as "
        f'{different[:40]!r} gets other tokens; state "tokenizer_class": "PreTrainedTokenizerFast" in '
        "tokenizer_config.json, or if the error stays, choose another model"
    )


def _load(folder: Path) -> Any:
    """Load an encoder in float32, ready to be traced.

    Attention is computed by plain matrix products (`eager`): the graph of PyTorch's fused function has more nodes, and
    took 2.5 % more CPU time in ONNX Runtime and 4 to 6 % more in OpenVINO (docs/decisions/0029).

    Raises:
        ExportError: the model has a decoder; weights other than a pooler's are missing, for which transformers would
            use random weights and only warn; or transformers does not use weights of the encoder, such as those of
            relative positions, which version 4 used.
    """
    import torch
    from transformers import AutoModel, __version__

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
    # Weights of heads, such as a classifier's, are not in a module of the encoder.
    modules = {name for name, _ in model.named_children()} - {"pooler"}
    unused = sorted(
        key
        for key in info["unexpected_keys"]
        if key.removeprefix(f"{model.base_model_prefix}.").split(".")[0] in modules
        and key.rpartition(".")[2] not in _CONSTANTS
    )
    if unused:
        raise ExportError(
            f"transformers {__version__} does not use {len(unused)} tensors of the encoder in {folder}, such as "
            f"{unused[0]}, so it would give other vectors than the version that saved them; choose another model"
        )
    return model.eval()


def _inputs(model: Any, stated: Sequence[str]) -> list[str]:
    """Return the names of the graph's inputs.

    `token_type_ids` is an input if the tokenizer gives it and the encoder has more than one type of tokens.

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
    sizes = NormalizedTextConfig(model.config.get_text_config())
    dummy = DummyTextInputGenerator("feature-extraction", sizes, batch_size=texts, sequence_length=tokens)
    mask = torch.ones(shape, dtype=torch.int64)
    mask[1:, tokens - tokens // 3 :] = 0
    feeds = {"attention_mask": mask if side == "right" else mask.flip(1)}
    for name in names:
        if name not in feeds:
            feeds[name] = dummy.generate(name, framework="pt")
    return feeds


def _write(model: Any, names: Sequence[str], path: Path, max_tokens: int) -> None:
    """Write the graph of an encoder to an ONNX file. Its number of texts and its number of tokens are free.

    At least two tokens are traced: the exporter would fix a number of one.
    """
    import torch

    class Encoder(torch.nn.Module):
        """The encoder with the graph's inputs as parameters, and with one output."""

        def __init__(self) -> None:
            super().__init__()
            self.encoder = model

        def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.encoder(**dict(zip(names, inputs, strict=True))).last_hidden_state
            return found

    texts, tokens = _TRACED
    feeds = _feeds(model, names, (texts, max(2, min(tokens, max_tokens))), "right")
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


def _shapes(config: Any, max_tokens: int) -> list[tuple[int, int]]:
    """Return the shapes of the inputs to compare: small ones, and two texts that are longer than a window of attention.

    No shape has more than `max_tokens` tokens. Windows that would need more than 2,048 tokens are not compared.

    Args:
        config: the encoder's configuration in transformers.
        max_tokens: maximum number of tokens of a text.
    """
    minimum, maximum = _LONG
    windows = [value + value // 4 for key in _WINDOWS if isinstance(value := getattr(config, key, None), int)]
    longest = min(max_tokens, max([minimum, *(tokens for tokens in windows if tokens <= maximum)]))
    return [*((texts, tokens) for texts, tokens in _COMPARED if tokens <= max_tokens), (2, longest)]


def _compare(model: Any, names: Sequence[str], path: Path, shapes: Sequence[tuple[int, int]]) -> None:
    """Raise ExportError unless the graph gives the states of PyTorch for random texts of several shapes.

    Texts are padded at the end, and then at the start. States of padding are not compared. The limits are those of the
    vectors (`parity.faults`).
    """
    import torch

    session = open_session(path, "onnxruntime", 1)
    for texts, tokens in shapes:
        for side in ("right", "left"):
            feeds = _feeds(model, names, (texts, tokens), side)
            with torch.inference_mode():
                states = model(**feeds).last_hidden_state.numpy()
            kept = feeds["attention_mask"].numpy() == 1
            got = session.run({name: value.numpy() for name, value in feeds.items()}, "last_hidden_state")
            expected = states[kept]
            if found := faults(compare(expected, got[kept]), scale=max(1.0, float(np.abs(expected).max()))):
                raise ExportError(
                    f"the ONNX graph differs from PyTorch on {texts} texts of {tokens} tokens padded on the {side}: "
                    f"{'; '.join(found)}; nothing was written"
                )
