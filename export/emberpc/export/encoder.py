"""What an encoder says of itself: its weights, its limits, and how its token vectors become a text's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from emberpc.bundle import Prompts
from emberpc.export.errors import ExportError
from emberpc.export.progress import Progress, no_progress
from emberpc.export.sources import find_source

_POOLING_KEYS = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "lasttoken",
}
_SUPPORTED = ("mean", "cls", "max", "lasttoken")
#: In this order; Dense may be there several times, or not.
_MODULES = ("Transformer", "Pooling", "Dense", "Normalize")
_ACTIVATIONS = {"Tanh": "Tanh", "ReLU": "Relu", "Sigmoid": "Sigmoid", "Identity": ""}
#: Of models that state no limit, tokenizers give an absurdly large one.
_MOST_TOKENS = 100_000
_DENSE_WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Dense:
    """A layer behind the pooling: activation(vector @ weights + bias).

    `path` is its folder in the encoder's; `weights` is float32 (inputs, outputs), `bias` float32 (outputs,);
    `activation` is ONNX's operator, empty for none.
    """

    path: str
    weights: npt.NDArray[np.float32]
    bias: npt.NDArray[np.float32]
    activation: str


@dataclass(frozen=True)
class Encoder:
    """An encoder to export."""

    #: Its folder on this host.
    folder: Path
    #: What it is called: a hub id, or the name of its folder.
    name: str
    revision: str
    weights_sha256: str
    pooling: str
    dense: tuple[Dense, ...]
    normalize: bool
    max_tokens: int
    prompts: Prompts
    matryoshka_dimensions: tuple[int, ...]
    #: Whether texts are lower-cased before they are tokenised, whatever the tokenizer does.
    lower_case: bool
    #: Its config.json.
    config: dict[str, Any]


def read_encoder(
    source: str | Path, *, name: str = "", max_tokens: int | None = None, progress: Progress = no_progress
) -> Encoder:
    """Find an encoder and read what it says of itself.

    Args:
        source: a folder, an installed package that holds one, or a hub id; see `sources`.
        name: what to call it in the bundle; default: the hub id or the folder's name.
        max_tokens: the most tokens of a text; default: what the source says.
        progress: told of a download.

    Raises:
        ExportError: there is none, its weights are not safetensors, or it has a part that cannot be exported.
    """
    found = find_source(source, progress)
    folder = found.folder
    config = _json(folder / "config.json")
    if not config:
        raise ExportError(
            f"{folder} has no config.json, so it is no Hugging Face encoder; name the folder that has one"
        )
    pooling, dense, normalize = _modules(folder)
    weights = _weights_sha256(folder, dense)
    sentence_transformers = _json(folder / "config_sentence_transformers.json")
    kind = sentence_transformers.get("model_type", "SentenceTransformer")
    if kind != "SentenceTransformer":
        raise ExportError(f"{folder} is a {kind}, which gives no text one vector; choose a SentenceTransformer")
    return Encoder(
        folder=folder,
        name=name or found.name,
        revision=found.revision or weights[:12],
        weights_sha256=weights,
        pooling=pooling,
        dense=tuple(_dense(folder, path) for path in dense),
        normalize=normalize,
        max_tokens=_max_tokens(folder, config, max_tokens),
        prompts=_prompts(sentence_transformers),
        matryoshka_dimensions=tuple(sentence_transformers.get("matryoshka_dims") or ()),
        lower_case=bool(_json(folder / "sentence_bert_config.json").get("do_lower_case")),
        config=config,
    )


def _json(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty if the file is missing."""
    data = _parse(path) if path.exists() else {}
    if not isinstance(data, dict):
        raise ExportError(f"{path} holds no JSON object; get the model again")
    return data


def _parse(path: Path) -> object:
    try:
        data: object = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ExportError(f"{path} is not JSON; get the model again") from error
    return data


def _weights_sha256(folder: Path, dense: Sequence[str]) -> str:
    """Return the SHA-256 (hex) of the weights; of several files, of them all in the order of their names."""
    files = sorted(folder.glob("*.safetensors"))
    if files:
        files += [folder / path / _DENSE_WEIGHTS for path in dense]
    else:
        raise ExportError(f"{folder} has no *.safetensors; other formats can run code when they are read: convert it")
    digest = hashlib.sha256()
    for path in files:
        if not path.is_file():
            raise ExportError(f"{path} is missing; other formats can run code when they are read: convert it")
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def _modules(folder: Path) -> tuple[str, list[str], bool]:
    """Return the pooling, the folders of Dense modules, and whether vectors are normalised.

    Of a plain encoder, what sentence-transformers does: the mean, and nothing more.
    """
    path = folder / "modules.json"
    if not path.exists():
        return "mean", [], False
    modules = _parse(path)
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise ExportError(f"{path} is no list of modules; get the model again")
    kinds = [str(module.get("type")).rpartition(".")[2] for module in modules]
    places = [str(module.get("path") or "") for module in modules]
    stage = 0
    for i, (kind, place) in enumerate(zip(kinds, places, strict=True)):
        # In this order only; and the transformer's files are looked for in the folder itself.
        wanted = _MODULES[stage : stage + 1] if i < 2 else _MODULES[stage:]
        if kind not in wanted or (kind == "Transformer" and place):
            raise ExportError(
                f"{path}: the module {kind} in {place or 'the folder itself'!r} cannot be exported yet; "
                f"supported are {', '.join(_MODULES)}, in this order"
            )
        stage = _MODULES.index(kind) + (kind != "Dense")
    if len(kinds) < 2:
        raise ExportError(f"{path} has no Pooling, so its model gives no text one vector; choose one that has it")
    dense = [place for kind, place in zip(kinds, places, strict=True) if kind == "Dense"]
    return _pooling(folder / places[1] / "config.json"), dense, kinds[-1] == "Normalize"


def _dense(folder: Path, path: str) -> Dense:
    """Read a layer behind the pooling."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    config = _json(folder / path / "config.json")
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


def _pooling(path: Path) -> str:
    """Read how token vectors become a text's, in the older form of the file or the newer."""
    config = _json(path)
    older = [_POOLING_KEYS.get(key, key) for key in config if key.startswith("pooling_mode_") and config[key]]
    stated = config.get("pooling_mode", older or "mean")  # the newer key goes before the older ones
    modes = [stated] if isinstance(stated, str) else [str(mode) for mode in stated]
    if len(modes) != 1 or modes[0] not in _SUPPORTED:
        supported = ", ".join(_SUPPORTED)
        raise ExportError(f"{path}: the pooling {' + '.join(modes)} cannot be exported yet; supported are {supported}")
    if not config.get("include_prompt", True):
        raise ExportError(f"{path}: a pooling that leaves the prompt out cannot be exported yet; choose another model")
    return modes[0]


def _max_tokens(folder: Path, config: dict[str, Any], wanted: int | None) -> int:
    """Return the most tokens of a text: what was asked for, else the least of the limits that the source states."""
    positions = config.get("max_position_embeddings")
    if positions and config.get("model_type") in ("roberta", "xlm-roberta", "camembert", "mpnet"):
        # Their first positions, up to the padding token's, are never used.
        positions -= config.get("pad_token_id", 1) + 1
    stated = [
        positions,
        _json(folder / "sentence_bert_config.json").get("max_seq_length"),
        _json(folder / "tokenizer_config.json").get("model_max_length"),
    ]
    limits = [int(limit) for limit in stated if isinstance(limit, (int, float)) and 0 < limit < _MOST_TOKENS]
    if wanted is not None:
        if positions and not 0 < wanted <= positions:
            raise ExportError(f"max_tokens is {wanted}; {folder} takes 1 to {positions} tokens")
        return wanted
    if not limits:
        raise ExportError(f"{folder} does not say how many tokens it takes; state it with --max-tokens")
    return min(limits)


def _prompts(config: dict[str, Any]) -> Prompts:
    """Return the prompts by the names in use for queries and for passages, else the one that is the default for all."""
    prompts = config.get("prompts") or {}
    default = prompts.get(config.get("default_prompt_name")) or ""
    passage = prompts.get("passage") or prompts.get("document") or default
    return Prompts(query=prompts.get("query") or default, passage=passage)
