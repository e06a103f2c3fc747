"""Base of the models that tests pass to the scheduler."""

from __future__ import annotations


class FakeRunner:
    """A model that states no size of micro-batches."""

    batch_tokens = 0
