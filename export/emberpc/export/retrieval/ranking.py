"""Train an embedding model for retrieval with the multiple-negatives ranking loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from emberpc.export.convert.onnx_runner import Matrix
from emberpc.export.progress import Progress, no_progress
from emberpc.export.retrieval.embedder import Embedder
from emberpc.export.retrieval.metrics import DECIDING, measure
from emberpc.export.retrieval.mining import PassageGraph, mine
from emberpc.export.retrieval.queries import Queries, RetrievalData
from emberpc.export.source.encoder import SourceEncoder
from emberpc.export.tuning.checkpoint import Checkpoint, Checkpoints
from emberpc.export.tuning.loop import Recipe, shuffled, train
from emberpc.export.tuning.trainable_encoder import TrainableEncoder

#: Temperature of the loss, which divides cosines. Other values were not tried (docs/decisions/0013).
_TEMPERATURE = 0.05
#: Maximum number of hard negatives that are mined for a query. Each epoch draws `hard_negatives` of them for the query.
_MINED = 4
#: Epochs are compared on all answers of the held-out queries. If there are fewer than this number, the passages nearest
#: to these queries are added, up to this number of passages in all.
_POOL = 1000
#: Shares of trained weights that are tried, besides 0, for the result: a weighted mean of original weights (share 0)
#: and trained weights (share 1), as in Wortsman et al., "Robust fine-tuning of zero-shot models", 2022. The first must
#: be 1.
_SHARES = (1.0, 0.75, 0.5)


Weights = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class TrainingOptions:
    """Options of a training for retrieval.

    `seed` decides the order of batches and the draws of passages, `epochs` is the maximum number of passes over the
    queries, `encoder_rate` is AdamW's peak learning rate, and `batch` is the number of queries of a batch.
    """

    seed: int = 0
    epochs: int = 3
    #: Number of upper layers to train; a number above that of all layers means all. None: a third of all layers,
    #: rounded down, at least 1.
    layers: int | None = None
    #: Maximum number of hard negatives of each query in a batch, stated in the data or mined; 0: none. The passages of
    #: the other queries in the batch are negatives in addition, except known answers of the query and the query itself.
    hard_negatives: int = 1
    encoder_rate: float = 1e-4
    batch: int = 32
    #: Where the training stores its checkpoints; default: none are stored. The caller removes the checkpoints once the
    #: outcome is stored.
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    progress: Progress = no_progress


@dataclass(frozen=True)
class TrainingOutcome:
    """Result of a training for retrieval: the resulting weights, and figures by name.

    `trainable_encoder` is the encoder in PyTorch, and `top` the number of its upper layers that were trained. `weights`
    are the resulting weights of these layers and of the modules behind them, by parameter name. If all layers were
    trained, `weights` has the token embeddings, too.
    """

    weights: Weights
    top: int
    trainable_encoder: TrainableEncoder
    figures: dict[str, float] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write the tuned encoder to `folder` in the format of sentence-transformers.

        Afterwards, `trainable_encoder` has its original weights.

        Raises:
            ExportError: the folder cannot be written.
            OSError: the disk is full.
        """
        self.trainable_encoder.save(self.weights, self.top, folder)


def tune(data: RetrievalData, encoder: SourceEncoder, options: TrainingOptions) -> TrainingOutcome:
    """Train an encoder; choose the epoch and the share of the trained weights by nDCG@10 of the held-out queries.

    For these choices, the queries are searched in about 1,000 passages, and for the figures in all.

    Args:
        data: passages, and the queries to train on, to choose by and to test on.
        encoder: the encoder to train.
        options: options of the training.

    Returns:
        The weights, and figures. The weights are the original ones if no others were better. The figures are:

        - for each figure X of `emberpc.export.retrieval.metrics.measure`, such as `ndcg_at_10`, in a search over all
          passages: `held_out_X_before` and `held_out_X_after`; if there are test queries, also `test_X_before` and
          `test_X_after`. "After" is with the returned weights;
        - the chosen number of `epochs` and the `share` of the trained weights, both 0 for the original weights;
        - `layers_tuned`, the number of upper layers that were trained;
        - `mined_negatives`, the number of hard negatives that were mined.

    Raises:
        ExportError: the encoder cannot be trained, or a vector or the loss is not finite.
        NoSpaceError: a checkpoint cannot be written.
    """
    return _Tuning(data, encoder, options).run()


class _Tuning:
    """One training for retrieval.

    The texts in `_passages` and `_queries` (the training queries) include the encoder's prompts; those in `_data` do
    not.
    """

    def __init__(self, data: RetrievalData, encoder: SourceEncoder, options: TrainingOptions) -> None:
        self._data = data
        self._encoder = encoder
        self._options = options
        self._trainable_encoder = TrainableEncoder(encoder)
        layers = self._trainable_encoder.layers
        self._top = min(layers, options.layers or max(1, layers // 3))
        self._embedder = Embedder(self._trainable_encoder, self._top, progress=options.progress)
        self._passages = [encoder.prompts.passage + text for text in data.passages]
        self._queries = self._prompted(data.train)

    def run(self) -> TrainingOutcome:
        data, trainable_encoder = self._data, self._trainable_encoder
        measured = {"held_out": data.held_out, **({"test": data.test} if data.test else {})}
        measured_queries = [text for queries in measured.values() for text in self._prompted(queries)]
        trained_on = sorted({i for known in (*data.train.relevant, *data.train.negatives) for i in known})
        self._embedder.keep(
            [*self._queries, *measured_queries, *(self._passages[i] for i in trained_on), *self._passages]
        )
        parameters = trainable_encoder.train_top(self._top)
        original = trainable_encoder.weights()
        passage_vectors = self._embedder.embed(self._passages, "embedding passages before")
        figures = self._measure(measured, passage_vectors, "before")
        negatives = self._negatives(passage_vectors)
        pool = self._pool(passage_vectors)

        def score() -> float:
            vectors = self._embedder.embed([self._passages[i] for i in pool])
            return measure(self._vectors(data.held_out), vectors, data.held_out, pool)[DECIDING]

        untouched = measure(self._vectors(data.held_out), passage_vectors[pool], data.held_out, pool)[DECIDING]
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
            passage_vectors = self._embedder.embed(self._passages, "embedding passages after")
        figures |= self._measure(measured, passage_vectors, "after")
        return TrainingOutcome(trainable_encoder.weights(), self._top, trainable_encoder, figures)

    def _prompted(self, queries: Queries) -> list[str]:
        return [self._encoder.prompts.query + text for text in queries.texts]

    def _vectors(self, queries: Queries) -> Matrix:
        return self._embedder.embed(self._prompted(queries))

    def _measure(self, measured: Mapping[str, Queries], passage_vectors: Matrix, when: str) -> dict[str, float]:
        return {
            f"{name}_{figure}_{when}": value
            for name, queries in measured.items()
            for figure, value in measure(self._vectors(queries), passage_vectors, queries).items()
        }

    def _negatives(self, passage_vectors: Matrix) -> list[list[int]]:
        """Return the hard negatives of each training query, as indexes of passages.

        A query gets the negatives that the data states or, if it states none for the query, mined negatives.
        If the option `hard_negatives` is 0, none are mined.
        """
        queries = self._data.train
        count = _MINED if self._options.hard_negatives else 0
        mined = mine(self._vectors(queries), passage_vectors, queries, count, self._data.minable)
        return [sorted(stated) or near for stated, near in zip(queries.negatives, mined, strict=True)]

    def _pool(self, passage_vectors: Matrix) -> np.ndarray:
        """Return the indexes of the passages to compare epochs on, int (passages,).

        These passages are all answers of the held-out queries. If there are fewer than 1,000, passages near these
        queries are added, at most 100 for each query and up to 1,000 passages in all. `passage_vectors` has all
        passages.
        """
        held_out = self._data.held_out
        chosen = dict.fromkeys(sorted({i for known in held_out.relevant for i in known}))
        nearest, _ = PassageGraph(passage_vectors).nearest(self._vectors(held_out), min(100, len(passage_vectors)))
        for i in nearest.T.ravel().tolist():  # first the nearest passage of each query, then the second nearest, …
            if len(chosen) >= _POOL:
                break
            chosen.setdefault(i)
        return np.array(list(chosen))

    def _batches(self, epoch: int) -> list[list[int]]:
        """Return the batches of an epoch, each a list of numbers.

        The number for the training query q is `epoch * (number of training queries) + q`, with epochs numbered from 0.
        The loss finds query and epoch in this number, and draws the query's passages again in each epoch.
        """
        lengths = [len(self._embedder.tokens([self._passages[min(known)]])[0]) for known in self._data.train.relevant]
        batches = shuffled(lengths, self._options.batch, self._options.seed, epoch)
        return [[epoch * len(lengths) + row for row in batch] for batch in batches]

    def _loss(self, rows: Sequence[int], negatives: Sequence[Sequence[int]]) -> torch.Tensor:
        queries = self._data.train
        batch_queries: list[int] = []
        answers: list[int] = []
        hard: list[int] = []
        for row in rows:
            epoch, query = divmod(row, len(queries))
            generator = np.random.default_rng((self._options.seed, epoch, query))
            batch_queries.append(query)
            answers.append(int(generator.choice(sorted(queries.relevant[query]))))
            near = negatives[query]
            hard += generator.permutation(near)[: self._options.hard_negatives].tolist() if near else []
        passages = answers + hard
        # Embed each passage once, though several queries of the batch may have it.
        distinct = list(dict.fromkeys(passages))
        place = {passage: i for i, passage in enumerate(distinct)}
        vectors = self._embedder.forward([self._passages[i] for i in distinct])
        passage_vectors = vectors[[place[passage] for passage in passages]]
        known = [[i in queries.relevant[query] or i == queries.own[query] for i in passages] for query in batch_queries]
        return multiple_negatives_ranking(
            self._embedder.forward([self._queries[query] for query in batch_queries]),
            passage_vectors,
            torch.tensor(known),
        )

    def _choose_share(self, original: Weights, untouched: float, reached: float, score: Callable[[], float]) -> float:
        """Choose the best weighted mean of original and trained weights by the held-out queries, and load it.

        Args:
            original: weights before the training.
            untouched: score of the original weights.
            reached: score of the trained weights, which are loaded.
            score: returns the score, nDCG@10 of the held-out queries, of the weights that are loaded at the moment.

        Returns:
            The share of the trained weights in the mean; 0 if no mean is better than the original weights. Of several
            better means with the same score, that with the greatest share is chosen.
        """
        trained = self._trainable_encoder.weights()
        scores = {0.0: untouched, _SHARES[0]: reached}
        for share in _SHARES[1:]:
            self._trainable_encoder.load(_between(original, trained, share))
            scores[share] = score()
            self._options.progress("weighting old and new weights", len(scores) - 1, len(_SHARES))
        best = max(scores, key=lambda share: scores[share])
        self._trainable_encoder.load(_between(original, trained, best))
        return best

    def _checkpoint(self, recipe: Recipe, negatives: Sequence[Sequence[int]]) -> Checkpoint:
        """Return the checkpoint of this training. The file's name is a hash of data, encoder's weights and options."""
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
            held_out=self._prompted(held_out),
            answers=[sorted(known) for known in held_out.relevant],
            layers=self._top,
            hard=self._options.hard_negatives,
            recipe=repr(recipe),
            seed=self._options.seed,
        )


def _between(original: Weights, trained: Weights, share: float) -> Weights:
    """Return the weighted mean of original weights (`share` 0) and trained weights (`share` 1); both ends are exact."""
    return {name: torch.lerp(tensor, trained[name], share) for name, tensor in original.items()}


def multiple_negatives_ranking(
    query_vectors: torch.Tensor, passage_vectors: torch.Tensor, known: torch.Tensor
) -> torch.Tensor:
    """Return the multiple-negatives ranking loss of a batch.

    The loss is small if each query is nearer to its answer than to all other passages, and each answer is nearer to its
    query than to all other queries (Henderson et al., "Efficient Natural Language Response Suggestion for Smart Reply",
    2017, section 4.4). The loss is computed from cosines, divided by `_TEMPERATURE`.

    Args:
        query_vectors: float32 (queries, dimensions), of any length.
        passage_vectors: float32 (passages, dimensions), of any length: first the answer of each query, in the order of
            the queries, then hard negatives.
        known: bool (queries, passages), true where a passage is no negative of a query, for example since it answers
            the query, too. These pairs are ignored, except the pair of a query and its own answer.

    Returns:
        A scalar, the mean of two losses: of queries compared with passages, and of answers compared with queries.
    """
    scores = functional.normalize(query_vectors, dim=1) @ functional.normalize(passage_vectors, dim=1).T / _TEMPERATURE
    wanted = torch.arange(len(query_vectors))
    others = known.clone()
    others[wanted, wanted] = False
    scores = scores.masked_fill(others, -torch.inf)
    back = scores[:, : len(query_vectors)].T
    return (functional.cross_entropy(scores, wanted) + functional.cross_entropy(back, wanted)) / 2
