"""The training: queries drawn to their passages and away from others, by multiple-negatives ranking."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from emberpc.export.encoder import Encoder
from emberpc.export.linear import Matrix
from emberpc.export.progress import Progress, no_progress
from emberpc.export.retrieval.data import Data, Queries
from emberpc.export.retrieval.embedder import Embedder
from emberpc.export.retrieval.measures import DECIDING, measure
from emberpc.export.retrieval.mining import Neighbours, mine
from emberpc.export.tuning.backbone import Backbone
from emberpc.export.tuning.checkpoint import Checkpoint, Checkpoints
from emberpc.export.tuning.loop import Recipe, shuffled, train

#: Cosines are divided by it. docs/decisions/0013 has what was tried, here and below.
_TEMPERATURE = 0.05
#: Mined for each query; an epoch draws of them.
_MINED = 4
#: Passages that the epochs are compared on: what answers the held-out queries, and what is nearest to them.
_POOL = 1000
#: How much of the way from the original weights to the trained ones (Wortsman et al., "Robust fine-tuning of zero-shot
#: models", 2022); the original ones are a candidate, too.
_SHARES = (1.0, 0.75, 0.5)


Weights = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Options:
    """How to train."""

    seed: int = 0
    epochs: int = 3
    #: Upper layers to train; default: a third of them.
    layers: int | None = None
    #: Hard negatives of each query in a batch, beside the passages of the others.
    hard_negatives: int = 1
    encoder_rate: float = 1e-4
    batch: int = 32
    #: Where the training keeps what it needs to be resumed; whoever stores the outcome removes that.
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    progress: Progress = no_progress


@dataclass(frozen=True)
class Outcome:
    """Trained parameters by name, of how many upper layers, and what was measured; see `tune`."""

    weights: Weights
    top: int
    backbone: Backbone
    figures: dict[str, float] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write the tuned encoder, in sentence-transformers' form."""
        self.backbone.save(self.weights, self.top, folder)


def tune(data: Data, encoder: Encoder, options: Options) -> Outcome:
    """Tune an encoder, choosing epoch and share of the trained weights by nDCG@10 of the held-out queries.

    Returns:
        The weights, which are the original ones if none were better, and figures: `held_out_X_before` and `_after`,
        and `test_X_…` if there are test queries, for each X of `measure`, among all passages; `epochs` and `share`
        that were chosen (0: the original weights), `layers_tuned`, and `mined_negatives`.

    Raises:
        ExportError: the encoder cannot be trained, or the loss is no longer a number.
    """
    return _Tuning(data, encoder, options).run()


class _Tuning:
    """One training; texts have their prompts before them here."""

    def __init__(self, data: Data, encoder: Encoder, options: Options) -> None:
        self._data = data
        self._encoder = encoder
        self._options = options
        self._backbone = Backbone(encoder)
        layers = self._backbone.layers
        self._top = min(layers, options.layers or max(1, layers // 3))
        self._embedder = Embedder(self._backbone, self._top, progress=options.progress)
        self._passages = [encoder.prompts.passage + text for text in data.passages]
        self._queries = self._asked(data.train)

    def run(self) -> Outcome:
        data, backbone = self._data, self._backbone
        measured = {"held_out": data.held_out, **({"test": data.test} if data.test else {})}
        asked = [text for queries in measured.values() for text in self._asked(queries)]
        taught = sorted({i for known in (*data.train.relevant, *data.train.negatives) for i in known})
        self._embedder.keep([*self._queries, *asked, *(self._passages[i] for i in taught), *self._passages])
        parameters = backbone.train_top(self._top)
        original = backbone.weights()
        found = self._embedder.embed(self._passages, "embedding passages before")
        figures = self._measure(measured, found, "before")
        negatives = self._negatives(found)
        pool = self._pool(found)

        def score() -> float:
            vectors = self._embedder.embed([self._passages[i] for i in pool])
            return measure(self._vectors(data.held_out), vectors, data.held_out, pool)[DECIDING]

        untouched = measure(self._vectors(data.held_out), found[pool], data.held_out, pool)[DECIDING]
        recipe = Recipe(self._options.epochs, self._options.encoder_rate, batch=self._options.batch)
        log = train(
            parameters,
            {},
            self._batches,
            lambda rows: self._loss(rows, negatives),
            recipe,
            score=score,
            checkpoint=self._checkpoint(recipe, negatives),
            progress=self._options.progress,
        )
        share = self._choose_share(original, untouched, max(log.scores), score)
        figures |= {
            "epochs": float(log.best_epoch if share else 0),
            "share": share,
            "layers_tuned": float(self._top),
            "mined_negatives": float(sum(map(len, negatives)) - sum(map(len, data.train.negatives))),
        }
        if share:
            found = self._embedder.embed(self._passages, "embedding passages after")
        figures |= self._measure(measured, found, "after")
        return Outcome(backbone.weights(), self._top, backbone, figures)

    def _asked(self, queries: Queries) -> list[str]:
        return [self._encoder.prompts.query + text for text in queries.texts]

    def _vectors(self, queries: Queries) -> Matrix:
        return self._embedder.embed(self._asked(queries))

    def _measure(self, measured: Mapping[str, Queries], found: Matrix, when: str) -> dict[str, float]:
        return {
            f"{name}_{figure}_{when}": value
            for name, queries in measured.items()
            for figure, value in measure(self._vectors(queries), found, queries).items()
        }

    def _negatives(self, found: Matrix) -> list[list[int]]:
        """Return the hard negatives of each training query: those stated, else those mined."""
        queries = self._data.train
        count = _MINED if self._options.hard_negatives else 0
        mined = mine(self._vectors(queries), found, queries, count, self._data.minable)
        return [sorted(stated) or near for stated, near in zip(queries.negatives, mined, strict=True)]

    def _pool(self, found: Matrix) -> np.ndarray:
        """Return the passages that epochs are compared on, int (passages,)."""
        held_out = self._data.held_out
        chosen = dict.fromkeys(sorted({i for known in held_out.relevant for i in known}))
        nearest, _ = Neighbours(found).nearest(self._vectors(held_out), min(100, len(found)))
        for i in nearest.T.ravel().tolist():  # the nearest of each query, then the second nearest, …
            if len(chosen) >= _POOL:
                break
            chosen.setdefault(i)
        return np.array(list(chosen))

    def _batches(self, epoch: int) -> list[list[int]]:
        """Return an epoch's batches; a row is `epoch * queries + query`, as each epoch draws other passages."""
        lengths = [len(self._embedder.tokens([self._passages[min(known)]])[0]) for known in self._data.train.relevant]
        batches = shuffled(lengths, self._options.batch, self._options.seed, epoch)
        return [[epoch * len(lengths) + row for row in batch] for batch in batches]

    def _loss(self, rows: Sequence[int], negatives: Sequence[Sequence[int]]) -> torch.Tensor:
        queries = self._data.train
        asked: list[int] = []
        answers: list[int] = []
        hard: list[int] = []
        for row in rows:
            epoch, query = divmod(row, len(queries))
            generator = np.random.default_rng((self._options.seed, epoch, query))
            asked.append(query)
            answers.append(int(generator.choice(sorted(queries.relevant[query]))))
            near = negatives[query]
            hard += generator.permutation(near)[: self._options.hard_negatives].tolist() if near else []
        passages = answers + hard
        # Each text once: a passage may stand in a batch for several queries.
        each = list(dict.fromkeys(passages))
        place = {passage: i for i, passage in enumerate(each)}
        vectors = self._embedder.forward([self._passages[i] for i in each])
        found = vectors[[place[passage] for passage in passages]]
        known = [[i in queries.relevant[query] or i == queries.own[query] for i in passages] for query in asked]
        return multiple_negatives_ranking(
            self._embedder.forward([self._queries[query] for query in asked]), found, torch.tensor(known)
        )

    def _choose_share(self, original: Weights, untouched: float, reached: float, score: Callable[[], float]) -> float:
        """Load the weights that are best on the held-out queries, between the original and the trained ones.

        Returns:
            How far they are from the original ones: 0 if none were better than those.
        """
        trained = self._backbone.weights()
        scores = {0.0: untouched, _SHARES[0]: reached}
        for share in _SHARES[1:]:
            self._backbone.load(_between(original, trained, share))
            scores[share] = score()
            self._options.progress("weighing old and new weights", len(scores) - 1, len(_SHARES))
        best = max(scores, key=lambda share: scores[share])
        self._backbone.load(_between(original, trained, best))
        return best

    def _checkpoint(self, recipe: Recipe, negatives: Sequence[Sequence[int]]) -> Checkpoint:
        """Return the training's checkpoint, found again by all that its outcome depends on."""
        train, held_out = self._data.train, self._data.held_out
        return self._options.checkpoints.of(
            method="multiple-negatives-ranking",
            encoder=self._encoder.weights_sha256,
            tokens=self._encoder.max_tokens,
            passages=self._passages,
            train=self._queries,
            relevant=[sorted(known) for known in train.relevant],
            own=train.own,
            negatives=negatives,
            held_out=self._asked(held_out),
            answers=[sorted(known) for known in held_out.relevant],
            layers=self._top,
            hard=self._options.hard_negatives,
            recipe=repr(recipe),
            seed=self._options.seed,
        )


def _between(original: Weights, trained: Weights, share: float) -> Weights:
    """Return weights so far on the way from the original ones to the trained ones; at 0 and 1 exactly those."""
    return {name: torch.lerp(tensor, trained[name], share) for name, tensor in original.items()}


def multiple_negatives_ranking(asked: torch.Tensor, found: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """Return the loss of a batch: each query is to prefer its passage to all others, and each passage its query.

    Multiple-negatives ranking (Henderson et al., "Efficient Natural Language Response Suggestion for Smart Reply",
    2017, section 4.4) with cosines, a temperature, and both directions.

    Args:
        asked: float32 (queries, dimensions).
        found: float32 (passages, dimensions); the first ones answer the queries in order, then come hard negatives.
        known: bool (queries, passages), whether a passage is no negative of a query; those count for neither side.
    """
    scores = functional.normalize(asked, dim=1) @ functional.normalize(found, dim=1).T / _TEMPERATURE
    wanted = torch.arange(len(asked))
    others = known.clone()
    others[wanted, wanted] = False
    scores = scores.masked_fill(others, -torch.inf)
    back = scores[:, : len(asked)].T
    return (functional.cross_entropy(scores, wanted) + functional.cross_entropy(back, wanted)) / 2
