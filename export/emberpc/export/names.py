"""Names from which callers of the export choose. Importing this module is fast: it loads no library."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Literal, TypeAlias, get_args

from emberpc.export.errors import ExportError

#: Strategies whose result can be exported as a bundle, roughly from the cheapest training to the most expensive.
ExportableStrategy: TypeAlias = Literal["zero-shot", "centroids", "linear", "top-layers", "contrastive", "full"]
EXPORTABLE: tuple[str, ...] = get_args(ExportableStrategy)
#: All strategies of a comparison.
STRATEGY_NAMES = ("tf-idf", "zero-shot", "nearest", "centroids", "linear", "top-layers", "contrastive", "full")

#: Name of the variant that every bundle has. It is the first variant, and the one that a server uses by default.
FP32 = "fp32"
#: Name with which a caller asks for all candidates that meet their bounds and are worth their space.
AUTO = "auto"
#: Names of the variants that an export can make and measure.
CANDIDATE_NAMES = ("int8", "int8-fast", "int8-static", "fp16")


#: Packages of the extra `int8-static`, which the variant of that name needs.
_STATIC, _STATIC_PACKAGES = "int8-static", ("nncf", "openvino")


def check_strategies(names: Sequence[str]) -> None:
    """Validate names of strategies to compare; raise ExportError if one is unknown."""
    for name in names:
        if name not in STRATEGY_NAMES:
            raise ExportError(f"there is no strategy {reprlib.repr(name)}; there are: {', '.join(STRATEGY_NAMES)}")


def check_variants(names: Sequence[str]) -> None:
    """Validate names of variants.

    Raises:
        ExportError: a name is unknown, `auto` is combined with other names than `fp32`, or a named variant needs an
            extra that is not installed.
    """
    known = (FP32, *CANDIDATE_NAMES)
    for name in names:
        if name not in (*known, AUTO):
            raise ExportError(f"there is no variant {reprlib.repr(name)}; there are: {', '.join(known)}, or {AUTO}")
    if AUTO in names and set(names) - {AUTO, FP32}:
        raise ExportError(f"{AUTO} tries all variants; give it alone, or name the variants without {AUTO}")
    if _STATIC in names and (missing := [package for package in _STATIC_PACKAGES if find_spec(package) is None]):
        raise ExportError(f"the variant {_STATIC} needs {missing[0]}; install the extra `{_STATIC}`")


def check_rates(rejection_rate: float, max_false_rejections: float) -> None:
    """Validate the shares of texts that a classifier may reject; raise ExportError unless they are in [0, 1)."""
    if not 0 <= rejection_rate < 1:
        raise ExportError(f"the rejection rate is {rejection_rate}; it must be at least 0 and less than 1")
    if not 0 <= max_false_rejections < 1:
        raise ExportError(
            f"the share of false rejections is {max_false_rejections}; it must be at least 0 and less than 1"
        )
