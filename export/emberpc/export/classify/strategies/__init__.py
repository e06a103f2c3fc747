"""Strategies to make a classifier from an encoder and labelled texts, behind one interface."""

from __future__ import annotations

from emberpc.export.classify.strategies.base import Fitted, Options, Strategy
from emberpc.export.classify.strategies.contrastive import Contrastive
from emberpc.export.classify.strategies.frozen import Centroids, Linear, Nearest, ZeroShot
from emberpc.export.classify.strategies.layers import FullTuning, TopLayers
from emberpc.export.classify.strategies.lexical import TfIdf

#: All strategies by name: the baseline on words, the strategies on frozen vectors, and those that tune the encoder; in
#: the last two groups roughly from the cheapest training to the most expensive.
STRATEGIES: dict[str, Strategy] = {
    strategy.name: strategy
    for strategy in (
        TfIdf(),
        ZeroShot(),
        Nearest(),
        Centroids(),
        Linear(),
        TopLayers(),
        Contrastive(),
        FullTuning(),
    )
}

__all__ = ["STRATEGIES", "Fitted", "Options", "Strategy"]
