"""Errors of bundles."""

from __future__ import annotations


class BundleError(Exception):
    """A bundle or foreign folder is missing, damaged or unsupported, or its loading was cancelled.

    Also: an option is wrong, a value exceeds a limit, or a bundle cannot be written to a folder.
    The message names the problem and, where there is one, the file and the remedy.
    """


class UnstatedError(BundleError):
    """A foreign model lacks a setting that its user can state with a model option.

    Args:
        message: the problem, with the name of the setting that is missing.
        option: the model option with which the user can state the setting, such as `pooling=mean`.
    """

    def __init__(self, message: str, option: str) -> None:
        super().__init__(message)
        self.option = option
