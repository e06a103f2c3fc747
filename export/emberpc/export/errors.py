"""Errors of the export."""


class ExportError(Exception):
    """An export, a training, a comparison or a verification is not possible, or failed.

    The message is for the user and names the item, the problem and the remedy.
    """


class NoRoomError(ExportError):
    """A checkpoint cannot be written, most likely since the disk is full, so further attempts would fail, too."""
