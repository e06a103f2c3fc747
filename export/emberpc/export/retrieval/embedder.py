"""Texts' vectors by an encoder that is being tuned, what its lower layers give kept of as many as there is room for."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch

from emberpc.export.linear import Matrix
from emberpc.export.progress import Progress, no_progress
from emberpc.export.tuning.backbone import Backbone, States, TokenIds

#: Bytes of lower states that are kept: those of 13,000 passages of 200 tokens of 384 numbers.
ROOM = 2 * 1024**3
#: Texts after which the room left is looked at.
_CHUNK = 256


class Embedder:
    """Gives vectors of texts, which have their prompts already, as the backbone now is.

    Texts that there was no room for run through all layers instead, which
    takes longer and gives the same.

    Args:
        backbone: the encoder; `keep` must be called before it is trained.
        top: how many upper layers will be trained.
        room: most bytes of states to keep.
        progress: told how far the texts are.
    """

    def __init__(self, backbone: Backbone, top: int, *, room: int = ROOM, progress: Progress = no_progress) -> None:
        self._backbone = backbone
        self._top = top
        self._room = room
        self._progress = progress
        self._tokens: dict[str, TokenIds] = {}
        self._states: dict[str, States] = {}

    def keep(self, texts: Sequence[str]) -> None:
        """Run texts through the layers that stay as they are; those that come first are kept first."""
        new = list(dict.fromkeys(texts))
        self.tokens(new)
        if self._top >= self._backbone.layers:
            return
        new = [text for text in new if text not in self._states]
        stage = "running the lower layers"
        for start in range(0, len(new), _CHUNK):
            if self._room <= 0:
                break
            chunk = new[start : start + _CHUNK]
            self._progress(stage, start, len(new))
            found = self._backbone.lower_states(self.tokens(chunk), self._top)
            self._states.update(zip(chunk, found, strict=True))
            self._room -= sum(states.nbytes for states in found)
        self._progress(stage, len(new), max(1, len(new)))

    def tokens(self, texts: Sequence[str]) -> list[TokenIds]:
        """Return the texts' token ids."""
        new = [text for text in dict.fromkeys(texts) if text not in self._tokens]
        if new:
            self._tokens.update(zip(new, self._backbone.tokenize(new), strict=True))
        return [self._tokens[text] for text in texts]

    def forward(self, texts: Sequence[str]) -> torch.Tensor:
        """Return a batch's vectors, float32 (texts, dimensions), with what is needed to train on them."""
        tokens = self.tokens(texts)
        if all(text in self._states for text in texts):
            return self._backbone.forward(tokens, [self._states[text] for text in texts])
        with self._backbone.all_layers():
            return self._backbone.forward(tokens)

    def embed(self, texts: Sequence[str], name: str = "") -> Matrix:
        """Return texts' vectors, float32 (texts, dimensions).

        Args:
            texts: at least one.
            name: what to call it in the progress; empty: nothing is told.
        """
        kept = [text for text in dict.fromkeys(texts) if text in self._states]
        rest = [text for text in dict.fromkeys(texts) if text not in self._states]

        def tell(before: int) -> Progress:
            def progress(stage: str, done: int, total: int, detail: str = "") -> None:
                if name:
                    self._progress(name, before + done, len(kept) + len(rest), detail)

            return progress

        parts = []
        if kept:
            states = [self._states[text] for text in kept]
            parts.append(self._backbone.embed(self.tokens(kept), states, tell(0)))
        if rest:
            with self._backbone.all_layers():
                parts.append(self._backbone.embed(self.tokens(rest), None, tell(len(kept))))
        row = {text: i for i, text in enumerate(chain(kept, rest))}
        return np.concatenate(parts)[[row[text] for text in texts]]
