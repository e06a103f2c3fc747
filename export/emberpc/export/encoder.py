"""What an encoder says of itself: its weights, its limits, and how its token vectors become a text's."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emberpc.bundle import Prompts
from emberpc.export.errors import ExportError
from emberpc.export.progress import Progress, no_progress
from emberpc.export.sources import find_source

_POOLING_KEYS = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
}
_SUPPORTED = ("mean", "cls", "max")
#: Of models that state no limit, tokenizers give an absurdly large one.
_MOST_TOKENS = 100_000


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
    normalize: bool
    max_tokens: int
    prompts: Prompts
    matryoshka_dimensions: tuple[int, ...]
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
    weights = _weights_sha256(folder)
    pooling, normalize = _modules(folder)
    sentence_transformers = _json(folder / "config_sentence_transformers.json")
    return Encoder(
        folder=folder,
        name=name or found.name,
        revision=found.revision or weights[:12],
        weights_sha256=weights,
        pooling=pooling,
        normalize=normalize,
        max_tokens=_max_tokens(folder, config, max_tokens),
        prompts=_prompts(sentence_transformers),
        matryoshka_dimensions=tuple(sentence_transformers.get("matryoshka_dims") or ()),
        config=config,
    )


def _json(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty if the file is missing."""
    if not path.exists():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(f"{path} is not JSON; get the model again") from error
    if not isinstance(data, dict):
        raise ExportError(f"{path} holds no JSON object; get the model again")
    return data


def _weights_sha256(folder: Path) -> str:
    """Return the SHA-256 (hex) of the weights; of several files, of them all in the order of their names."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ExportError(f"{folder} has no *.safetensors; other formats can run code when they are read: convert it")
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def _modules(folder: Path) -> tuple[str, bool]:
    """Return the pooling and whether vectors are normalised; of a plain encoder, what sentence-transformers does."""
    path = folder / "modules.json"
    if not path.exists():
        return "mean", False
    pooling, normalize = "mean", False
    for module in json.loads(path.read_text(encoding="utf-8")):
        kind = str(module["type"]).rpartition(".")[2]
        if kind == "Pooling":
            pooling = _pooling(folder / module["path"] / "config.json")
        elif kind == "Normalize":
            normalize = True
        elif kind != "Transformer" or module["path"]:
            raise ExportError(
                f"{path}: the module {kind} in {module['path'] or 'the folder itself'!r} cannot be exported yet; "
                "supported are Transformer, Pooling and Normalize"
            )
    return pooling, normalize


def _pooling(path: Path) -> str:
    """Read how token vectors become a text's, in the older form of the file or the newer."""
    config = _json(path)
    modes = [mode for key, mode in _POOLING_KEYS.items() if config.get(key)]
    modes += [
        key for key, value in config.items() if value and key.startswith("pooling_mode_") and key not in _POOLING_KEYS
    ]
    stated = config.get("pooling_mode", [])
    modes += [stated] if isinstance(stated, str) else stated
    if len(modes) != 1 or modes[0] not in _SUPPORTED:
        raise ExportError(f"{path}: the pooling {' + '.join(modes)} cannot be exported yet; supported are {_SUPPORTED}")
    return str(modes[0])


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
    prompts = config.get("prompts") or {}
    return Prompts(query=prompts.get("query") or "", passage=prompts.get("passage") or prompts.get("document") or "")
