"""The error types of this room."""


class ExportError(Exception):
    """A model cannot be exported; the message is for the user and names the item, what is wrong and the remedy."""


class NoRoomError(ExportError):
    """There is no room on the disk: whatever is tried next fails, too."""
