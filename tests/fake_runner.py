"""Base of the models that tests pass to the scheduler."""

from __future__ import annotations


class FakeRunner:
    """A model that states no size of micro-batches and runs batches of any shape."""

    batch_tokens = 0

    def padded(self, tokens: int) -> int:
        return tokens

    def rows(self, texts: int) -> int:
        return texts
