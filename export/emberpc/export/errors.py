"""The one error type of this room."""


class ExportError(Exception):
    """A model cannot be exported; the message is for the user and names the item, what is wrong and the remedy."""
