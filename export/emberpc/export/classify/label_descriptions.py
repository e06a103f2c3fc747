"""Add descriptions to labels: given ones, or the labels' names if the names help to classify the texts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from emberpc.bundle import best_labels
from emberpc.export.classify.cached_encoder import CachedEncoder
from emberpc.export.classify.strategies import STRATEGIES, Options
from emberpc.export.data.examples import Examples, label_names

#: Label names become descriptions only if the accuracy of a zero-shot classifier by these names exceeds the share of
#: the most frequent label by more than this. Accuracy and share count texts, in [0, 1].
_MIN_GAIN = 0.1


def described_examples(examples: Examples, descriptions: tuple[str, ...], cached_encoder: CachedEncoder) -> Examples:
    """Return the examples with label descriptions, or without if none are given and the labels' names do not help.

    Args:
        examples: labelled texts.
        descriptions: the descriptions of the labels; empty: use the labels' names if they help to classify; see
            `names_help`.
        cached_encoder: the encoder to try the names with.
    """
    if descriptions:
        return replace(examples, descriptions=descriptions)
    named = replace(examples, descriptions=label_names(examples.labels))
    return named if names_help(named, cached_encoder) else examples


def names_help(named: Examples, cached_encoder: CachedEncoder) -> bool:
    """Return whether zero-shot classification by the descriptions is clearly better than the most frequent label.

    The share of texts that have the label whose description is nearest must exceed the share of texts with the most
    frequent label by more than 0.1.

    Args:
        named: labelled texts with descriptions; at least one text.
        cached_encoder: the encoder whose vectors are compared.
    """
    best = best_labels(STRATEGIES["zero-shot"].fit(named, cached_encoder, Options()).classify(named.texts))
    right = named.targets[np.arange(len(best)), best].mean()
    return bool(right > named.targets.mean(axis=0).max() + _MIN_GAIN)
