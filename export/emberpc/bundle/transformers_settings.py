"""Read settings from the JSON files of a folder that sentence-transformers or transformers wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from emberpc.bundle.errors import BundleError
from emberpc.bundle.interface import POOLINGS
from emberpc.bundle.limits import MAX_DIMENSIONS, MAX_TOKEN_ID, check_labels, check_length, whole_number
from emberpc.bundle.manifest import Prompts
from emberpc.bundle.paths import is_inside, real_path

#: File in which peft describes an adapter and names the model that the adapter belongs to.
ADAPTER_CONFIG = "adapter_config.json"
#: Limit of a JSON file in bytes, so that a wrong file does not fill the memory. Real files have some kilobytes.
MAX_JSON_BYTES = 16 * 2**20
_POOLING_KEYS = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "lasttoken",
}
#: Keys of which the configuration of a pooling has at least one, unless a key `pooling_mode_…` is true in it. The last
#: key is the older name of the second.
_POOLING_STATED = ("pooling_mode", "embedding_dimension", "word_embedding_dimension")
#: A limit of at least this many tokens counts as no limit: tokenizers without a limit write an absurdly large number.
_MAX_TOKENS = 100_000
#: Keys of the tokenizer's limit in tokens. transformers uses the first of these keys that is stated.
_LENGTH_KEYS = ("model_max_length", "max_len")
#: Files with the settings of the Transformer module. sentence-transformers uses the first of these files that exists;
#: `read_transformer` uses the first that exists and is no empty object.
_TRANSFORMER_CONFIGS = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
#: Name of the prompt of queries that `encode_query` of sentence-transformers 5 looks for.
_QUERY_NAMES = ("query",)
#: Names of the prompt of passages, in the order in which `encode_document` of sentence-transformers 5 looks for them.
_PASSAGE_NAMES = ("document", "passage", "corpus")
#: Architectures that count a text's positions from the padding token's id + 1, so that lower positions are not used.
_OFFSET = (
    *("roberta", "xlm-roberta", "camembert", "mpnet", "longformer", "xlm-roberta-xl", "roberta-prelayernorm"),
    *("data2vec-text", "ibert", "xmod", "luke"),
)


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; an empty object if the file is missing.

    Raises:
        BundleError: the file cannot be read, has more than `MAX_JSON_BYTES`, or holds no JSON object.
    """
    data = _parse(path) if path.exists() else {}
    if not isinstance(data, dict):
        raise BundleError(f"{path} holds no JSON object; get the model again")
    return data


def _parse(path: Path) -> object:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise BundleError(f"{path} has {path.stat().st_size} bytes; at most {MAX_JSON_BYTES} are read")
        data: object = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not JSON; get the model again") from error
    return data


def read_modules(folder: Path) -> list[tuple[str, str]]:
    """Return the kind, such as `Pooling`, and the folder of each module that `modules.json` lists, in the file's order.

    Returns:
        Kinds and folders; the folders are relative to `folder`, and empty for `folder` itself. An empty list if there
        is no `modules.json`.

    Raises:
        BundleError: the file is too large or not a list of modules, or a module's folder lies outside `folder`.
    """
    path = folder / "modules.json"
    if not path.exists():
        return []
    modules = _parse(path)
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise BundleError(f"{path} is no list of modules; get the model again")
    for module in modules:
        place = str(module.get("path") or "")
        if "\0" in place or not is_inside(folder, place):
            raise BundleError(f"{path} names {place!r}, which leads out of the folder; get the model again")
    return [(_kind(str(module.get("type"))), str(module.get("path") or "")) for module in modules]


def _kind(path: str) -> str:
    """Return the kind of a module from the path of its class.

    The kind is the class name for a class of sentence-transformers, and the whole path for any other class.
    """
    return path.rpartition(".")[2] if path.startswith("sentence_transformers.") else path


def read_pooling(path: Path) -> str:
    """Return the pooling, one of `POOLINGS`, from the configuration of a Pooling module.

    It is `mean` if the configuration states the dimension and no pooling.

    Args:
        path: the file, such as `1_Pooling/config.json`, in its older or newer format.

    Raises:
        BundleError: the file is missing or is no configuration of a pooling, or the pooling is not supported: a mix of
            several, another than `POOLINGS`, or one that leaves out the tokens of the prompt.
    """
    if not path.is_file():
        raise BundleError(f"{path} is missing, and modules.json lists it; copy the folder with its subfolders")
    config = read_json(path)
    older = [_POOLING_KEYS.get(key, key) for key in config if key.startswith("pooling_mode_") and config[key]]
    # If no pooling is stated, sentence-transformers takes the mean; but it fails if the dimension is not stated either.
    if not older and not any(key in config for key in _POOLING_STATED):
        raise BundleError(
            f"{path} states no pooling: it has neither pooling_mode nor embedding_dimension; get the model again"
        )
    stated = config.get("pooling_mode", older or "mean")  # the newer key takes precedence
    modes = [str(mode) for mode in stated] if isinstance(stated, list) else [str(stated)]
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise BundleError(
            f"{path}: the pooling {' + '.join(modes)} is not supported yet; supported are {', '.join(POOLINGS)}"
        )
    if not config.get("include_prompt", True):
        raise BundleError(f"{path}: a pooling that leaves the prompt out is not supported yet; choose another model")
    return modes[0]


def read_token_id(config: dict[str, Any], key: str, default: int) -> int:
    """Return the id of a token, such as `pad_token_id`, from the content of config.json; `default` if missing or null.

    Raises:
        BundleError: the id is not a whole number from 0 to 2**31 - 1.
    """
    stated = config.get(key)
    return default if stated is None else whole_number(stated, f"config.json: {key}", 0, MAX_TOKEN_ID)


def read_dimensions(config: dict[str, Any]) -> int | None:
    """Return the dimensions of the hidden states from the content of config.json; None if they are not stated.

    Raises:
        BundleError: the value is not a whole number from 1 to `MAX_DIMENSIONS`.
    """
    for key in ("hidden_size", "dim", "d_model"):
        if config.get(key) is not None:
            return whole_number(config[key], f"config.json: {key}", 1, MAX_DIMENSIONS)
    return None


def read_labels(config: dict[str, Any]) -> tuple[str, ...]:
    """Return the labels from `id2label` in the content of config.json, ordered by id; empty if there are none.

    Numbers are returned as texts. Ids may have gaps, which are ignored.

    Raises:
        BundleError: a label or id is invalid, two keys such as `0` and `00` are the same id, or there are more or
            longer labels than `emberpc.bundle.limits` allows.
    """
    given = config.get("id2label")
    if not isinstance(given, dict) or not given:
        return ()
    if not all(isinstance(label, (str, int, float)) for label in given.values()):
        raise BundleError("config.json: id2label must give a text for each id; correct it")
    ids = {whole_number(key, "config.json: an id of id2label", 0, MAX_TOKEN_ID): key for key in given}
    if len(ids) < len(given):
        raise BundleError("config.json: id2label has an id twice, in two spellings; keep one")
    labels = tuple(str(given[ids[number]]) for number in sorted(ids))
    check_labels(labels, "config.json: id2label")
    return labels


def read_name(config: dict[str, Any], folder: Path) -> str:
    """Return `_name_or_path` from the content of config.json, or else the name of the folder.

    Raises:
        BundleError: the name is not a text, has more than 1,024 characters, or cannot be encoded as UTF-8.
    """
    stated = config.get("_name_or_path") or real_path(folder).name.encode(errors="replace").decode()
    if not isinstance(stated, str):
        raise BundleError("config.json: _name_or_path must be a text; correct it")
    return check_length(stated, "config.json: _name_or_path")


def read_positions(config: dict[str, Any]) -> int | None:
    """Return the number of tokens that the model has positions for; None if it is not stated or not plausible.

    It is `max_position_embeddings`, plausible from 1 to 99,999, less the position of the first token. So it can be 0 or
    negative if config.json is wrong.

    Args:
        config: content of config.json.

    Raises:
        BundleError: the padding token's id, from which some models count positions, is out of range.
    """
    positions = config.get("max_position_embeddings")
    if type(positions) is not int or not 0 < positions < _MAX_TOKENS:
        return None
    return positions - (read_first_position(config) or 0)


def read_first_position(config: dict[str, Any]) -> int | None:
    """Return the position of a text's first token; None if config.json does not state the model type.

    It is the padding token's id (1 if not stated) + 1 for the architectures in `_OFFSET`, and 0 for others.

    Args:
        config: content of config.json.

    Raises:
        BundleError: the padding token's id, from which some models count positions, is out of range.
    """
    if not config.get("model_type"):
        return None
    return read_token_id(config, "pad_token_id", 1) + 1 if config["model_type"] in _OFFSET else 0


def transformer_folder(folder: Path) -> Path:
    """Return the folder of the encoder's own files.

    It is the folder of the first module if `modules.json` lists a Transformer first, such as `0_Transformer` in the
    older layout; otherwise `folder` itself.

    Raises:
        BundleError: as `read_modules` does.
    """
    modules = read_modules(folder)
    if not modules or modules[0][0] != "Transformer":
        return folder
    return folder / modules[0][1]


def read_transformer(folder: Path) -> dict[str, Any]:
    """Return the settings of the Transformer module, such as `max_seq_length` and `do_lower_case`.

    The settings are in `sentence_bert_config.json` or another file of `_TRANSFORMER_CONFIGS`. The result is empty if
    there is none of these files. The result is empty without modules.json, too, since sentence-transformers does not
    read the files then.

    Raises:
        BundleError: one of the files is too large or not a JSON object, or `modules.json` is wrong.
    """
    if not (folder / "modules.json").exists():
        return {}
    place = transformer_folder(folder)
    return next(filter(None, (read_json(place / name) for name in _TRANSFORMER_CONFIGS)), {})


def tokenizer_keywords(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the dicts of keywords with which sentence-transformers loads the tokenizer; the first takes precedence.

    Args:
        settings: the settings of the Transformer module, as `read_transformer` returns them.
    """
    stated = (settings.get(name) for name in ("processor_kwargs", "tokenizer_args"))
    return [keywords for keywords in stated if isinstance(keywords, dict)]


def read_max_tokens(folder: Path, config: dict[str, Any]) -> int | None:
    """Return the number of tokens after which sentence-transformers truncates a text; None if no limit counts.

    The limit is that of the Transformer module or, if the module states none, that of `tokenizer_config.json`, but at
    most the number of positions. If that limit is 100,000 or more, less than 1 or no number, only the number of
    positions counts. A number of positions of 100,000 or more, or less than 1, does not count.

    Args:
        folder: the model's folder.
        config: content of config.json.

    Raises:
        BundleError: a file is too large or not a JSON object, `modules.json` is wrong, or the padding token's id is out
            of range.
    """
    settings = read_transformer(folder)
    stated = [
        *(each.get(key) for each in tokenizer_keywords(settings) for key in _LENGTH_KEYS),
        settings.get("max_seq_length"),
        *(read_json(transformer_folder(folder) / "tokenizer_config.json").get(key) for key in _LENGTH_KEYS),
    ]
    own = next((limit for limit in stated if limit is not None), None)
    limits = [limit for limit in map(_limit, (own, read_positions(config))) if limit]
    return min(limits, default=None)


def _limit(value: object) -> int:
    """Return a limit in tokens, rounded down; 0 if the value is no number, is below 1, or is `_MAX_TOKENS` or more."""
    stated = isinstance(value, (int, float)) and not isinstance(value, bool) and 1 <= value < _MAX_TOKENS
    return int(value) if stated and isinstance(value, (int, float)) else 0


def read_sentence_transformers(folder: Path) -> dict[str, Any]:
    """Return the content of `config_sentence_transformers.json`; empty if the file is missing.

    Raises:
        BundleError: the file is too large or not a JSON object, states another `model_type` than `SentenceTransformer`,
            whose model does not return one vector for a text, or states `truncate_dim`.
    """
    settings = read_json(folder / "config_sentence_transformers.json")
    kind = settings.get("model_type", "SentenceTransformer")
    if kind != "SentenceTransformer":
        raise BundleError(
            f"{folder} is a {kind if isinstance(kind, str) else 'model of unknown kind'}, which does not return one "
            "vector for a text; choose a SentenceTransformer"
        )
    if settings.get("truncate_dim") is not None:
        raise BundleError(
            f"{folder / 'config_sentence_transformers.json'}: truncate_dim is not supported; remove it, and ask for "
            "the number of dimensions that you want in each call"
        )
    return settings


def read_prompts(settings: dict[str, Any]) -> Prompts:
    """Return the prompts of queries and of passages by their usual names, or else the default prompt.

    If prompts of several usual names are stated, the first that is not empty counts: sentence-transformers 5 writes an
    empty `document` beside a `passage`. If all of these are empty, there is no prompt, even if there is a default. A
    prompt that is null counts as not stated.

    Args:
        settings: content of `config_sentence_transformers.json`.

    Raises:
        BundleError: `prompts` does not map names to texts or null.
    """
    prompts = settings.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(isinstance(text, str) or text is None for text in prompts.values()):
        raise BundleError("config_sentence_transformers.json: prompts must be texts by name; get the model again")
    name = settings.get("default_prompt_name")
    default = (prompts.get(name) if isinstance(name, str) else None) or ""

    def first(names: tuple[str, ...]) -> str:
        stated = [text for name in names if (text := prompts.get(name)) is not None]
        return next(filter(None, stated), "" if stated else default)

    return Prompts(query=first(_QUERY_NAMES), passage=first(_PASSAGE_NAMES))
