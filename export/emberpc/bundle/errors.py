"""The one error type of this room."""


class BundleError(Exception):
    """A folder is not a bundle, or a damaged one; the message names the file, what is wrong and the remedy."""
