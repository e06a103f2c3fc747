"""How far a variant may be from fp32, and whether what it gave is within that."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from emberpc.bundle.errors import BundleError

#: Below this (a vector's length) there is no direction to compare.
_TINY = 1e-6


def cosines(expected: npt.NDArray[np.float32], got: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return the cosine of each row to that of the other, float32 (rows,); two rows of nothing are alike: 1."""
    lengths = np.stack([np.linalg.norm(expected, axis=1), np.linalg.norm(got, axis=1)])
    found = (expected * got).sum(axis=1) / np.maximum(lengths.prod(axis=0), _TINY**2)
    return np.asarray(np.where((lengths < _TINY).all(axis=0), 1.0, found), dtype=np.float32)


@dataclass(frozen=True)
class Bound:
    """What a variant keeps to, against fp32; export measures all of it, verify and serve what some texts can show.

    The first two hold for any text, so that a bundle's few reference texts can
    be held to them on any host; the others are means over many texts, and are
    measured at export alone.
    """

    #: Least cosine of a text's output to fp32's.
    cosine_min: float
    #: Greatest difference of one value, as a share of the largest magnitude among fp32's.
    difference_max: float
    #: Least mean cosine.
    cosine_mean: float = 0.0
    #: Least mean share of a text's 10 nearest that are among fp32's 10 nearest.
    neighbour_agreement: float = 0.0
    #: Classifiers only: least share of texts with the same best label, and least accuracy as a share of fp32's.
    label_agreement: float = 0.0
    accuracy_share: float = 0.0
    #: Least nDCG@10 as a share of fp32's, where there are queries to measure it with.
    ndcg_share: float = 0.0

    def __post_init__(self) -> None:
        """Check that every figure is a share.

        Raises:
            BundleError: one is not in [0, 1].
        """
        for name, value in vars(self).items():
            if not 0 <= value <= 1:
                raise BundleError(f"the bound {name} of a variant is {value}; it must be from 0 to 1")

    def faults(self, expected: npt.NDArray[np.float32], got: npt.NDArray[np.float32]) -> list[str]:
        """Say in what outputs are not near enough to those expected; empty if they are.

        Args:
            expected: what fp32 gave, float32 (texts, width).
            got: what the variant gives for the same texts, of that shape.
        """
        cosine = float(cosines(expected, got).min(initial=1.0))
        scale = float(np.abs(expected).max(initial=_TINY))
        difference = float(np.abs(expected - got).max(initial=0.0)) / scale
        found = []
        # Put so that NaN is a fault, too.
        if not cosine >= self.cosine_min:
            found.append(f"a cosine of {cosine:.6f}, its bound is {self.cosine_min}")
        if not difference <= self.difference_max:
            found.append(f"a difference of {difference:.4f} of the largest value, its bound is {self.difference_max}")
        return found
