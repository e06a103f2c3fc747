"""An encoder for training, with a cache of everything computed from each text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from emberpc.export.classify.linear import Matrix
from emberpc.export.convert.onnx_runner import OnnxRunner
from emberpc.export.progress import Progress, no_progress
from emberpc.export.source.encoder import SourceEncoder
from emberpc.export.timing import Cost

if TYPE_CHECKING:
    from emberpc.export.tuning.trainable_encoder import States, TokenIds, TrainableEncoder


@dataclass
class Account:
    """Requests that one piece of work, such as a fit, made to a `CachedEncoder`.

    `asked` has the distinct texts by kind of result: "vectors", or the `top` of `CachedEncoder.states` as text.
    `waited` is the wall and CPU time that the requests took. A cached text takes no time; `CachedEncoder.price`
    estimates the time without the cache.
    """

    asked: dict[str, set[str]] = field(default_factory=dict)
    waited: Cost = field(default_factory=Cost)


class CachedEncoder:
    """Computes vectors, token ids and hidden states of texts with the encoder's original weights, and caches them.

    The encoder's passage prompt is put before every text, as the server does. The cache has no limit.

    Args:
        encoder: the encoder.
        runner: runner of the encoder's ONNX file.
        progress: called with the number of texts done; the attribute `progress` may be replaced later.
    """

    def __init__(self, encoder: SourceEncoder, runner: OnnxRunner, progress: Progress = no_progress) -> None:
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
        """Yield a new account, which records all requests inside the block.

        The account of an outer block does not record these requests.
        """
        before, self._account = self._account, Account()
        try:
            yield self._account
        finally:
            self._account = before

    def price(self, account: Account) -> Cost:
        """Return an estimate of the wall and CPU seconds that an account's requests would have taken without the cache.

        For each kind of result, the estimate is the mean time of all texts computed so far, times the number of texts
        in the account.
        """
        total = Cost()
        for kind, texts in account.asked.items():
            known = self._vectors if kind == "vectors" else self._states[int(kind)]
            total.seconds += self._spent[kind].seconds * len(texts) / len(known)
            total.cpu_seconds += self._spent[kind].cpu_seconds * len(texts) / len(known)
        return total

    def vectors(self, texts: Sequence[str]) -> Matrix:
        """Return the vectors of texts with the encoder's original weights, float32 (texts, dimensions).

        Args:
            texts: at least one text, without prompt.

        Raises:
            ExportError: the ONNX file cannot be run.
        """
        new = [text for text in dict.fromkeys(texts) if text not in self._vectors]
        with self._accounted("vectors", texts):
            if new:
                prompt = self.encoder.prompts.passage
                found = self._runner.run([prompt + text for text in new], "sentence_embedding", progress=self.progress)
                self._vectors.update(zip(new, found, strict=True))
        return np.stack([self._vectors[text] for text in texts])

    @property
    def is_trainable(self) -> bool:
        """Whether the encoder in PyTorch, which training needs, is loaded. Loading takes seconds and may fail."""
        return "trainable_encoder" in vars(self)

    @cached_property
    def trainable_encoder(self) -> TrainableEncoder:
        """The encoder in PyTorch, which is loaded at the first use of this property.

        Raises:
            ExportError: sentence-transformers cannot load the encoder, or its layers cannot be trained.
        """
        from emberpc.export.tuning.trainable_encoder import TrainableEncoder

        return TrainableEncoder(self.encoder)

    def tokens(self, texts: Sequence[str]) -> list[TokenIds]:
        """Return the token ids of each text with the passage prompt before it, truncated to the encoder's limit.

        Raises:
            ExportError: the encoder cannot be loaded in PyTorch.
        """
        new = [text for text in dict.fromkeys(texts) if text not in self._tokens]
        if new:
            prompt = self.encoder.prompts.passage
            self._tokens.update(zip(new, self.trainable_encoder.tokenize([prompt + text for text in new]), strict=True))
        return [self._tokens[text] for text in texts]

    def states(self, texts: Sequence[str], top: int) -> list[States] | None:
        """Return the hidden states of each text below the upper `top` layers, each float16 (tokens, hidden size).

        States that are not cached are computed. That restores the original weights of `trainable_encoder`, so do not
        call this for new texts during a training.

        Args:
            texts: the texts, without prompt.
            top: number of upper layers.

        Returns:
            The states in the order of `texts`; None if the encoder has no layers below the upper `top`.

        Raises:
            ExportError: the encoder cannot be loaded in PyTorch.
        """
        if top >= self.trainable_encoder.layers:
            return None
        known = self._states.setdefault(top, {})
        new = [text for text in dict.fromkeys(texts) if text not in known]
        with self._accounted(str(top), texts):
            if new:
                known.update(
                    zip(new, self.trainable_encoder.lower_states(self.tokens(new), top, self.progress), strict=True)
                )
        return [known[text] for text in texts]

    @contextmanager
    def _accounted(self, kind: str, texts: Sequence[str]) -> Iterator[None]:
        """Record a request for `texts`, and add the block's time to the account and to the total of `kind`."""
        self._account.asked.setdefault(kind, set()).update(texts)
        with Cost() as cost:
            yield
        for total in (self._spent.setdefault(kind, Cost()), self._account.waited):
            total.seconds += cost.seconds
            total.cpu_seconds += cost.cpu_seconds
