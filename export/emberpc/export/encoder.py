"""What an encoder says of itself: its weights, its limits, and how its token vectors become a text's."""

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
from emberpc.bundle.peers import (
    ADAPTER_CONFIG,
    read_json,
    read_max_tokens,
    read_modules,
    read_pooling,
    read_positions,
    read_prompts,
    read_sentence_transformers,
    read_transformer,
    transformer_folder,
)
from emberpc.export.errors import ExportError
from emberpc.export.matryoshka import read_matryoshka
from emberpc.export.progress import Progress, no_progress
from emberpc.export.sources import Source, find_source
from emberpc.export.weights import find_weights, sha256_of_all

_LOGGER = logging.getLogger(__name__)

#: In this order; Dense may be there several times, or not.
_MODULES = ("Transformer", "Pooling", "Dense", "Normalize")
_ACTIVATIONS = {"Tanh": "Tanh", "ReLU": "Relu", "Sigmoid": "Sigmoid", "Identity": ""}
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
    #: Where config.json, weights and tokenizer are: that folder, or as in old ones the `0_Transformer` in it.
    transformer: Path
    #: What it is called: a hub id, or the name of its folder.
    name: str
    revision: str
    weights_sha256: str
    pooling: str
    dense: tuple[Dense, ...]
    normalize: bool
    max_tokens: int
    #: Whether a user asked for that limit, and not the source.
    max_tokens_stated: bool
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
    try:
        return _read(found, name, max_tokens)
    except BundleError as error:
        raise ExportError(str(error)) from error


def _read(found: Source, name: str, max_tokens: int | None) -> Encoder:
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
    weights = sha256_of_all([*find_weights(transformer), *(folder / path / _DENSE_WEIGHTS for path in dense)])
    sentence_transformers = read_sentence_transformers(folder)
    _refuse_cut_starts(folder, transformer)
    return Encoder(
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
    """Refuse a LoRA or other adapter: a few small matrices that mean nothing without the model they were trained on."""
    if not (folder / ADAPTER_CONFIG).is_file():
        return
    base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    raise ExportError(
        f"{folder} is an adapter ({ADAPTER_CONFIG}, such as LoRA) for {base or 'another model'}; merge the two and "
        "give the folder of the result: with peft, "
        "AutoPeftModel.from_pretrained(DIR).merge_and_unload().save_pretrained(OUT)"
    )


def _refuse_own_code(folder: Path, config: dict[str, Any]) -> None:
    """Refuse a model that is Python code of its own: its weights in a like-named architecture would be another model.

    Such are gte v1.5 (`model_type` "new"), nomic ("nomic_bert"), and jina v2, which says "bert".
    """
    own = config.get("auto_map")
    if isinstance(own, dict) and "AutoModel" in own:
        raise ExportError(
            f"{folder} is run by Python code of its own ({own['AutoModel']}, which needs trust_remote_code); "
            "emberpc runs no code of a model: choose a model of an architecture that transformers has, or serve "
            "the ONNX file that its publisher may offer"
        )


def _refuse_cut_starts(folder: Path, transformer: Path) -> None:
    """Refuse a model whose over-long texts lose their start: those of a bundle lose their end, unless a call says so.

    The comparison with PyTorch would not show it where no text is as long as the limit.
    """
    settings = read_transformer(folder)
    keywords = [settings.get(name) for name in ("processor_kwargs", "tokenizer_args")]
    stated = [*keywords, read_json(transformer / "tokenizer_config.json")]
    sides = [each["truncation_side"] for each in stated if isinstance(each, dict) and each.get("truncation_side")]
    side = str(sides[0]) if sides else _tokenizer_side(transformer / "tokenizer.json")
    if side.lower() == "left":
        raise ExportError(
            f"{transformer} has truncation_side left: over-long texts lose their start, and those of a bundle their "
            "end; set it to right (tokenizer_config.json) if that will do, and have callers state truncation START"
        )


def _tokenizer_side(path: Path) -> str:
    """Return the side at which tokenizer.json itself cuts texts, where nothing else states one; empty: it cuts none."""
    try:
        truncation = json.loads(path.read_text(encoding="utf-8")).get("truncation")
    except FileNotFoundError:  # there may be one in another form, which transformers converts
        return ""
    except (OSError, ValueError, RecursionError, AttributeError) as error:
        raise ExportError(f"{path} is no tokenizer; get the model again") from error
    return str(truncation.get("direction")) if isinstance(truncation, dict) else ""


def _modules(folder: Path) -> tuple[str, list[str], bool]:
    """Return the pooling, the folders of Dense modules, and whether vectors are normalised.

    Of a plain encoder, what sentence-transformers does: the mean, and nothing more.
    """
    path, modules = folder / "modules.json", read_modules(folder)
    if not modules and not path.exists():
        _report_unread(folder)
        return "mean", [], False
    kinds, places = [kind for kind, _ in modules], [place for _, place in modules]
    stage = 0
    for i, (kind, place) in enumerate(zip(kinds, places, strict=True)):
        wanted = _MODULES[stage : stage + 1] if i < 2 else _MODULES[stage:]  # in this order only
        if kind not in wanted:
            raise ExportError(
                f"{path}: the module {kind} in {place or 'the folder itself'!r} cannot be exported yet; "
                f"supported are {', '.join(_MODULES)}, in this order"
            )
        stage = _MODULES.index(kind) + (kind != "Dense")
    if len(kinds) < 2:
        raise ExportError(f"{path} has no Pooling, so its model gives no text one vector; choose one that has it")
    dense = [place for kind, place in zip(kinds, places, strict=True) if kind == "Dense"]
    return read_pooling(folder / places[1] / "config.json"), dense, kinds[-1] == "Normalize"


def _report_unread(folder: Path) -> None:
    """Warn of files that mean nothing without modules.json: it may have been lost on the way here."""
    found = sorted(
        path.relative_to(folder) for path in [*folder.glob("*_*/config.json"), *folder.glob("sentence_*.json")]
    )
    if found:
        _LOGGER.warning(
            "%s has %s and no modules.json, without which sentence-transformers reads none of them: the mean is taken, "
            "and the tokenizer's limit; get modules.json if the model has one",
            folder,
            ", ".join(map(str, found[:5])),
        )


def _dense(folder: Path, path: str) -> Dense:
    """Read a layer behind the pooling."""
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
    """Return the most tokens of a text: what was asked for, else the least of the limits that the source states."""
    if wanted is not None:
        positions = read_positions(config)
        most = positions or MAX_TOKENS
        if not 0 < wanted <= most:
            raise ExportError(f"max_tokens is {wanted}; {folder} takes 1 to {most} tokens")
        return wanted
    found = read_max_tokens(folder, config)
    if found is None:
        raise ExportError(f"{folder} does not say how many tokens it takes; state it with --max-tokens")
    return found
