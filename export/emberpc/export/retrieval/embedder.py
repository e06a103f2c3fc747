"""Embed texts with an encoder in training; hidden states after its frozen lower layers are cached."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch

from emberpc.export.convert.onnx_runner import Matrix
from emberpc.export.progress import Progress, no_progress
from emberpc.export.tuning.trainable_encoder import States, TokenIds, TrainableEncoder

#: Default limit of the cached states in bytes: enough for 13,000 passages of 200 tokens with a hidden size of 384, in
#: float16.
SPACE = 2 * 1024**3
#: Number of texts whose states are computed between two checks of the remaining space. So the cached states may exceed
#: the space by less than the states of this number of texts.
_CHUNK = 256


class Embedder:
    """Embeds texts with the current weights of an encoder in PyTorch. Texts must include their prompts.

    `keep` caches the hidden states of texts after the frozen lower layers, until `space` is used up. Texts without
    cached states run through all layers, which takes longer. Their vectors may differ slightly, since cached states are
    float16.

    Args:
        encoder: the encoder in PyTorch. Call `keep`, if at all, before its `train_top`.
        top: number of upper layers that will be trained.
        space: limit of the cached states in bytes; the last states cached may exceed it.
        progress: called with the number of texts done.
    """

    def __init__(
        self, encoder: TrainableEncoder, top: int, *, space: int = SPACE, progress: Progress = no_progress
    ) -> None:
        self._encoder = encoder
        self._top = top
        self._space = space
        self._progress = progress
        self._tokens: dict[str, TokenIds] = {}
        self._states: dict[str, States] = {}

    def keep(self, texts: Sequence[str]) -> None:
        """Cache the token ids of texts, and their states after the frozen lower layers until the space is used up.

        This may restore the original weights of the encoder and undo `train_top`, so call it only before a training.
        If all layers will be trained, only token ids are cached.

        Args:
            texts: the texts, in the order in which their states are cached: those first whose states are needed most.
        """
        new = list(dict.fromkeys(texts))
        self.tokens(new)
        if self._top >= self._encoder.layers:
            return
        new = [text for text in new if text not in self._states]
        stage = "running the lower layers"
        for start in range(0, len(new), _CHUNK):
            if self._space <= 0:
                break
            chunk = new[start : start + _CHUNK]
            self._progress(stage, start, len(new))
            found = self._encoder.lower_states(self.tokens(chunk), self._top)
            self._states.update(zip(chunk, found, strict=True))
            self._space -= sum(states.nbytes for states in found)
        self._progress(stage, len(new), max(1, len(new)))

    def tokens(self, texts: Sequence[str]) -> list[TokenIds]:
        """Return the token ids of each text, special tokens included, truncated to the encoder's limit; cache them."""
        new = [text for text in dict.fromkeys(texts) if text not in self._tokens]
        if new:
            self._tokens.update(zip(new, self._encoder.tokenize(new), strict=True))
        return [self._tokens[text] for text in texts]

    def forward(self, texts: Sequence[str]) -> torch.Tensor:
        """Return the vectors of a batch of texts, float32 (texts, dimensions), with gradients for training.

        If one of the texts has no cached states, all layers run for the whole batch.
        """
        tokens = self.tokens(texts)
        if all(text in self._states for text in texts):
            return self._encoder.forward(tokens, [self._states[text] for text in texts])
        with self._encoder.all_layers():
            return self._encoder.forward(tokens)

    def embed(self, texts: Sequence[str], name: str = "") -> Matrix:
        """Return the vectors of texts, float32 (texts, dimensions), in the order of `texts`, without gradients.

        Args:
            texts: at least one text.
            name: name of the step in the progress; empty: no progress is reported.
        """
        kept = [text for text in dict.fromkeys(texts) if text in self._states]
        rest = [text for text in dict.fromkeys(texts) if text not in self._states]

        def progress_from(before: int) -> Progress:
            def progress(stage: str, done: int, total: int, detail: str = "") -> None:
                if name:
                    self._progress(name, before + done, len(kept) + len(rest), detail)

            return progress

        parts = []
        if kept:
            states = [self._states[text] for text in kept]
            parts.append(self._encoder.embed(self.tokens(kept), states, progress_from(0)))
        if rest:
            with self._encoder.all_layers():
                parts.append(self._encoder.embed(self.tokens(rest), None, progress_from(len(kept))))
        row = {text: i for i, text in enumerate(chain(kept, rest))}
        return np.concatenate(parts)[[row[text] for text in texts]]
