"""The error types of this room."""

from __future__ import annotations


class BundleError(Exception):
    """A folder is not a bundle, or a damaged one; the message names the file, what is wrong and the remedy."""


class UnstatedError(BundleError):
    """A foreign model does not say something that its user can say.

    Args:
        message: what it does not say.
        option: the option that says it, such as `pooling=mean`.
    """

    def __init__(self, message: str, option: str) -> None:
        super().__init__(message)
        self.option = option
