"""Refuse a foreign folder whose settings contradict its `tokenizer.json`.

The server tokenizes with `tokenizer.json` alone. transformers and sentence-transformers also read
`tokenizer_config.json`, `special_tokens_map.json` and the settings of the Transformer module, and change the tokenizer
by these settings. If the settings agree with `tokenizer.json`, the tokens are the same. If they differ, the server's
vectors would differ from those of the library, so the folder is refused.

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
from emberpc.bundle.peers import read_json, read_transformer, tokenizer_keywords, transformer_folder
from emberpc.bundle.reading import TOKENIZER_NAME

_Settings = Mapping[str, Any]

#: Settings of the normalizer of BERT's tokenizers: key in `tokenizer_config.json`, key in `tokenizer.json`, and value
#: if a key is missing.
_NORMALIZER = (
    ("do_lower_case", "lowercase", True),
    ("strip_accents", "strip_accents", None),
    ("tokenize_chinese_chars", "handle_chinese_chars", True),
)
#: Classes of tokenizers, without the suffixes Tokenizer and Fast, that apply the settings `_NORMALIZER`; all other
#: classes ignore these settings.
_BERT_LIKE = ("Bert", "DistilBert", "Electra", "MPNet", "MobileBert", "ConvBert", "SqueezeBert", "LayoutLM", "Funnel")
#: Classes of tokenizers, without the suffixes Tokenizer and Fast, that make the post-processor from the settings
#: `add_bos_token` and `add_eos_token`.
_LLAMA_LIKE = ("Llama", "CodeLlama", "Gemma", "Cohere", "GPTNeoX")
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
#: Keywords of the Transformer module's tokenizer that are allowed: they do not change tokens, or other code checks or
#: reads them.
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
    """Refuse a folder whose settings change the tokenizer that `tokenizer.json` describes.

    Args:
        folder: the foreign folder.
        feeds_types: whether the graph has an input for token types, which the server fills with zeros.
        contents: reads `tokenizer.json`; None: it is read from disk.

    Raises:
        BundleError: a setting contradicts `tokenizer.json` or is not supported, and the error names the setting; or a
            file cannot be read.
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

    `template` has the items of the template for a single text, `type_ids` their token types. `lowers` says whether the
    tokenizer lower-cases texts. The constructor raises BundleError if the file cannot be read or is no tokenizer.
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
    """Return the items of the post-processor's template for a single text, in order; empty without a template.

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
    """Yield a step of a normalizer or post-processor and, recursively, the steps that it lists under `key`."""
    yield step
    for inner in step.get(key) or ():
        yield from _steps(_object(inner), key)


def _keywords(folder: Path) -> dict[str, Any]:
    """Return the keywords with which sentence-transformers loads the tokenizer of a folder.

    Raises:
        BundleError: the folder states a keyword that is not supported, or `processing_kwargs`.
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
    """Yield key, stated value and value in `tokenizer.json` of each setting of the normalizer whose values differ.

    Only BERT's normalizer has such settings, and only tokenizers of some classes apply them.
    """
    normalizer = tokenizer.normalizer
    if normalizer.get("type") != "BertNormalizer":
        return
    known = _has_class(settings, _BERT_LIKE)
    if not known and settings.get("tokenizer_class"):
        return
    for key, own, default in _NORMALIZER:
        # If no class is stated, transformers takes the class for the model type in config.json. Whether that class
        # applies its defaults is then unknown, so only stated values are compared.
        if key in settings or known:
            value, found = settings.get(key, default), normalizer.get(own, default)
            if value != found:
                yield key, value, found


def _prefix_conflicts(tokenizer: _Tokenizer, settings: _Settings) -> _Conflicts:
    """Yield key, stated value and value in `tokenizer.json` of `add_prefix_space`, if the two values differ.

    The setting says whether a blank is put before a text. transformers takes false if it is not stated. Only a
    ByteLevel pre-tokenizer has the setting.
    """
    own = tokenizer.pre_tokenizer
    if own.get("type") == "ByteLevel":
        value, found = bool(settings.get("add_prefix_space", False)), own.get("add_prefix_space")
        if found is not None and value != found:
            yield "add_prefix_space", value, found


def _end_token_conflicts(tokenizer: _Tokenizer, settings: _Settings) -> _Conflicts:
    """Yield key, stated value and value in `tokenizer.json` of `add_bos_token` and `add_eos_token`, if the two differ.

    The settings say whether a special token is put before and after each text. Only tokenizers of some classes, such as
    Llama's, apply these settings. A setting that is not stated is no conflict.
    """
    template = tokenizer.template
    if not template or not _has_class(settings, _LLAMA_LIKE):
        return
    for key, place in (("add_bos_token", 0), ("add_eos_token", -1)):
        found = "SpecialToken" in template[place]
        if settings.get(key) is not None and bool(settings[key]) != found:
            yield key, settings[key], found


def _check_added_tokens(tokenizer: _Tokenizer, place: Path, settings: _Settings) -> None:
    """Raise BundleError if transformers would add tokens to the tokenizer, or change the flags of its tokens.

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
        own = tokenizer.added_tokens.get(_content(token))
        flags = ("lstrip", "rstrip", "single_word", "normalized")
        if own is None or any(own.get(flag) != token.get(flag, own.get(flag)) for flag in flags):
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
        listed = settings.get(key) or ()
        for token in listed.values() if isinstance(listed, dict) else listed:
            yield key, _content(token)


def _content(token: object) -> str:
    return str(token.get("content")) if isinstance(token, dict) else str(token)


def _check_case(folder: Path, tokenizer: _Tokenizer) -> None:
    """Raise BundleError if the model needs lower-cased texts and its tokenizer keeps the case.

    sentence-transformers lower-cases the texts itself if the model needs it; the server does not.
    """
    if read_transformer(folder).get("do_lower_case") and not tokenizer.lowers:
        raise BundleError(
            f"{folder} states do_lower_case, and its {TOKENIZER_NAME} keeps the case; add the normalizer Lowercase "
            "there, or export the model with `emberpc export embedding`"
        )
