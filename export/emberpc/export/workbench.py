"""An encoder at hand for training, with what was computed for each text once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
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


@dataclass
class Account:
    """What a piece of work asked of a workbench, texts by what was computed of each, and what it had to wait for.

    A text that was computed before costs nothing then; `Workbench.price` says what it would have cost.
    """

    asked: dict[str, set[str]] = field(default_factory=dict)
    waited: Cost = field(default_factory=Cost)


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
        self._spent: dict[str, Cost] = {}
        self._account = Account()

    @contextmanager
    def account(self) -> Iterator[Account]:
        """Keep account of what is asked for meanwhile."""
        before, self._account = self._account, Account()
        try:
            yield self._account
        finally:
            self._account = before

    def price(self, account: Account) -> Cost:
        """Return what all that was asked for costs if nothing is there yet: by the mean over all texts run so far."""
        total = Cost()
        for kind, texts in account.asked.items():
            known = self._vectors if kind == "vectors" else self._states[int(kind)]
            total.seconds += self._spent[kind].seconds * len(texts) / len(known)
            total.cpu_seconds += self._spent[kind].cpu_seconds * len(texts) / len(known)
        return total

    def vectors(self, texts: Sequence[str]) -> Matrix:
        """Return the texts' vectors by the encoder as it is, float32 (texts, dimensions)."""
        new = [text for text in dict.fromkeys(texts) if text not in self._vectors]
        with self._accounted("vectors", texts):
            if new:
                prompt = self.encoder.prompts.passage
                found = self._runner.run([prompt + text for text in new], "sentence_embedding", progress=self.progress)
                self._vectors.update(zip(new, found, strict=True))
        return np.stack([self._vectors[text] for text in texts])

    @property
    def is_trainable(self) -> bool:
        """Whether the encoder was loaded to be trained, which takes seconds and may fail."""
        return "backbone" in vars(self)

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
        with self._accounted(str(top), texts):
            if new:
                known.update(zip(new, self.backbone.lower_states(self.tokens(new), top, self.progress), strict=True))
        return [known[text] for text in texts]

    @contextmanager
    def _accounted(self, kind: str, texts: Sequence[str]) -> Iterator[None]:
        """Note that something is asked for of texts, and what it takes."""
        self._account.asked.setdefault(kind, set()).update(texts)
        with Cost() as cost:
            yield
        for total in (self._spent.setdefault(kind, Cost()), self._account.waited):
            total.seconds += cost.seconds
            total.cpu_seconds += cost.cpu_seconds
