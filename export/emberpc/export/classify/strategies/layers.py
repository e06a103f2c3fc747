"""Strategies that train layers of the encoder together with a head: the upper layers, or all layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from emberpc.bundle import Head
from emberpc.bundle.prototypes import class_means
from emberpc.export.classify.cached_encoder import CachedEncoder
from emberpc.export.classify.linear import Matrix, balanced_weights
from emberpc.export.classify.strategies.base import (
    Fitted,
    Options,
    Tuned,
    accuracy,
    default_epochs,
    fit_and_hold_out,
    no_texts,
    passes_of,
    standard_error,
    with_head,
)
from emberpc.export.classify.strategies.frozen import COSINE_SCALE
from emberpc.export.data.examples import Examples
from emberpc.export.tuning.checkpoint import Checkpoint
from emberpc.export.tuning.loop import Recipe, shuffled, train

#: Share of the trained weights in the resulting weights, which are a weighted mean of trained and original weights
#: (Wortsman et al., "Robust fine-tuning of zero-shot models", 2022). The mean is more accurate than the trained weights
#: and than the original weights (docs/decisions/0010).
_TUNED_SHARE = 0.8


class _CosineHead(nn.Module):
    """Trainable head: logit = `COSINE_SCALE` × cosine(vector, vector of the label) + bias; `linear` makes it a `Head`.

    The vectors of the labels start as `means`, the mean vector of each label's texts, float32 (labels, dimensions). So
    the training starts with the accuracy of the strategy centroids, which helps with few examples
    (docs/decisions/0010).
    """

    def __init__(self, means: Matrix, *, multi_label: bool) -> None:
        super().__init__()
        self.labels = nn.Parameter(torch.from_numpy(means))
        # If multi-label, each label needs its own cosine from which on a text gets the label: the bias learns it.
        # If single-label, only the order of the logits counts, and the bias stays 0.
        self.bias = nn.Parameter(torch.full((len(means),), -COSINE_SCALE / 2 if multi_label else 0.0))
        self.bias.requires_grad_(multi_label)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        cosines = functional.normalize(vectors, dim=1) @ functional.normalize(self.labels, dim=1).T
        return COSINE_SCALE * cosines + self.bias

    def linear(self) -> Head:
        weights = COSINE_SCALE * functional.normalize(self.labels.detach(), dim=1)
        return Head(np.ascontiguousarray(weights.T.numpy()), self.bias.detach().numpy().copy())


@dataclass(frozen=True)
class _Layers:
    """Strategy that trains layers and head together. The token embeddings are not trained.

    The embeddings of MiniLM have more parameters than its layers, so training them doubles the CPU time of a step, and
    the accuracy is the same (docs/decisions/0026). `encoder_rate` is the peak learning rate of the layers, and `batch`
    a number of texts. Subclasses choose the layers with `top`.
    """

    name: str
    encoder_rate: float
    batch: int = 16
    exportable: bool = True
    tunes: bool = True
    served: bool = True
    uses_encoder: bool = True

    def top(self, layers: int) -> int:
        """Return the number of upper layers to train, of the number of layers of the encoder."""
        raise NotImplementedError

    def passes(self, examples: Examples, layers: int, *, quick: bool = False) -> float:
        """Return an estimate of the work of the training, in passes of one text through all layers."""
        return passes_of(examples, self.top(layers) / layers, 0, quick=quick)

    def fit(self, examples: Examples, cached_encoder: CachedEncoder, options: Options) -> Fitted:
        """Train layers and head; return the tuned encoder and the head.

        A training with early stopping on held-out texts finds the number of epochs. With few texts and no validation
        texts, a second training on all texts makes the result (`fit_and_hold_out` has the cases).

        Raises:
            ExportError: the encoder cannot be trained, the loss is not finite, or a checkpoint cannot be written.
        """

        def fit(known: Examples, held_out: Examples | None, epochs: int | None, stage: str) -> tuple[Fitted, int]:
            return self._train(known.described(), held_out, epochs, stage, cached_encoder, options)

        return fit_and_hold_out(fit, examples, options)

    def _train(
        self,
        examples: Examples,
        held_out: Examples | None,
        epochs: int | None,
        stage: str,
        cached_encoder: CachedEncoder,
        options: Options,
    ) -> tuple[Fitted, int]:
        encoder = cached_encoder.trainable_encoder
        top = self.top(encoder.layers)
        tokens, states = cached_encoder.tokens(examples.texts), cached_encoder.states(examples.texts, top)
        if held_out is not None:
            # Cache these states before the training: computing them later would restore the original weights, which
            # undoes the training.
            cached_encoder.states(held_out.texts, top)
        parameters = encoder.train_top(top, embeddings=False)
        original = encoder.weights()
        means = class_means(cached_encoder.vectors(examples.texts), examples.targets)
        head = _CosineHead(means, multi_label=examples.multi_label)
        recipe = Recipe(epochs or default_epochs(examples), self.encoder_rate, batch=self.batch)
        loss = loss_by_targets(examples, balanced=options.balanced)
        lengths = [len(ids) for ids in tokens]

        def loss_of(rows: list[int]) -> torch.Tensor:
            vectors = encoder.forward([tokens[row] for row in rows], states and [states[row] for row in rows])
            return loss(head(vectors), rows)

        def score() -> float:
            texts = held_out.texts if held_out else ()
            logits = head.linear().logits(
                encoder.embed(cached_encoder.tokens(texts), cached_encoder.states(texts, top), options.progress)
            )
            return accuracy(logits, held_out) if held_out else 0.0

        log = train(
            parameters,
            {name: parameter for name, parameter in head.named_parameters() if parameter.requires_grad},
            lambda epoch: shuffled(lengths, recipe.batch, options.seed, epoch),
            loss_of,
            recipe,
            score=score if held_out is not None else None,
            tolerance=standard_error(held_out),
            checkpoint=checkpoint_of(self.name, examples, held_out, recipe, cached_encoder, options, parameters),
            stage=stage,
            progress=options.progress,
        )
        trained = encoder.weights()
        encoder.load({name: weights.lerp(trained[name], _TUNED_SHARE) for name, weights in original.items()})
        tuned, linear = Tuned(encoder.weights(), top, encoder), head.linear()
        figures = {"epochs": float(log.best_epoch), "layers_tuned": float(top)}
        embed = embed_by(tuned, cached_encoder)
        return with_head(linear, embed, no_texts(examples), tuned=tuned, figures=figures), log.best_epoch


class TopLayers(_Layers):
    """Trains the upper half of the layers.

    The states of the lower layers are computed once for each text, so an epoch runs the upper layers only.
    """

    def __init__(self) -> None:
        super().__init__("top-layers", 2e-4)

    def top(self, layers: int) -> int:
        """Return half of `layers`, rounded down, and at least 1."""
        return max(1, layers // 2)


class FullTuning(_Layers):
    """Strategy that trains all layers of the encoder together with the head."""

    def __init__(self) -> None:
        super().__init__("full", 1e-4)

    def top(self, layers: int) -> int:
        """Return `layers`, the number of layers of the encoder: all of them are trained."""
        return layers


def embed_by(tuned: Tuned, cached_encoder: CachedEncoder) -> Callable[[Sequence[str]], Matrix]:
    """Return a function that returns the vectors of texts by a tuned encoder, float32 (texts, dimensions).

    The function loads the tuned weights into the PyTorch encoder at each call, since another training may have changed
    the encoder's weights meanwhile.
    """

    def embed(texts: Sequence[str]) -> Matrix:
        tokens, states = cached_encoder.tokens(texts), cached_encoder.states(texts, tuned.top)
        cached_encoder.trainable_encoder.use(tuned.weights, tuned.top)
        return cached_encoder.trainable_encoder.embed(tokens, states, cached_encoder.progress)

    return embed


def checkpoint_of(
    strategy: str,
    examples: Examples,
    held_out: Examples | None,
    recipe: Recipe,
    cached_encoder: CachedEncoder,
    options: Options,
    trained: Iterable[str] = (),
) -> Checkpoint:
    """Return the checkpoint of one training. The file's name is a hash of everything that the training depends on.

    `trained` has the names of the trained parameters.
    """
    encoder = cached_encoder.encoder
    return options.checkpoints.of(
        strategy=strategy,
        encoder=encoder.weights_sha256,
        tokens=encoder.max_tokens,
        prompt=encoder.prompts.passage,
        texts=examples.texts,
        targets=examples.targets.tolist(),
        held_out=held_out and (held_out.texts, held_out.targets.tolist()),
        recipe=repr(recipe),
        seed=options.seed,
        balanced=options.balanced,
        trained=sorted(trained),
    )


def loss_by_targets(examples: Examples, *, balanced: bool) -> Callable[[torch.Tensor, list[int]], torch.Tensor]:
    """Return a function that computes the mean loss of a batch.

    The loss is cross-entropy; if multi-label, binary cross-entropy summed over the labels.

    Args:
        examples: the training texts.
        balanced: whether every label has the same total weight.

    Returns:
        A function of a batch's logits, float32 (texts, labels), and of the indexes of its texts in `examples`. The
        function returns a scalar.
    """
    wanted = torch.from_numpy(examples.targets.astype(np.float32))
    weights = torch.from_numpy(balanced_weights(examples.targets)) if balanced else torch.ones(len(wanted))

    def loss(logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
        if examples.multi_label:
            losses = functional.binary_cross_entropy_with_logits(logits, wanted[rows], reduction="none").sum(dim=1)
        else:
            losses = functional.cross_entropy(logits, wanted[rows], reduction="none")
        return (losses * weights[rows]).mean()

    return loss
