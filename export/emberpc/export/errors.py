"""Errors of the export."""


class ExportError(Exception):
    """An export, a training, a comparison or a verification is not possible, or failed.

    The message is for the user. It names the item and the problem, and mostly the remedy.
    """


class NoSpaceError(ExportError):
    """A checkpoint of a training cannot be written, for example since the disk is full.

    A comparison of several trainings stops at this error, since their checkpoints would most likely fail, too.
    """
