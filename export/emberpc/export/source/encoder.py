"""Read an encoder's folder: settings, pooling, the layers behind the pooling, and a hash of the weights."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from emberpc.bundle import BundleError, Prompts
from emberpc.bundle.limits import MAX_TOKENS
from emberpc.bundle.transformers_settings import (
    ADAPTER_CONFIG,
    read_json,
    read_max_tokens,
    read_modules,
    read_pooling,
    read_positions,
    read_prompts,
    read_sentence_transformers,
    read_transformer,
    tokenizer_keywords,
    transformer_folder,
)
from emberpc.export.errors import ExportError
from emberpc.export.progress import Progress, no_progress
from emberpc.export.source.find_source import Source, find_local, find_source
from emberpc.export.source.matryoshka import read_matryoshka
from emberpc.export.source.weights import find_weights, sha256_of_all

_LOGGER = logging.getLogger(__name__)

#: Kinds of modules in modules.json that an export supports, in the order required. Transformer and Pooling must occur
#: once each, Dense any number of times, and Normalize at most once.
_MODULES = ("Transformer", "Pooling", "Dense", "Normalize")
_ACTIVATIONS = {"Tanh": "Tanh", "ReLU": "Relu", "Sigmoid": "Sigmoid", "Identity": ""}
_DENSE_WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Dense:
    """A layer behind the pooling: activation(vector @ weights + bias).

    `path` is the layer's folder in the encoder's folder. `weights` is float32 (inputs, outputs), and `bias` is float32
    (outputs,). `activation` is the name of an ONNX operator, or empty for none.
    """

    path: str
    weights: npt.NDArray[np.float32]
    bias: npt.NDArray[np.float32]
    activation: str


@dataclass(frozen=True)
class SourceEncoder:
    """Settings of an encoder to export.

    `revision` is the source's Git commit, or else the start of `weights_sha256`, the SHA-256 (hex) of all weights.
    `dense` are the layers behind the pooling, and `normalize` says whether vectors are scaled to length 1 at the end.
    Texts of more than `max_tokens` tokens must be truncated.
    """

    #: Folder of the source on this host.
    folder: Path
    #: Folder of config.json, weights and tokenizer: `folder` itself, or a folder in it, such as `0_Transformer` in the
    #: older layout.
    transformer: Path
    #: Name of the model: the name that the caller gave, or else the hub id, or the name of the folder or package.
    name: str
    revision: str
    weights_sha256: str
    pooling: str
    dense: tuple[Dense, ...]
    normalize: bool
    max_tokens: int
    #: Whether the caller of `read_encoder` stated `max_tokens`; otherwise `max_tokens` is the source's limit.
    max_tokens_stated: bool
    prompts: Prompts
    matryoshka_dimensions: tuple[int, ...]
    #: Whether sentence-transformers lower-cases texts before the tokenizer gets them.
    lower_case: bool
    #: Content of config.json in `transformer`.
    config: dict[str, Any]


def read_encoder(
    source: str | Path, *, name: str = "", max_tokens: int | None = None, progress: Progress = no_progress
) -> SourceEncoder:
    """Find an encoder and read its settings.

    Args:
        source: a folder, an installed package that holds one, or a hub id; see `emberpc.export.source.find_source`.
        name: name of the model; default: the hub id, or the name of the folder or package.
        max_tokens: maximum number of tokens of a text; default: the source's limit.
        progress: called before and after a download from the hub.

    Raises:
        ExportError: there is no such encoder, or a file of it is missing or damaged; its weights are not safetensors;
            it is an adapter, needs Python code of its own, truncates texts at their start, or has an unsupported part
            or setting; or `max_tokens` is below 1, exceeds the model's positions, or is None and the source states no
            limit.
        OSError: the disk is full.
    """
    return _read(find_source(source, progress), name, max_tokens)


def check_encoder(source: str | Path, max_tokens: int | None = None) -> None:
    """Check an encoder on this host without loading PyTorch or reading its weights. A possible hub id is not checked.

    Raises:
        ExportError: `read_encoder` would refuse the encoder.
    """
    found = find_local(source)
    if found is not None:
        _read(found, "", max_tokens, hashed=False)


def _read(found: Source, name: str, max_tokens: int | None, *, hashed: bool = True) -> SourceEncoder:
    try:
        return _settings(found, name, max_tokens, hashed=hashed)
    except BundleError as error:
        raise ExportError(str(error)) from error


def _settings(found: Source, name: str, max_tokens: int | None, *, hashed: bool) -> SourceEncoder:
    folder = found.folder
    _refuse_adapter(folder)
    transformer = transformer_folder(folder)
    config = read_json(transformer / "config.json")
    if not config:
        raise ExportError(
            f"{transformer} has no config.json, so it is no Hugging Face encoder; name the folder that has one"
        )
    _refuse_own_code(folder, config)
    pooling, dense, normalize = _modules(folder)
    files = [*find_weights(transformer), *(folder / path / _DENSE_WEIGHTS for path in dense)]
    weights = sha256_of_all(files) if hashed else ""
    sentence_transformers = read_sentence_transformers(folder)
    _refuse_cut_starts(folder, transformer)
    return SourceEncoder(
        folder=folder,
        transformer=transformer,
        name=name or found.name,
        revision=found.revision or weights[:12],
        weights_sha256=weights,
        pooling=pooling,
        dense=tuple(_dense(folder, path) for path in dense),
        normalize=normalize,
        max_tokens=_max_tokens(folder, config, max_tokens),
        max_tokens_stated=max_tokens is not None,
        prompts=read_prompts(sentence_transformers),
        matryoshka_dimensions=read_matryoshka(folder, config),
        lower_case=bool(read_transformer(folder).get("do_lower_case")),
        config=config,
    )


def _refuse_adapter(folder: Path) -> None:
    """Raise ExportError for an adapter, such as LoRA: its few small matrices are no model without the base model."""
    if not (folder / ADAPTER_CONFIG).is_file():
        return
    base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    raise ExportError(
        f"{folder} is an adapter ({ADAPTER_CONFIG}, such as LoRA) for {base or 'another model'}; merge the two and "
        "give the folder of the result: with peft, "
        "AutoPeftModel.from_pretrained(DIR).merge_and_unload().save_pretrained(OUT)"
    )


def _refuse_own_code(folder: Path, config: dict[str, Any]) -> None:
    """Raise ExportError if the config names Python code of the model: `AutoModel` in `auto_map`.

    Without this code, transformers might load the weights into its built-in architecture with a similar name, and the
    vectors would be wrong. Examples of such models are gte v1.5, nomic, and jina v2 (its `model_type` is "bert").
    """
    own = config.get("auto_map")
    if isinstance(own, dict) and "AutoModel" in own:
        raise ExportError(
            f"{folder} is run by Python code of its own ({own['AutoModel']}, which needs trust_remote_code); "
            "emberpc runs no code of a model: choose a model of an architecture that transformers has, or serve "
            "the ONNX file that its publisher may offer"
        )


def _refuse_cut_starts(folder: Path, transformer: Path) -> None:
    """Raise ExportError for a model that truncates texts at their start, so that it keeps their end.

    The exported model would give long texts other vectors, since the export truncates at the end, and so does the
    server unless a call states START. The parity check does not find this if its texts are within the limit of tokens.
    """
    stated = [*tokenizer_keywords(read_transformer(folder)), read_json(transformer / "tokenizer_config.json")]
    sides = [each["truncation_side"] for each in stated if each.get("truncation_side")]
    side = str(sides[0]) if sides else _tokenizer_side(transformer / "tokenizer.json")
    if side.lower() == "left":
        raise ExportError(
            f"{transformer} has truncation_side left, which truncates texts at their start; a bundle truncates them at "
            "the end; set it to right (tokenizer_config.json) if that will do, and have callers state truncation START"
        )


def _tokenizer_side(path: Path) -> str:
    """Return the side at which a tokenizer.json truncates texts, `Left` or `Right`, as the file states it.

    The result is empty if the file states no truncation or does not exist, and the text `None` if it states truncation
    without a side. Raises ExportError if the file is damaged.
    """
    try:
        truncation = json.loads(path.read_text(encoding="utf-8")).get("truncation")
    except FileNotFoundError:  # the tokenizer may be in another format, which transformers converts
        return ""
    except (OSError, ValueError, RecursionError, AttributeError) as error:
        raise ExportError(f"{path} is not a tokenizer; get the model again") from error
    return str(truncation.get("direction")) if isinstance(truncation, dict) else ""


def _modules(folder: Path) -> tuple[str, list[str], bool]:
    """Return the pooling, the folders of Dense modules relative to `folder`, and whether vectors are normalized.

    For a plain encoder without modules.json, the result is what sentence-transformers does: mean pooling, no Dense
    module, not normalized. A warning is logged if files hint at a lost modules.json.

    Raises:
        ExportError: a module is not supported or not in the order of `_MODULES`, or there is no Pooling.
        BundleError: modules.json or the configuration of the pooling is damaged, or the pooling is not supported.
    """
    path, modules = folder / "modules.json", read_modules(folder)
    if not modules and not path.exists():
        _report_unread(folder)
        return "mean", [], False
    kinds, places = [kind for kind, _ in modules], [place for _, place in modules]
    stage = 0
    for i, (kind, place) in enumerate(zip(kinds, places, strict=True)):
        wanted = _MODULES[stage : stage + 1] if i < 2 else _MODULES[stage:]  # the first two are required
        if kind not in wanted:
            raise ExportError(
                f"{path}: the module {kind} in {place or 'the folder itself'!r} cannot be exported yet; "
                f"supported are {', '.join(_MODULES)}, in this order"
            )
        stage = _MODULES.index(kind) + (kind != "Dense")
    if len(kinds) < 2:
        raise ExportError(
            f"{path} has no Pooling, so its model returns no single vector for a text; choose a model with Pooling"
        )
    dense = [place for kind, place in zip(kinds, places, strict=True) if kind == "Dense"]
    return read_pooling(folder / places[1] / "config.json"), dense, kinds[-1] == "Normalize"


def _report_unread(folder: Path) -> None:
    """Log a warning if a folder without modules.json has files that are read only together with modules.json.

    modules.json may have been lost when such a folder was copied.
    """
    found = sorted(
        path.relative_to(folder) for path in [*folder.glob("*_*/config.json"), *folder.glob("sentence_*.json")]
    )
    if found:
        _LOGGER.warning(
            "%s has %s but no modules.json, so sentence-transformers reads none of them: pooling is mean, and the "
            "limit is the tokenizer's; get modules.json if the model has one",
            folder,
            ", ".join(map(str, found[:5])),
        )


def _dense(folder: Path, path: str) -> Dense:
    """Read the configuration and weights of a Dense module in the folder `path` of `folder`.

    As in sentence-transformers, the activation is Tanh if none is stated, and a missing bias is 0.

    Raises:
        ExportError: the activation is not supported, or the weights cannot be read.
        BundleError: the configuration is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    config = read_json(folder / path / "config.json")
    activation = str(config.get("activation_function", "torch.nn.modules.activation.Tanh")).rpartition(".")[2]
    if activation not in _ACTIVATIONS:
        supported = ", ".join(_ACTIVATIONS)
        raise ExportError(f"{folder / path}: the activation {activation} cannot be exported; supported are {supported}")
    try:
        tensors = load_file(folder / path / _DENSE_WEIGHTS)
        weights = np.ascontiguousarray(tensors["linear.weight"].astype(np.float32).T)
    except (OSError, SafetensorError, KeyError) as error:
        raise ExportError(f"{folder / path / _DENSE_WEIGHTS} cannot be read; get the model again") from error
    bias = tensors.get("linear.bias", np.zeros(weights.shape[1])).astype(np.float32)
    return Dense(path, weights, bias, _ACTIVATIONS[activation])


def _max_tokens(folder: Path, config: dict[str, Any], wanted: int | None) -> int:
    """Return the maximum number of tokens of a text: `wanted`, or else the limit of the source (see `read_max_tokens`).

    Raises:
        ExportError: `wanted` is below 1 or above the model's positions (`MAX_TOKENS` if it states none); or
            `wanted` is None and the source states no limit.
        BundleError: a file or setting that the limits are read from is damaged.
    """
    if wanted is not None:
        positions = read_positions(config)
        maximum = positions or MAX_TOKENS
        if not 0 < wanted <= maximum:
            raise ExportError(f"max_tokens is {wanted}; {folder} allows 1 to {maximum} tokens")
        return wanted
    found = read_max_tokens(folder, config)
    if found is None:
        raise ExportError(f"{folder} does not state a limit of tokens; state it with --max-tokens")
    return found
