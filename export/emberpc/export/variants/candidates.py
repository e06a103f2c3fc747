"""The variants that can be made, each with its file and the bound that it keeps to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx

from emberpc.bundle import Bound
from emberpc.export.runner import Feeds
from emberpc.export.variants import surgery
from emberpc.export.variants.outliers import find_outliers

#: Other orders of the same float32 operations.
_SAME = Bound(
    cosine_min=0.9999,
    difference_max=0.001,
    cosine_mean=0.9999,
    neighbour_agreement=0.99,
    label_agreement=0.995,
    accuracy_share=0.995,
    ndcg_share=0.995,
)
#: Eleven bits of each weight are kept: one in ten thousand of its size is lost.
_FP16 = Bound(
    cosine_min=0.999,
    difference_max=0.02,
    cosine_mean=0.9999,
    neighbour_agreement=0.98,
    label_agreement=0.99,
    accuracy_share=0.99,
    ndcg_share=0.99,
)
#: Measured on all-MiniLM-L6-v2 (docs/variants.md): see there what each figure is. The least cosine and the greatest
#: difference are for any text on any host, and so leave room. Below 0.9 of the neighbours a search is another search.
_INT8 = Bound(
    cosine_min=0.96,
    difference_max=0.3,
    cosine_mean=0.99,
    neighbour_agreement=0.92,
    label_agreement=0.97,
    accuracy_share=0.99,
    ndcg_share=0.99,
)
#: Nearer to fp32 than weights with one scale for a whole matrix, which are known to be bad (a cosine of 0.963).
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
    """What a variant is made of.

    Args:
        model: the graph of fp32; `make` may change it.
        model_type: of the encoder's config.json.
        texts: some texts, each a batch of its own, to see what values come up.
    """

    model: onnx.ModelProto
    model_type: str
    texts: Sequence[Feeds]


@dataclass(frozen=True)
class Candidate:
    """A variant that can be made.

    `make` gives the graph, or raises ExportError where it cannot be made of this model.
    """

    name: str
    #: In the bundle; the name that sentence-transformers and optimum give such a file, where they have one.
    path: str
    bound: Bound
    make: Callable[[Material], onnx.ModelProto]


def _optimized(material: Material) -> onnx.ModelProto:
    return surgery.fuse(material.model, material.model_type)


def _int8(material: Material) -> onnx.ModelProto:
    surgery.split_outliers(material.model, find_outliers(material.model, material.texts))
    return _int8_fast(material)


def _int8_fast(material: Material) -> onnx.ModelProto:
    surgery.quantize(material.model)
    surgery.quantize_tables(material.model)
    return material.model


def _fp16(material: Material) -> onnx.ModelProto:
    surgery.store_as_fp16(material.model)
    return material.model


#: In the order in which they are tried and written.
CANDIDATES = (
    Candidate("optimized", "onnx/model_O2.onnx", _SAME, _optimized),
    Candidate("int8", "onnx/model_qint8_avx2.onnx", _INT8, _int8),
    Candidate("int8-fast", "onnx/model_qint8_avx2_fast.onnx", _INT8_FAST, _int8_fast),
    Candidate("fp16", "onnx/model_fp16.onnx", _FP16, _fp16),
)
