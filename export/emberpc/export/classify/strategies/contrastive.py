"""The contrastive strategy: train the encoder so that texts of one label are near each other, then fit a head."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from emberpc.bundle import Head
from emberpc.bundle.prototypes import class_means
from emberpc.export.classify.cached_encoder import CachedEncoder
from emberpc.export.classify.linear import balanced_weights, fit_head
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
from emberpc.export.classify.strategies.frozen import label_head
from emberpc.export.classify.strategies.layers import checkpoint_of, embed_by
from emberpc.export.data.examples import Examples, Rows
from emberpc.export.threads import Check, bounded_threads, run_in_threads
from emberpc.export.tuning.loop import Recipe, train

#: Number of texts of a batch, which is made of pairs of texts with one label. For each text, the texts of the batch
#: without a label in common with it are the negatives.
_BATCH = 32
_TEMPERATURE = 0.1
#: Inverse strength of the head's regularization. Cross-validation cannot choose it, since the encoder was trained on
#: all these texts. On texts that the encoder was not trained on, 3, 10 and 30 gave equal accuracy.
_C = 10.0
#: Number of training texts of each label that a score after an epoch embeds for the label's mean vector; more if they
#: are fewer than `_MAX_SCORED` texts in all. The mean of all texts hardly differs, and embedding them all would add a
#: third to the CPU time of a training with early stopping.
_MIN_SCORED_PER_LABEL = 16
_MAX_SCORED = 500


@dataclass(frozen=True)
class Contrastive:
    """Trains the upper half of the layers to bring texts of one label together, then fits logistic regression.

    This follows SetFit (Tunstall et al., "Efficient Few-Shot Learning Without Prompts", 2022), but with the supervised
    contrastive loss (Khosla et al., 2020). The supervised contrastive loss compares a text with all texts of its batch
    instead of one other text. So each forward pass teaches more, and forward passes are the main cost.
    """

    name: str = "contrastive"
    exportable: bool = True
    tunes: bool = True
    served: bool = True
    uses_encoder: bool = True

    def passes(self, examples: Examples, layers: int, *, quick: bool = False) -> float:
        """Return an estimate of the work of the training, in passes of one text through all layers."""
        return passes_of(examples, max(1, layers // 2) / layers, len(scored(examples)), quick=quick)

    def fit(self, examples: Examples, cached_encoder: CachedEncoder, options: Options) -> Fitted:
        """Train the encoder with early stopping on held-out texts, then fit the head; return encoder and head.

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
        top = max(1, encoder.layers // 2)
        tokens, states = cached_encoder.tokens(examples.texts), cached_encoder.states(examples.texts, top)
        if held_out is not None:
            # Cache these states before the training: computing them later would restore the original weights, which
            # undoes the training.
            cached_encoder.states(held_out.texts, top)
        parameters = encoder.train_top(top)
        recipe = Recipe(epochs or default_epochs(examples), 1e-4, batch=_BATCH)
        known = scored(examples)
        sample, sample_tokens = examples.take(known), [tokens[row] for row in known]
        sample_states = states and [states[row] for row in known]
        together = torch.from_numpy(examples.targets.astype(np.float32))

        def loss_of(rows: list[int]) -> torch.Tensor:
            vectors = encoder.forward([tokens[row] for row in rows], states and [states[row] for row in rows])
            return supervised_contrastive(vectors, together[rows])

        def score() -> float:
            if held_out is None:
                return 0.0
            means = class_means(encoder.embed(sample_tokens, sample_states, options.progress), sample.targets)
            states_of = cached_encoder.states(held_out.texts, top)
            found = encoder.embed(cached_encoder.tokens(held_out.texts), states_of, options.progress)
            return accuracy(label_head(means).logits(found), held_out, cosines=True)

        log = train(
            parameters,
            {},
            lambda epoch: paired(examples, recipe.batch, options.seed, epoch),
            loss_of,
            recipe,
            score=score if held_out is not None else None,
            tolerance=standard_error(held_out),
            checkpoint=checkpoint_of(self.name, examples, held_out, recipe, cached_encoder, options, parameters),
            stage=stage,
            progress=options.progress,
        )
        vectors = encoder.embed(tokens, states, options.progress)
        weights = balanced_weights(examples.targets) if options.balanced else None

        def fit(check: Check) -> Head:
            return fit_head(
                vectors, examples.targets, _C, multi_label=examples.multi_label, weights=weights, check=check
            )

        with bounded_threads(1):
            (head,) = run_in_threads([fit], lambda done: options.progress("fitting the head", done, 1))
        tuned = Tuned(encoder.weights(), top, encoder)
        figures = {"epochs": float(log.best_epoch), "layers_tuned": float(top)}
        embed = embed_by(tuned, cached_encoder)
        return with_head(head, embed, no_texts(examples), tuned=tuned, figures=figures), log.best_epoch


def scored(examples: Examples) -> Rows:
    """Return the indexes of the training texts whose vectors a score after an epoch uses: the first of each label."""
    maximum = max(_MIN_SCORED_PER_LABEL, _MAX_SCORED // len(examples.labels))
    first = examples.targets & (examples.targets.cumsum(axis=0) <= maximum)
    return np.flatnonzero(first.any(axis=1))


def supervised_contrastive(vectors: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the supervised contrastive loss of a batch (Khosla et al., "Supervised Contrastive Learning", eq. 2).

    Args:
        vectors: float32 (texts, dimensions), of any length.
        targets: float32 (texts, labels), 1 where a text has a label, else 0. Two texts with a label in common are a
            positive pair.

    Returns:
        A scalar, the mean over the texts that belong to a positive pair of the batch; 0 if there is no positive pair.
    """
    units = functional.normalize(vectors, dim=1)
    itself = torch.eye(len(units), dtype=torch.bool)
    similarity = (units @ units.T / _TEMPERATURE).masked_fill(itself, -torch.inf)
    together = ((targets @ targets.T) > 0) & ~itself
    likelihood = similarity.log_softmax(dim=1).masked_fill(~together, 0.0)
    count = together.sum(dim=1)
    # A text without a positive pair in its batch has no loss, so the mean leaves it out.
    return -(likelihood.sum(dim=1) / count.clamp(min=1)).sum() / (count > 0).sum().clamp(min=1)


def paired(examples: Examples, size: int, seed: int, epoch: int) -> list[list[int]]:
    """Return the batches of an epoch, as indexes of texts. Each batch is made of random pairs of texts with one label.

    If a label has an odd number of texts, one of the texts is in two pairs; a label's only text is a pair with itself.
    A batch has each index only once.

    Args:
        examples: the texts. Of a text's several labels, one is drawn for the epoch. Texts without a label are left out.
        size: maximum number of texts of a batch.
        seed: seed of the draw.
        epoch: number of the epoch, from 0; each epoch has its own draw.
    """
    generator = np.random.default_rng((seed, epoch))
    drawn = (examples.targets * generator.random(examples.targets.shape)).argmax(axis=1)
    pairs: list[tuple[int, int]] = []
    for label in np.unique(drawn):
        rows = generator.permutation(np.flatnonzero((drawn == label) & examples.targets[:, label])).tolist()
        if len(rows) % 2:
            rows.append(rows[0])  # an odd number of texts: the last one is paired with the first
        pairs += zip(rows[::2], rows[1::2], strict=True)
    order = generator.permutation(len(pairs))
    flat = [
        [row for i in order[start : start + size // 2] for row in pairs[i]] for start in range(0, len(pairs), size // 2)
    ]
    return [list(dict.fromkeys(batch)) for batch in flat]
