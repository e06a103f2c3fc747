"""The variants besides fp32 that an export can make, each with its path in the bundle and its accuracy bound."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx

from emberpc.bundle import Bound
from emberpc.export.convert.sessions import Feeds
from emberpc.export.variants import surgery
from emberpc.export.variants.outliers import find_outliers
from emberpc.export.variants.static_int8 import quantize_static

#: Bound for `fp16`. Weights keep eleven significant bits, so rounding changes a weight by at most 1/2,048 of its value.
#: Weights with a magnitude below 0.00006 keep fewer bits.
_FP16 = Bound(
    cosine_min=0.999,
    difference_max=0.02,
    cosine_mean=0.9999,
    neighbour_agreement=0.98,
    label_agreement=0.99,
    accuracy_share=0.99,
    ndcg_share=0.99,
)
#: Bound for `int8`, from measurements on all-MiniLM-L6-v2 (docs/variants.md). `verify` and the server check
#: `cosine_min` and `difference_max` on other hosts, so these two figures leave a margin.
_INT8 = Bound(
    cosine_min=0.96,
    difference_max=0.3,
    cosine_mean=0.99,
    neighbour_agreement=0.92,
    label_agreement=0.97,
    accuracy_share=0.99,
    ndcg_share=0.99,
)
#: Bound for `int8-fast`, which has no split outliers and is less accurate than `int8`. `cosine_mean` refuses a graph
#: whose weights have one scale for each matrix instead of one for each column: that graph had a mean cosine of 0.963.
_INT8_FAST = Bound(
    cosine_min=0.95,
    difference_max=0.4,
    cosine_mean=0.985,
    neighbour_agreement=0.88,
    label_agreement=0.96,
    accuracy_share=0.99,
    ndcg_share=0.99,
)


@dataclass(frozen=True)
class Material:
    """Input of `Candidate.make`, which makes a variant.

    Args:
        model: the fp32 graph; `make` may change it in place.
        texts: inputs of the graph for some texts, each a batch of one text; `int8` finds outlier columns with them.
        calibration: inputs of the graph for other texts, which no figure is measured on, each a batch of one text.
            `int8-static` takes its ranges from the values that they give.
    """

    model: onnx.ModelProto
    texts: Sequence[Feeds]
    calibration: Sequence[Feeds]


@dataclass(frozen=True)
class Candidate:
    """A variant that an export can make.

    `make` returns the variant's graph, which may be `Material.model`, changed in place. It raises ExportError if the
    variant cannot be made from the model, and OSError if the disk is full.
    """

    name: str
    #: Path of the variant's ONNX file in the bundle. If sentence-transformers or optimum has a name for files of this
    #: kind, the file has that name.
    path: str
    bound: Bound
    make: Callable[[Material], onnx.ModelProto]
    #: The only engine that may run the variant; empty: any engine.
    engine: str = ""
    #: Whether `make` uses `Material.calibration`.
    calibrated: bool = False


def _int8(material: Material) -> onnx.ModelProto:
    surgery.split_outliers(material.model, find_outliers(material.model, material.texts))
    return _int8_fast(material)


def _int8_fast(material: Material) -> onnx.ModelProto:
    surgery.quantize(material.model)
    surgery.quantize_tables(material.model)
    return material.model


def _int8_static(material: Material) -> onnx.ModelProto:
    return quantize_static(material.model, material.calibration)


def _fp16(material: Material) -> onnx.ModelProto:
    surgery.store_as_fp16(material.model)
    return material.model


#: All candidates. An export makes them in this order, and `auto` compares each with those that it kept before.
CANDIDATES = (
    Candidate("int8", "onnx/model_qint8_avx2.onnx", _INT8, _int8),
    Candidate("int8-fast", "onnx/model_qint8_avx2_fast.onnx", _INT8_FAST, _int8_fast),
    Candidate("int8-static", "onnx/model_qint8_static.onnx", _INT8, _int8_static, "openvino", calibrated=True),
    Candidate("fp16", "onnx/model_fp16.onnx", _FP16, _fp16),
)
