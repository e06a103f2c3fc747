"""Page tokens: opaque to callers, they stand for the last item of the page before.

A page begins behind that item, so pages stay right whatever is written between them.
"""

from __future__ import annotations

import base64
import binascii

from emberpc.server.errors import ServiceError, invalid

#: Most items of a page of any list.
MAX_PAGE_SIZE = 1000
#: Longest token, in characters: that of a pair of ids of 512 bytes, each byte written as six characters of JSON.
_MAX_TOKEN = 16 * 1024


def encode_token(last: str) -> str:
    """Return the token of the page that starts behind an item."""
    return base64.urlsafe_b64encode(last.encode()).decode()


def decode_token(token: str) -> str:
    """Return the item behind which a page starts, empty for the first page.

    Raises:
        ServiceError: INVALID_ARGUMENT if the token is none that this server gave.
    """
    if len(token) > _MAX_TOKEN:
        raise wrong_token()
    try:
        last = base64.b64decode(token, altchars=b"-_", validate=True).decode()
    except (binascii.Error, ValueError) as error:
        raise wrong_token() from error
    # No id and no name has a control character.
    if any(ord(character) < ord(" ") for character in last):
        raise wrong_token()
    return last


def wrong_token() -> ServiceError:
    """Return the INVALID_ARGUMENT error for a page token that this server did not give."""
    return invalid("page_token", "is not a token that this call returned; start again without a token")
