"""The manifest `emberpc.json`: what a bundle says of itself, as a typed object."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from emberpc.bundle.bounds import Bound
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
    is_unicode,
    whole_number,
)

MANIFEST_NAME = "emberpc.json"
#: Grows when an older reader could misunderstand a newer bundle.
FORMAT_VERSION = 1

T = TypeVar("T")


class Task(str, Enum):
    """What a model does."""

    EMBEDDING = "embedding"
    CLASSIFICATION = "classification"


@dataclass(frozen=True)
class FileEntry:
    """A file of the bundle: SHA-256 in hex, and size in bytes."""

    sha256: str
    size: int


@dataclass(frozen=True)
class Parity:
    """How near a variant comes to PyTorch's fp32, measured at export on real texts."""

    texts: int
    max_abs_diff: float
    cosine_min: float
    #: Share of texts with the same best label; 1 for an embedder.
    label_agreement: float = 1.0


@dataclass(frozen=True)
class Measured:
    """What a variant is worth, measured at export against fp32 on real texts, on one core of the exporting host."""

    texts: int
    cosine_min: float
    cosine_mean: float
    #: Mean share of a text's 10 nearest that are among fp32's 10 nearest.
    neighbour_agreement: float
    texts_per_cpu_second: float
    #: Texts per CPU-second as a multiple of fp32's: the median of runs in turns.
    speedup: float
    load_seconds: float
    size_bytes: int
    #: Share of texts with the same best label as fp32 gives; 1 for an embedder.
    label_agreement: float = 1.0
    #: Share of texts with the right label (multi-label: exactly the right ones); None for an embedder.
    accuracy: float | None = None
    #: nDCG@10 of the validation file's queries; None: it had none.
    ndcg_at_10: float | None = None


@dataclass(frozen=True)
class Variant:
    """One ONNX file of the model, such as `fp32`."""

    name: str
    path: str
    parity: Parity
    #: What it keeps to against fp32; None: it is fp32, and comes as near to PyTorch as float32 allows.
    bound: Bound | None = None
    #: None: the bundle is of a time before it was measured.
    measured: Measured | None = None


@dataclass(frozen=True)
class Prompts:
    """What the server puts before a text; empty where the model wants nothing."""

    query: str = ""
    passage: str = ""


@dataclass(frozen=True)
class Manifest:
    """All that a server needs to know of a model, and where it comes from."""

    task: Task
    #: Name of the model exported: a hub id, or the name of its folder.
    base_model: str
    revision: str
    #: SHA-256 (hex) of the weights that were converted.
    weights_sha256: str
    dimensions: int
    #: `mean`, `cls`, `max` or `lasttoken`.
    pooling: str
    #: Whether the graph gives vectors of length 1.
    normalize: bool
    #: The most tokens of a text, special tokens and prompt included.
    max_tokens: int
    pad_token_id: int
    variants: tuple[Variant, ...]
    prompts: Prompts = Prompts()
    matryoshka_dimensions: tuple[int, ...] = ()
    #: CLASSIFICATION: in the order of the logits.
    labels: tuple[str, ...] = ()
    multi_label: bool = False
    #: Multi-label: the probability from which each label is given. Empty: 0.5.
    thresholds: tuple[float, ...] = ()
    #: Divides the logits before they become probabilities.
    temperature: float = 1.0
    #: A text whose best logit, before the temperature, is below this is out of scope; None: none is.
    rejection_logit: float | None = None
    #: How a classifier was fine-tuned, such as `linear`.
    strategy: str = ""
    #: Figures measured at export, such as `accuracy`.
    quality: dict[str, float] = field(default_factory=dict)
    #: Variants that were tried and not kept, each with the reason.
    dropped: dict[str, str] = field(default_factory=dict)
    #: Which texts the variants were measured on, in words; empty: the bundle is of a time before that was kept.
    measured_on: str = ""
    #: Whether `max_tokens` is what a user asked for, and not where the source's own library cuts texts.
    max_tokens_stated: bool = False
    #: Versions of the tools used.
    tools: dict[str, str] = field(default_factory=dict)
    #: When it was made, ISO 8601 in UTC.
    created: str = ""
    #: Every file of the bundle but the manifest, by its path.
    files: dict[str, FileEntry] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        """Check what types alone do not say.

        Raises:
            BundleError: a value is out of range or contradicts another.
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

    def _check_limits(self) -> None:
        """Refuse numbers, texts and lists beyond `emberpc.bundle.limits`.

        Raises:
            BundleError: one is beyond its limit.
        """
        numbers = {
            "dimensions": (1, MAX_DIMENSIONS),
            "max_tokens": (1, MAX_TOKENS),
            "pad_token_id": (0, MAX_TOKEN_ID),
        }
        for name, (least, most) in numbers.items():
            whole_number(getattr(self, name), f"{MANIFEST_NAME}: {name}", least, most)
        check_labels(self.labels, f"{MANIFEST_NAME}: labels")
        counts = {
            "matryoshka_dimensions": MAX_MATRYOSHKA_DIMENSIONS,
            "variants": MAX_VARIANTS,
            "thresholds": MAX_LABELS,
            **dict.fromkeys(("quality", "dropped", "tools", "files"), MAX_ENTRIES),
        }
        for name, most in counts.items():
            check_count(len(getattr(self, name)), f"{MANIFEST_NAME}: {name}", most)
        for name in ("base_model", "revision", "weights_sha256", "pooling", "strategy", "created"):
            check_length(getattr(self, name), f"{MANIFEST_NAME}: {name}")
        for name, text in (*vars(self.prompts).items(), ("measured_on", self.measured_on)):
            check_length(text, f"{MANIFEST_NAME}: {name}", MAX_TEXT_LENGTH)
        for variant in self.variants:
            for text in (variant.name, variant.path):
                check_length(text, f"{MANIFEST_NAME}: a variant's name or path")
        for table in ("quality", "dropped", "tools", "files"):
            for key in getattr(self, table):
                check_length(key, f"{MANIFEST_NAME}: a key of {table}")

    def variant(self, name: str = "") -> Variant:
        """Return the variant of a name, or the first one for an empty name.

        Raises:
            BundleError: there is none of that name.
        """
        for variant in self.variants:
            if name in ("", variant.name):
                return variant
        have = ", ".join(variant.name for variant in self.variants)
        raise BundleError(f"there is no variant {name!r}; the bundle has: {have}")

    def legacy_fingerprint(self, variant: str = "") -> str:
        """Return the fingerprint (hex) by which collections were bound before `Bundle.fingerprint`.

        It is made of what the manifest says, not of the files, and proves nothing about them.
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
        """Return the manifest as it is written to the bundle."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Read a manifest.

        Raises:
            BundleError: the text is not JSON, is of a newer format, or a field is missing or of a wrong type.
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
        if version != FORMAT_VERSION:
            raise BundleError(
                f"{MANIFEST_NAME}: format_version is {reprlib.repr(version)}, this emberpc reads {FORMAT_VERSION}; "
                "export the model again, or install the emberpc that wrote it"
            )
        return _read(cls, data, "")


def _read(kind: type[T], data: Mapping[str, Any], where: str) -> T:
    """Build a dataclass from JSON, checking every type. Unknown fields are left: a newer writer may add some."""
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
    """Check one value against its type."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is UnionType:  # what may be None
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
    if hint is float and type(value) in (int, float) and _is_finite(value):
        return float(value)
    if (hint is bool and type(value) is bool) or (hint is str and type(value) is str and is_unicode(value)):
        return value
    if hint is int and type(value) is int:
        return whole_number(value, f"{MANIFEST_NAME}: {path}", -MAX_INTEGER, MAX_INTEGER)
    kind = getattr(hint, "__name__", hint)
    raise BundleError(f"{MANIFEST_NAME}: {path} is {reprlib.repr(value)}, which is not of type {kind}")


def _is_finite(number: float) -> bool:
    """Return False for NaN, infinities and integers that no float can hold: JSON as Python reads it has them all."""
    try:
        return math.isfinite(number)
    except OverflowError:
        return False
