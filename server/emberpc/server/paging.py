"""Page tokens: opaque to callers, they stand for the last item of the page before.

A page begins behind that item, so pages stay right whatever is written between them.
"""

from __future__ import annotations

import base64
import binascii

from emberpc.server.errors import invalid

#: Most items of a page of any list.
MAX_PAGE_SIZE = 1000


def encode_token(last: str) -> str:
    """Return the token of the page that starts behind an item."""
    return base64.urlsafe_b64encode(last.encode()).decode()


def decode_token(token: str) -> str:
    """Return the item behind which a page starts, empty for the first page.

    Raises:
        ServiceError: INVALID_ARGUMENT if the token is none that this server gave.
    """
    try:
        return base64.b64decode(token, altchars=b"-_", validate=True).decode()
    except (binascii.Error, ValueError) as error:
        raise invalid("page_token", "is none that this server gave; start again without one") from error
