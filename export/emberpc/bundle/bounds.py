"""Bounds of a variant: the accepted difference of its outputs from those of fp32, and the check of outputs by them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from emberpc.bundle.errors import BundleError

#: Two vectors that are both shorter than this count as equal: they have no direction to compare. Also the minimum value
#: by which a difference is divided; its square is the minimum product of lengths by which a dot product is divided.
_TINY = 1e-6


def cosines(expected: npt.NDArray[np.float32], got: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return the cosine of each row of `expected` and the same row of `got`, float32 (rows,).

    It is 1 if both rows are shorter than 1e-6, and 0 if one row is zero and the other is not shorter than that.
    """
    lengths = np.stack([np.linalg.norm(expected, axis=1), np.linalg.norm(got, axis=1)])
    found = (expected * got).sum(axis=1) / np.maximum(lengths.prod(axis=0), _TINY**2)
    return np.asarray(np.where((lengths < _TINY).all(axis=0), 1.0, found), dtype=np.float32)


@dataclass(frozen=True)
class Bound:
    """Accuracy that a variant must reach, compared with fp32. Every figure is in [0, 1].

    Each text must meet `cosine_min` and `difference_max`. So `verify` and `serve` can check them on any host with a
    bundle's few reference texts. The other figures are means and shares over many texts, and only an export measures
    them; there, each but `cosine_mean` may miss its bound by one text, or one query.
    """

    #: Minimum cosine between the outputs of a text by the variant and by fp32.
    cosine_min: float
    #: Greatest difference of one value, as a share of the largest magnitude in fp32's outputs for all compared texts.
    difference_max: float
    #: Minimum mean, over the texts, of the cosine between the outputs by the variant and by fp32.
    cosine_mean: float = 0.0
    #: Embedding models only: minimum mean share of a text's 10 nearest texts that are also among the 10 nearest by
    #: fp32. With fewer than 20 texts, half as many nearest texts as texts are compared.
    neighbour_agreement: float = 0.0
    #: Classifiers only: minimum share of texts with the same best label as by fp32.
    label_agreement: float = 0.0
    #: Classifiers only: minimum accuracy of the variant, as a share of fp32's accuracy.
    accuracy_share: float = 0.0
    #: Minimum nDCG@10 of the variant, as a share of fp32's nDCG@10, if there are queries to measure it with.
    ndcg_share: float = 0.0

    def __post_init__(self) -> None:
        """Validate that every figure is in [0, 1].

        Raises:
            BundleError: a figure is not in [0, 1].
        """
        for name, value in vars(self).items():
            if not 0 <= value <= 1:
                raise BundleError(f"the bound {name} of a variant is {value}; it must be from 0 to 1")

    def faults(self, expected: npt.NDArray[np.float32], got: npt.NDArray[np.float32]) -> list[str]:
        """Check outputs against `cosine_min` and `difference_max`.

        Args:
            expected: the outputs to compare with, such as those of fp32, float32 (texts, dimensions or labels).
            got: outputs of the variant for the same texts, of the same shape.

        Returns:
            A message for each of the two figures that the outputs miss; an empty list if they meet both. Outputs with
            NaN miss both.
        """
        cosine = float(cosines(expected, got).min(initial=1.0))
        scale = float(np.abs(expected).max(initial=_TINY))
        difference = float(np.abs(expected - got).max(initial=0.0)) / scale
        found = []
        # `not >=` instead of `<`, so that NaN is a fault, too.
        if not cosine >= self.cosine_min:
            found.append(f"a cosine of {cosine:.6f}, its bound is {self.cosine_min}")
        if not difference <= self.difference_max:
            found.append(f"a difference of {difference:.4f} of the largest value, its bound is {self.difference_max}")
        return found
