"""Errors of bundles."""

from __future__ import annotations


class BundleError(Exception):
    """A bundle or foreign folder is missing, damaged or unsupported, or its loading was cancelled.

    Also: an option or a name of a variant is wrong, a value is out of range, or a bundle cannot be written to a folder.
    The message states the problem, and usually the file and the remedy.
    """


class UnstatedError(BundleError):
    """A foreign model lacks a setting that its user can state with a model option.

    Args:
        message: the problem.
        option: the model option with which the user can state the setting, with an example of a value or a placeholder,
            such as `pooling=mean` or `dimensions=NUMBER`. `message` does not have this, so that the command line and
            the server can each add it in their own form.
    """

    def __init__(self, message: str, option: str) -> None:
        super().__init__(message)
        self.option = option
