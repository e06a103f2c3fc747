"""Refuse a foreign folder whose settings contradict its `tokenizer.json`.

The server tokenizes with `tokenizer.json` alone. transformers and sentence-transformers also read
`tokenizer_config.json`, `special_tokens_map.json` and the settings of the Transformer module, and change the tokenizer
by these settings. If a setting differs from `tokenizer.json`, the server's tokens may differ from those of the library,
and so may the vectors. Therefore the folder is refused.

The checks follow transformers 4.57 (`PreTrainedTokenizerFast.__init__` and the tokenizers of BERT, GPT-2 and
Llama) and sentence-transformers 5.7 (`Transformer`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from emberpc.bundle.contents import Contents
from emberpc.bundle.errors import BundleError
from emberpc.bundle.reading import TOKENIZER_NAME
from emberpc.bundle.transformers_settings import read_json, read_transformer, tokenizer_keywords, transformer_folder

_Settings = Mapping[str, Any]

#: Settings of the normalizer of BERT's tokenizers: key in `tokenizer_config.json`, key in `tokenizer.json`, and the
#: value that counts in a file without the key.
_NORMALIZER = (
    ("do_lower_case", "lowercase", True),
    ("strip_accents", "strip_accents", None),
    ("tokenize_chinese_chars", "handle_chinese_chars", True),
)
#: Classes of tokenizers, without the suffixes Tokenizer and Fast, that apply the settings `_NORMALIZER`. Of a stated
#: class that is not listed, these settings are not compared.
_BERT_LIKE = ("Bert", "DistilBert", "Electra", "MPNet", "MobileBert", "ConvBert", "SqueezeBert", "LayoutLM", "Funnel")
#: Classes of tokenizers, without the suffixes Tokenizer and Fast, that replace the post-processor by one made from the
#: settings `add_bos_token` and `add_eos_token`. Other classes do not, so these settings are not compared for them.
_LLAMA_LIKE = ("Llama", "CodeLlama", "Gemma", "Cohere", "GPTNeoX")
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
#: Keywords of the Transformer module's tokenizer that are allowed: they do not change tokens, or `check_tokenizer`
#: checks them, or `emberpc.bundle.transformers_settings.read_max_tokens` reads them.
_KNOWN_KEYWORDS = {
    *(key for key, _, _ in _NORMALIZER),
    *("add_prefix_space", "add_bos_token", "add_eos_token", "split_special_tokens", "truncation_side", "max_len"),
    *("model_max_length", "padding_side", "use_fast", "trust_remote_code", "token", "cache_dir", "revision"),
    *("local_files_only", "clean_up_tokenization_spaces", "model_input_names", *_SPECIAL_TOKENS),
}
_SAVE_AGAIN = (
    "save both again with transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR), "
    "or export the model with `emberpc export embedding`"
)


def check_tokenizer(folder: Path, *, feeds_types: bool, contents: Contents | None = None) -> None:
    """Refuse a folder for which the server may compute other tokens than sentence-transformers.

    Such a folder has a setting that contradicts `tokenizer.json`, or that the server does not support:
    `split_special_tokens`, truncation at the start of texts, lower-casing outside the tokenizer, an unknown keyword of
    the tokenizer, or token types other than 0.

    Args:
        folder: the foreign folder.
        feeds_types: whether the graph has an input for token types, which the server fills with zeros. If not, the
            token types of the tokenizer are not checked.
        contents: reads `tokenizer.json`; None: it is read from disk. Other files are read from disk.

    Raises:
        BundleError: the folder is refused, and the error names the setting; or a file cannot be read or is damaged.
    """
    tokenizer = _Tokenizer(folder / TOKENIZER_NAME, contents)
    place = transformer_folder(folder)
    stated = read_json(place / "tokenizer_config.json")
    keywords = _keywords(folder)
    settings = stated | keywords
    source = place / "tokenizer_config.json"
    for key, value, found in (
        *_normalizer_conflicts(tokenizer, settings),
        *_prefix_conflicts(tokenizer, settings),
        *_end_token_conflicts(tokenizer, settings),
    ):
        raise BundleError(
            f"{source}: {key} is {json.dumps(value)}, and {TOKENIZER_NAME} has {json.dumps(found)}; {_SAVE_AGAIN}"
        )
    if settings.get("split_special_tokens"):
        raise BundleError(f"{source}: split_special_tokens is not supported; set it to false, or choose another model")
    if str(settings.get("truncation_side") or tokenizer.truncation_side).lower() == "left":
        raise BundleError(
            f"{folder} states truncation_side left, and the server cuts the end of a long text; set it to right"
        )
    _check_added_tokens(tokenizer, place, settings)
    _check_case(folder, tokenizer)
    if feeds_types and any(tokenizer.type_ids):
        raise BundleError(
            f"{folder / TOKENIZER_NAME}: the post_processor sets a type_id other than 0, and the server feeds zeros; "
            "choose a model without token types"
        )


class _Tokenizer:
    """The parts of a `tokenizer.json` that settings can change.

    `normalizer` and `pre_tokenizer` are JSON objects, empty if the file has none. `truncation_side` is `Left`, `Right`,
    or empty without truncation. `added_tokens` has the JSON object of each added token by its text. `template` has the
    items of the template for a single text (see `_template`), and `type_ids` the token type of each item. `lowers` says
    whether the normalizer lower-cases texts. The constructor raises BundleError if the file cannot be read or is no
    tokenizer.
    """

    def __init__(self, path: Path, contents: Contents | None) -> None:
        try:
            data = json.loads(contents.read(path) if contents else path.read_bytes())
            self.normalizer = _object(data.get("normalizer"))
            self.pre_tokenizer = _object(data.get("pre_tokenizer"))
            self.truncation_side = str(_object(data.get("truncation")).get("direction", ""))
            self.added_tokens = {str(token["content"]): _object(token) for token in data.get("added_tokens") or ()}
            self.template = _template(_object(data.get("post_processor")))
            self.type_ids = [
                int(_object(value).get("type_id") or 0) for item in self.template for value in item.values()
            ]
            self.lowers = any(
                step.get("type") == "Lowercase" or step.get("lowercase") is True
                for step in _steps(self.normalizer, "normalizers")
            )
        except (OSError, ValueError, RecursionError, AttributeError, TypeError, KeyError) as error:
            raise BundleError(f"{path} is no tokenizer; get the model again") from error


def _template(post_processor: dict[str, Any]) -> list[_Settings]:
    """Return the items of the first template for a single text in a post-processor; empty without a template.

    An item is a JSON object with the key `SpecialToken` or `Sequence` (the tokens of the text).
    """
    for step in _steps(post_processor, "processors"):
        if step.get("type") == "TemplateProcessing":
            return [_object(item) for item in step.get("single") or ()]
    return []


def _object(value: object) -> dict[str, Any]:
    """Return `value` if it is a JSON object, or an empty object for null; raise TypeError for any other value."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise TypeError
    return value


def _steps(step: dict[str, Any], key: str) -> Iterator[dict[str, Any]]:
    """Yield a step of a normalizer or post-processor, then, recursively, the steps that the step lists under `key`."""
    yield step
    for inner in step.get(key) or ():
        yield from _steps(_object(inner), key)


def _keywords(folder: Path) -> dict[str, Any]:
    """Return the keywords with which sentence-transformers loads the tokenizer of a folder.

    Raises:
        BundleError: the Transformer module states a keyword that is not in `_KNOWN_KEYWORDS`, or `processing_kwargs`;
            or a file cannot be read.
    """
    settings = read_transformer(folder)
    found: dict[str, Any] = {}
    for keywords in reversed(tokenizer_keywords(settings)):
        found |= keywords
    if unknown := sorted(found.keys() - _KNOWN_KEYWORDS):
        raise BundleError(
            f"{folder}: the Transformer module states the tokenizer's keyword {unknown[0]}, which is not supported; "
            "export the model with `emberpc export embedding`"
        )
    if settings.get("processing_kwargs"):
        raise BundleError(
            f"{folder}: the Transformer module states processing_kwargs, which is not supported; "
            "export the model with `emberpc export embedding`"
        )
    return found


_Conflicts = Iterator[tuple[str, object, object]]


def _has_class(settings: _Settings, names: Sequence[str]) -> bool:
    return str(settings.get("tokenizer_class", "")).removesuffix("Fast").removesuffix("Tokenizer") in names


def _normalizer_conflicts(tokenizer: _Tokenizer, settings: _Settings) -> _Conflicts:
    """Yield key, stated value and value in `tokenizer.json` of each setting of `_NORMALIZER` whose values differ.

    A missing value counts as its default. Nothing is compared if the normalizer is not BERT's, or a class is stated
    that is not in `_BERT_LIKE`.
    """
    normalizer = tokenizer.normalizer
    if normalizer.get("type") != "BertNormalizer":
        return
    known = _has_class(settings, _BERT_LIKE)
    if not known and settings.get("tokenizer_class"):
        return
    for key, own, default in _NORMALIZER:
        # If no class is stated, transformers takes the class for the model type in config.json. This function does not
        # know whether that class applies defaults, so it compares only stated values.
        if key in settings or known:
            value, found = settings.get(key, default), normalizer.get(own, default)
            if value != found:
                yield key, value, found


def _prefix_conflicts(tokenizer: _Tokenizer, settings: _Settings) -> _Conflicts:
    """Yield key, stated value and value in `tokenizer.json` of `add_prefix_space`, if the two values differ.

    The setting says whether a space is put before a text. If it is not stated, its value is False, as in transformers.
    Only a ByteLevel pre-tokenizer is checked, and only if `tokenizer.json` states the setting.
    """
    own = tokenizer.pre_tokenizer
    if own.get("type") == "ByteLevel":
        value, found = bool(settings.get("add_prefix_space", False)), own.get("add_prefix_space")
        if found is not None and value != found:
            yield "add_prefix_space", value, found


def _end_token_conflicts(tokenizer: _Tokenizer, settings: _Settings) -> _Conflicts:
    """Yield key, stated value and value in `tokenizer.json` of `add_bos_token` and of `add_eos_token`, if these differ.

    `add_bos_token` says whether a special token is put before each text, `add_eos_token` whether one is put after it.
    A setting that is not stated is not compared. Nothing is compared if the class is not in `_LLAMA_LIKE`, or if
    `tokenizer.json` has no template.
    """
    template = tokenizer.template
    if not template or not _has_class(settings, _LLAMA_LIKE):
        return
    for key, place in (("add_bos_token", 0), ("add_eos_token", -1)):
        found = "SpecialToken" in template[place]
        if settings.get(key) is not None and bool(settings[key]) != found:
            yield key, settings[key], found


def _check_added_tokens(tokenizer: _Tokenizer, place: Path, settings: _Settings) -> None:
    """Raise BundleError if transformers would add tokens to the tokenizer, or change the flags of its added tokens.

    Transformers adds special tokens and tokens of `added_tokens_decoder` that `tokenizer.json` does not list as added
    tokens. BundleError is also raised if `special_tokens_map.json` cannot be read.

    Args:
        tokenizer: the content of `tokenizer.json`.
        place: the folder of `tokenizer_config.json`.
        settings: the settings of `tokenizer_config.json` and of the Transformer module.
    """
    config, decoder = place / "tokenizer_config.json", settings.get("added_tokens_decoder")
    sources: list[tuple[Path, _Settings]] = [(config, settings)]
    if decoder is None:  # with a decoder, transformers does not read the other file
        sources.append((place / "special_tokens_map.json", read_json(place / "special_tokens_map.json")))
    for path, source in sources:
        for key, content in _special_tokens(source):
            if content not in tokenizer.added_tokens:
                raise BundleError(
                    f"{path}: {key} has {content!r}, and the added_tokens of {TOKENIZER_NAME} do not; {_SAVE_AGAIN}"
                )
    for token in decoder.values() if isinstance(decoder, dict) else ():
        own, stated = tokenizer.added_tokens.get(_content(token)), token if isinstance(token, dict) else {}
        flags = ("lstrip", "rstrip", "single_word", "normalized")
        if own is None or any(own.get(flag) != stated.get(flag, own.get(flag)) for flag in flags):
            raise BundleError(
                f"{config}: added_tokens_decoder has {_content(token)!r}, which {TOKENIZER_NAME} "
                f"{'does not list' if own is None else 'lists with other flags'} in added_tokens; {_SAVE_AGAIN}"
            )


def _special_tokens(settings: _Settings) -> Iterator[tuple[str, str]]:
    """Yield the key and the text of each special token that the settings state."""
    for key in _SPECIAL_TOKENS:
        if settings.get(key):
            yield key, _content(settings[key])
    for key in ("additional_special_tokens", "extra_special_tokens"):
        listed = settings.get(key) or []
        if isinstance(listed, dict):
            listed = list(listed.values())
        for token in listed if isinstance(listed, list) else [listed]:
            yield key, _content(token)


def _content(token: object) -> str:
    return str(token.get("content")) if isinstance(token, dict) else str(token)


def _check_case(folder: Path, tokenizer: _Tokenizer) -> None:
    """Raise BundleError if the Transformer module states `do_lower_case` and the tokenizer keeps the case.

    With `do_lower_case`, sentence-transformers lower-cases the texts before the tokenizer; the server does not.
    """
    if read_transformer(folder).get("do_lower_case") and not tokenizer.lowers:
        raise BundleError(
            f"{folder} states do_lower_case, and its {TOKENIZER_NAME} keeps the case; add the normalizer Lowercase "
            "there, or export the model with `emberpc export embedding`"
        )
