"""Strategies that do not train the encoder: label descriptions, nearest examples, centroids, a linear head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from emberpc.bundle import Head, unit
from emberpc.bundle.evaluation import HeldOut
from emberpc.bundle.prototypes import class_means
from emberpc.export.classify.cached_encoder import CachedEncoder
from emberpc.export.classify.linear import Matrix, balanced_weights, cross_validate
from emberpc.export.classify.strategies.base import Fitted, Options, hold_out, no_texts, with_head
from emberpc.export.data.examples import Examples
from emberpc.export.errors import ExportError

#: Factor that turns a cosine, in [-1, 1], into a logit of a range that softmax can use. Calibration also fits a
#: temperature.
COSINE_SCALE = 10.0
#: Number of texts that `nearest` compares with all examples of a label at a time: a time limit stops it after a step,
#: and a step needs little memory (50 MB with 10,000 examples of a label).
_COMPARED = 1024


class _Frozen:
    """Base of the strategies that do not train the encoder."""

    def passes(self, examples: Examples, layers: int, *, quick: bool = False) -> float:
        """Return 0: the encoder is not trained."""
        return 0.0


@dataclass(frozen=True)
class ZeroShot(_Frozen):
    """Gives the label whose description has the vector nearest to the text's; the fit uses no training texts."""

    name: str = "zero-shot"
    exportable: bool = True
    tunes: bool = False
    served: bool = True
    uses_encoder: bool = True

    def fit(self, examples: Examples, cached_encoder: CachedEncoder, options: Options) -> Fitted:
        """Return a classifier whose head is made of the vectors of the label descriptions.

        The held-out texts are those of the validation file; without one, all `examples`: none of them is trained on.

        Raises:
            ExportError: there are no label descriptions.
        """
        if not examples.descriptions:
            raise ExportError("the strategy zero-shot needs label descriptions, and there are none; give them")
        head = label_head(cached_encoder.vectors(examples.descriptions))
        held_out = options.validation or examples  # the strategy learns from no text, so all texts are held out
        if not held_out.texts:
            return with_head(head, cached_encoder.vectors, no_texts(examples), cosines=True)
        logits = head.logits(cached_encoder.vectors(held_out.texts))
        rows = np.arange(0 if options.validation else len(examples.texts))
        found = HeldOut(logits, held_out.targets, rows, from_final_classifier=True)
        return with_head(head, cached_encoder.vectors, found, cosines=True)


@dataclass(frozen=True)
class Centroids(_Frozen):
    """Gives the label for which the mean vector of its examples is nearest to the text's vector."""

    name: str = "centroids"
    exportable: bool = True
    tunes: bool = False
    served: bool = True
    uses_encoder: bool = True

    def fit(self, examples: Examples, cached_encoder: CachedEncoder, options: Options) -> Fitted:
        """Return a classifier whose head is made of the mean vector of each label's texts and description.

        The held-out texts are those of the validation file; without one, `examples` are cross-validated.
        """

        def fit_head(known: Examples) -> Head:
            return label_head(class_means(cached_encoder.vectors(known.texts), known.targets))

        head = fit_head(examples.described())

        def classify(known: Examples, texts: Sequence[str]) -> Matrix:
            return fit_head(known.described()).logits(cached_encoder.vectors(texts))

        return with_head(head, cached_encoder.vectors, hold_out(classify, examples, options), cosines=True)


@dataclass(frozen=True)
class Nearest(_Frozen):
    """Gives the label of the nearest example. The strategy is not exportable: no linear head gives the same logits."""

    name: str = "nearest"
    exportable: bool = False
    tunes: bool = False
    served: bool = True
    uses_encoder: bool = True

    def fit(self, examples: Examples, cached_encoder: CachedEncoder, options: Options) -> Fitted:
        """Return a classifier that compares texts with all examples; compute and cache the examples' vectors now.

        The held-out texts are those of the validation file; without one, `examples` are cross-validated.
        """

        def classify(known: Examples, texts: Sequence[str]) -> Matrix:
            kept, vectors = unit(cached_encoder.vectors(known.texts)), unit(cached_encoder.vectors(texts))
            # The score of a label is the largest cosine to one of its examples; -1 for a label without examples.
            found = np.full((len(texts), len(known.labels)), -1.0, dtype=np.float32)
            for start in range(0, len(texts), _COMPARED):
                part = slice(start, start + _COMPARED)
                for label in np.flatnonzero(known.targets.any(axis=0)):
                    options.progress("comparing with the examples", start, len(texts))
                    found[part, label] = (vectors[part] @ kept[known.targets[:, label]].T).max(axis=1)
            return COSINE_SCALE * found

        described = examples.described()
        cached_encoder.vectors(described.texts)  # fills the cache
        return Fitted(
            lambda texts: classify(described, texts),
            hold_out(lambda known, texts: classify(known.described(), texts), examples, options),
            cosines=True,
        )


@dataclass(frozen=True)
class Linear(_Frozen):
    """Logistic regression on the encoder's vectors, with the regularization chosen by cross-validation."""

    name: str = "linear"
    exportable: bool = True
    tunes: bool = False
    served: bool = True
    uses_encoder: bool = True

    def fit(self, examples: Examples, cached_encoder: CachedEncoder, options: Options) -> Fitted:
        """Return a classifier whose head is fitted to the texts and label descriptions by logistic regression.

        The held-out texts are those of the validation file; without one, `examples` are cross-validated.
        """
        described = examples.described()
        found = cross_validate(
            cached_encoder.vectors(described.texts),
            described.targets,
            multi_label=examples.multi_label,
            weights=balanced_weights(described.targets) if options.balanced else None,
            always=len(described.texts) - len(examples.texts),
            seed=options.seed,
            progress=options.progress,
        )
        held_out = HeldOut(found.logits, described.targets[found.rows], found.rows)
        if options.validation is not None:
            logits = found.head.logits(cached_encoder.vectors(options.validation.texts))
            held_out = HeldOut(logits, options.validation.targets)
        return with_head(found.head, cached_encoder.vectors, held_out, figures={"regularisation_c": found.c})


def label_head(vectors: Matrix) -> Head:
    """Return the head whose logit for a label is `COSINE_SCALE` times the cosine of the text's and the label's vector.

    Args:
        vectors: one vector for each label, float32 (labels, dimensions), of any length.
    """
    return Head(np.ascontiguousarray(COSINE_SCALE * unit(vectors).T), np.zeros(len(vectors), dtype=np.float32))
