"""An encoder at hand for training, with what was computed for each text once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from time import perf_counter, process_time
from typing import TYPE_CHECKING

import numpy as np

from emberpc.export.encoder import Encoder
from emberpc.export.linear import Matrix
from emberpc.export.progress import Progress, no_progress
from emberpc.export.runner import Runner

if TYPE_CHECKING:
    from emberpc.export.tuning.backbone import Backbone, States, TokenIds


@dataclass
class Cost:
    """What a `with` block took: wall seconds, and CPU seconds of all cores."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def __enter__(self) -> Cost:
        self._wall, self._cpu = perf_counter(), process_time()
        return self

    def __exit__(self, *_error: object) -> None:
        self.seconds += perf_counter() - self._wall
        self.cpu_seconds += process_time() - self._cpu


class Workbench:
    """Gives texts' vectors by the encoder as it is, and their states in its lower layers; each text is run once.

    The encoder's passage prompt goes before every text, as the server puts it there.

    Args:
        encoder: the encoder.
        runner: its ONNX file.
        progress: told how far the texts are.
    """

    def __init__(self, encoder: Encoder, runner: Runner, progress: Progress = no_progress) -> None:
        self.encoder = encoder
        self.progress = progress
        self._runner = runner
        self._vectors: dict[str, Matrix] = {}
        self._tokens: dict[str, TokenIds] = {}
        self._states: dict[int, dict[str, States]] = {}

    def vectors(self, texts: Sequence[str]) -> Matrix:
        """Return the texts' vectors by the encoder as it is, float32 (texts, dimensions)."""
        new = [text for text in dict.fromkeys(texts) if text not in self._vectors]
        if new:
            prompt = self.encoder.prompts.passage
            found = self._runner.run([prompt + text for text in new], "sentence_embedding", progress=self.progress)
            self._vectors.update(zip(new, found, strict=True))
        return np.stack([self._vectors[text] for text in texts])

    @cached_property
    def backbone(self) -> Backbone:
        """The encoder in PyTorch."""
        from emberpc.export.tuning.backbone import Backbone

        return Backbone(self.encoder)

    def tokens(self, texts: Sequence[str]) -> list[TokenIds]:
        """Return the texts' token ids."""
        new = [text for text in dict.fromkeys(texts) if text not in self._tokens]
        if new:
            prompt = self.encoder.prompts.passage
            self._tokens.update(zip(new, self.backbone.tokenize([prompt + text for text in new]), strict=True))
        return [self._tokens[text] for text in texts]

    def states(self, texts: Sequence[str], top: int) -> list[States] | None:
        """Return what the layers below the upper `top` give for each text; None if there are none below."""
        if top >= self.backbone.layers:
            return None
        known = self._states.setdefault(top, {})
        new = [text for text in dict.fromkeys(texts) if text not in known]
        if new:
            found = self.backbone.lower_states(self.tokens(new), top, self.progress)
            known.update(zip(new, found, strict=True))
        return [known[text] for text in texts]
