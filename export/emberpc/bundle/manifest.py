"""The manifest `emberpc.json` of a bundle as a typed and validated object."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from emberpc.bundle.bounds import Bound
from emberpc.bundle.decision import DecisionRule
from emberpc.bundle.errors import BundleError
from emberpc.bundle.limits import (
    MAX_DIMENSIONS,
    MAX_ENTRIES,
    MAX_INTEGER,
    MAX_LABELS,
    MAX_MATRYOSHKA_DIMENSIONS,
    MAX_TEXT_LENGTH,
    MAX_TOKEN_ID,
    MAX_TOKENS,
    MAX_VARIANTS,
    check_count,
    check_labels,
    check_length,
    is_finite,
    is_unicode,
    whole_number,
)
from emberpc.bundle.scope import RejectionScore

MANIFEST_NAME = "emberpc.json"
#: Versions of the manifest's format that this reader understands. The version grows when an older reader could
#: misunderstand a newer bundle; a reader refuses manifests of any other version. A bundle has the lowest version whose
#: readers understand it. Version 2: the classifier has another rejection score than the best logit. Version 3: a
#: variant is for one engine only.
FORMAT_VERSIONS = (1, 2, 3)

T = TypeVar("T")


class Task(str, Enum):
    """The task of a model: to return vectors, or labels."""

    EMBEDDING = "embedding"
    CLASSIFICATION = "classification"


@dataclass(frozen=True)
class FileEntry:
    """A file of the bundle: SHA-256 in hex, and size in bytes."""

    sha256: str
    size: int


@dataclass(frozen=True)
class Parity:
    """Agreement of a variant with PyTorch's fp32, measured at export on `texts` texts.

    The compared outputs are the logits of a classifier, and the vectors of an embedding model. For a foreign folder
    nothing is measured: `texts` is 0, and the other figures are those of equal outputs.
    """

    texts: int
    #: Greatest absolute difference of one output value from PyTorch's.
    max_abs_diff: float
    #: Minimum cosine between the outputs of a text by the variant and by PyTorch.
    cosine_min: float
    #: Share of texts with the same best label as by PyTorch; 1 for an embedding model. Logits that differ by at most
    #: 1e-6 count as equal.
    label_agreement: float = 1.0


@dataclass(frozen=True)
class Measured:
    """Accuracy and speed of a variant, measured at export with one thread on `texts` texts.

    `cosine_min` and `cosine_mean` are the minimum and the mean cosine between a text's outputs by the variant and by
    fp32; outputs are the logits of a classifier, and the vectors of an embedding model. `texts_per_cpu_second` is the
    speed of running the variant, without tokenizing; it is measured on at most 127 of the texts. `load_seconds` is the
    wall time to load the variant. `size_bytes` counts the ONNX file and its external weights.
    """

    texts: int
    cosine_min: float
    cosine_mean: float
    #: Mean share of a text's 10 nearest texts that are also among the 10 nearest by fp32. With fewer than 20 texts,
    #: the number of nearest texts is half the number of texts.
    neighbour_agreement: float
    texts_per_cpu_second: float
    #: The variant's texts per CPU-second divided by fp32's: the median over rounds in which the two alternate. It is 1
    #: for fp32.
    speedup: float
    load_seconds: float
    size_bytes: int
    #: Share of texts with the same best label as by fp32; 1 for an embedding model.
    label_agreement: float = 1.0
    #: Share of texts with the right label (multi-label: exactly the right labels), without rejection; None for an
    #: embedding model.
    accuracy: float | None = None
    #: Mean nDCG@10 over the queries that the variant was measured on; None if there were no queries.
    ndcg_at_10: float | None = None


@dataclass(frozen=True)
class Variant:
    """One ONNX file of a model: its name, such as `fp32`, its path in the bundle, and its figures."""

    name: str
    path: str
    parity: Parity
    #: Accuracy that the variant must reach against fp32; None for a foreign folder, and for fp32, which is as near to
    #: PyTorch as float32 allows.
    bound: Bound | None = None
    #: Figures of the variant; None for a foreign folder, or if the emberpc that wrote the bundle measured no variants.
    measured: Measured | None = None
    #: The only engine that may run the variant: `openvino`, for int8 products with fixed ranges. Empty: any engine.
    engine: str = ""


@dataclass(frozen=True)
class Prompts:
    """Prompts that the server puts before the text of a query or of a passage; empty if the model needs none."""

    query: str = ""
    passage: str = ""


@dataclass(frozen=True)
class Manifest:
    """Settings, source, figures and files of a model; `Bundle.foreign` says how to call a foreign folder's graph."""

    task: Task
    #: Name of the exported encoder: one that the user gave, its name on a hub, or the name of its folder or package. Of
    #: a foreign folder: `_name_or_path` in config.json, else the name of the folder.
    base_model: str
    revision: str
    #: SHA-256 (hex) of the PyTorch weights that were converted, after any training. Of a foreign folder: SHA-256 of the
    #: hashes of its ONNX file and weight files, and of `Interface.legacy_text`.
    weights_sha256: str
    dimensions: int
    #: `mean`, `cls`, `max` or `lasttoken`. Of a foreign folder: also `in the graph` for an embedding model without a
    #: known pooling, and always `none` for a classifier.
    pooling: str
    #: Whether vectors are normalized to length 1: by the graph of a bundle, or by the server for a foreign folder.
    normalize: bool
    #: Maximum number of tokens of a text, special tokens and prompt included.
    max_tokens: int
    pad_token_id: int
    variants: tuple[Variant, ...]
    prompts: Prompts = Prompts()
    matryoshka_dimensions: tuple[int, ...] = ()
    #: Labels of a classifier, in the order of the logits.
    labels: tuple[str, ...] = ()
    multi_label: bool = False
    #: Multi-label: the threshold of each label's probability, in the order of `labels`. Empty: 0.5 for each label.
    thresholds: tuple[float, ...] = ()
    #: Number above 0 that divides the logits of a classifier before they become probabilities.
    temperature: float = 1.0
    #: Rejection threshold of the score `max_logit`: a text whose best logit, before the temperature, is below it is
    #: rejected. None: no text is, or the score is another one.
    rejection_logit: float | None = None
    #: Score that decides which texts are rejected. Any other score than `max_logit` needs format version 2.
    rejection_score: RejectionScore = RejectionScore.MAX_LOGIT
    #: Rejection threshold of any other score: a text whose score is below it is rejected. None if it is `max_logit`.
    rejection_threshold: float | None = None
    #: Description of the texts that the error rates of the rejection were measured on; empty if they were not.
    rejection_measured_on: str = ""
    #: Strategy by which the model was fine-tuned, such as `linear`; empty if it was not.
    strategy: str = ""
    #: Figures of the fine-tuning and of its result, by name, such as `train_texts` and `accuracy`; empty if the model
    #: was not fine-tuned.
    quality: dict[str, float] = field(default_factory=dict)
    #: Variants that an export with `auto` tried and did not keep: name and reason.
    dropped: dict[str, str] = field(default_factory=dict)
    #: Description of the texts that the variants were measured on; empty if they were not, see `Variant.measured`.
    measured_on: str = ""
    #: Whether the user stated `max_tokens`; otherwise it is the limit of tokens in the settings of the source.
    max_tokens_stated: bool = False
    #: Versions of the libraries that made the bundle, by name; empty for a foreign folder.
    tools: dict[str, str] = field(default_factory=dict)
    #: Time of the export, ISO 8601 in UTC; not validated, and empty for a foreign folder.
    created: str = ""
    #: All files of the bundle except the manifest, by path; of a foreign folder, tokenizer, ONNX file and weight files.
    files: dict[str, FileEntry] = field(default_factory=dict)
    format_version: int = 1

    def __post_init__(self) -> None:
        """Validate limits, variants' names, Matryoshka dimensions, temperature, labels and the number of thresholds.

        `from_json` validates the types; this method does not.

        Raises:
            BundleError: a value is out of range, is there twice, or contradicts another.
        """
        self._check_limits()
        if not self.variants:
            raise BundleError(f"{MANIFEST_NAME}: variants is empty; a bundle has at least one ONNX file")
        names = [variant.name for variant in self.variants]
        if len(set(names)) != len(names):
            raise BundleError(f"{MANIFEST_NAME}: two variants have the same name: {', '.join(names)}")
        for size in self.matryoshka_dimensions:
            if not 1 <= size <= self.dimensions:
                raise BundleError(
                    f"{MANIFEST_NAME}: matryoshka_dimensions has {size}; each must be from 1 to {self.dimensions}"
                )
        if self.temperature <= 0:
            raise BundleError(f"{MANIFEST_NAME}: temperature is {self.temperature}; it must be above 0")
        if self.task is Task.CLASSIFICATION and len(self.labels) < 2:
            raise BundleError(f"{MANIFEST_NAME}: a classifier needs at least two labels, labels has {len(self.labels)}")
        if len(set(self.labels)) != len(self.labels):
            raise BundleError(f"{MANIFEST_NAME}: labels holds the same label twice")
        if self.thresholds and len(self.thresholds) != len(self.labels):
            raise BundleError(f"{MANIFEST_NAME}: {len(self.thresholds)} thresholds for {len(self.labels)} labels")
        self._check_rejection()
        if self.format_version < 3 and (named := [variant.name for variant in self.variants if variant.engine]):
            raise BundleError(f"{MANIFEST_NAME}: the engine of the variant {named[0]} needs the format_version 3")

    def _check_rejection(self) -> None:
        """Validate that rejection score, thresholds and format version fit together.

        Raises:
            BundleError: one of them contradicts another.
        """
        score = self.rejection_score
        if score is RejectionScore.MAX_LOGIT:
            if self.rejection_threshold is not None:
                raise BundleError(f"{MANIFEST_NAME}: set rejection_logit for max_logit, not rejection_threshold")
            return
        if self.rejection_threshold is None or self.rejection_logit is not None:
            raise BundleError(
                f"{MANIFEST_NAME}: rejection_score is {score.value}; it needs rejection_threshold, and rejection_logit "
                "must be null"
            )
        if self.format_version < 2:
            raise BundleError(
                f"{MANIFEST_NAME}: rejection_score is {score.value}; it needs the format_version 2, so that a server "
                "that does not know this score refuses the bundle"
            )

    def _check_limits(self) -> None:
        """Validate numbers, texts, lists and the keys of tables against `emberpc.bundle.limits`.

        The values of tables are not validated here.

        Raises:
            BundleError: a value is too small, too great or too long, or a text has a lone surrogate.
        """
        numbers = {
            "dimensions": (1, MAX_DIMENSIONS),
            "max_tokens": (1, MAX_TOKENS),
            "pad_token_id": (0, MAX_TOKEN_ID),
        }
        for name, (minimum, maximum) in numbers.items():
            whole_number(getattr(self, name), f"{MANIFEST_NAME}: {name}", minimum, maximum)
        check_labels(self.labels, f"{MANIFEST_NAME}: labels")
        counts = {
            "matryoshka_dimensions": MAX_MATRYOSHKA_DIMENSIONS,
            "variants": MAX_VARIANTS,
            "thresholds": MAX_LABELS,
            **dict.fromkeys(("quality", "dropped", "tools", "files"), MAX_ENTRIES),
        }
        for name, maximum in counts.items():
            check_count(len(getattr(self, name)), f"{MANIFEST_NAME}: {name}", maximum)
        for name in ("base_model", "revision", "weights_sha256", "pooling", "strategy", "created"):
            check_length(getattr(self, name), f"{MANIFEST_NAME}: {name}")
        measured = (("measured_on", self.measured_on), ("rejection_measured_on", self.rejection_measured_on))
        for name, text in (*vars(self.prompts).items(), *measured):
            check_length(text, f"{MANIFEST_NAME}: {name}", MAX_TEXT_LENGTH)
        for variant in self.variants:
            for text in (variant.name, variant.path, variant.engine):
                check_length(text, f"{MANIFEST_NAME}: a variant's name, path or engine")
        for table in ("quality", "dropped", "tools", "files"):
            for key in getattr(self, table):
                check_length(key, f"{MANIFEST_NAME}: a key of {table}")

    def variant(self, name: str = "") -> Variant:
        """Return the variant of the given name, or the first variant for an empty name.

        Raises:
            BundleError: the bundle has no such variant.
        """
        for variant in self.variants:
            if name in ("", variant.name):
                return variant
        have = ", ".join(variant.name for variant in self.variants)
        raise BundleError(f"there is no variant {name!r}; the bundle has: {have}")

    @property
    def decision_rule(self) -> DecisionRule:
        """The rule by which the classifier decides on labels; without meaning for an embedding model."""
        known = self.rejection_score is RejectionScore.MAX_LOGIT
        threshold = self.rejection_logit if known else self.rejection_threshold
        return DecisionRule(self.temperature, self.thresholds, threshold, self.multi_label, self.rejection_score)

    def legacy_fingerprint(self, variant: str = "") -> str:
        """Return a variant's fingerprint (hex) of the old scheme, which collections from before the new scheme store.

        This fingerprint is computed from the manifest only, so it proves nothing about the files. It does not fit the
        vectors of some foreign folders, for which `Bundle.legacy_fingerprint` is empty. `Bundle.fingerprint` returns
        the fingerprint of the new scheme.

        Args:
            variant: name of the variant; empty: the first one.

        Raises:
            BundleError: the bundle has no such variant.
        """
        tokenizer = self.files.get("tokenizer.json")
        parts = {
            "weights": self.weights_sha256,
            "tokenizer": tokenizer.sha256 if tokenizer else "",
            "pooling": self.pooling,
            "prompts": dataclasses.asdict(self.prompts),
            "dimensions": self.dimensions,
            "normalize": self.normalize,
            "variant": self.variant(variant).name,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> str:
        """Return the manifest as the text of `emberpc.json`.

        Raises:
            ValueError: a float is not finite.
        """
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Parse a manifest.

        Raises:
            BundleError: the text is not a JSON object, has another format version, or a field is missing, has a wrong
                type or value, or contradicts another field.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BundleError(
                f"{MANIFEST_NAME} is not JSON; copy the bundle again or export the model again"
            ) from error
        if not isinstance(data, dict):
            raise BundleError(f"{MANIFEST_NAME} holds no JSON object")
        version = data.get("format_version")
        if type(version) is not int or version not in FORMAT_VERSIONS:
            raise BundleError(
                f"{MANIFEST_NAME}: format_version is {reprlib.repr(version)}, this emberpc reads "
                f"{', '.join(map(str, FORMAT_VERSIONS))}; "
                "export the model again, or install the emberpc that wrote it"
            )
        # The first exports wrote 0.0, for no rejection, to a field that now is the threshold of the later scores.
        threshold = data.get("rejection_threshold")
        if "rejection_score" not in data and threshold == 0 and threshold is not False:
            del data["rejection_threshold"]
        return _read(cls, data, "")


def _read(kind: type[T], data: Mapping[str, Any], where: str) -> T:
    """Build a dataclass from a JSON object and validate the type of each field.

    A missing field gets its default. Unknown fields are ignored, since a newer writer may have added them.

    Args:
        kind: the dataclass.
        data: the JSON object.
        where: path of the object in the manifest, with a dot at its end, for errors; empty for the manifest itself.

    Raises:
        BundleError: a field without a default is missing, or a field has a wrong type or value.
    """
    hints = get_type_hints(kind)
    values = {}
    for item in dataclasses.fields(kind):  # type: ignore[arg-type]  # only ever called with dataclasses
        path = f"{where}{item.name}"
        if item.name in data:
            values[item.name] = _value(hints[item.name], data[item.name], path)
        elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            raise BundleError(f"{MANIFEST_NAME}: {path} is missing")
    return kind(**values)


def _value(hint: Any, value: Any, path: str) -> Any:
    """Convert a JSON value to the type `hint`. An int is accepted as a float, and null if `hint` includes None.

    Raises:
        BundleError: the value, or a value in it, is of another type, is not a member of the enum `hint`, is a float
            that is not finite, an int below -`MAX_INTEGER` or above `MAX_INTEGER`, or a text with a lone surrogate.
            The message states `path`, the value's path in the manifest.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is UnionType:  # an optional field
        return None if value is None else _value(arguments[0], value, path)
    if origin is tuple and isinstance(value, list):
        return tuple(_value(arguments[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {
            _value(arguments[0], key, path): _value(arguments[1], item, f"{path}[{key!r}]")
            for key, item in value.items()
        }
    if dataclasses.is_dataclass(hint) and isinstance(hint, type) and isinstance(value, dict):
        return _read(hint, value, f"{path}.")
    if isinstance(hint, type) and issubclass(hint, Enum) and value in [member.value for member in hint]:
        return hint(value)
    if hint is float and type(value) in (int, float) and is_finite(value):
        return float(value)
    if (hint is bool and type(value) is bool) or (hint is str and type(value) is str and is_unicode(value)):
        return value
    if hint is int and type(value) is int:
        return whole_number(value, f"{MANIFEST_NAME}: {path}", -MAX_INTEGER, MAX_INTEGER)
    kind = getattr(hint, "__name__", hint)
    raise BundleError(f"{MANIFEST_NAME}: {path} is {reprlib.repr(value)}, which is not of type {kind}")
