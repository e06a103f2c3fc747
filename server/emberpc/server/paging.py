"""Page tokens of list calls. A token encodes the last item of the previous page, and is opaque to callers.

The next page starts after that item. So writes between two pages neither repeat nor skip other items.
"""

from __future__ import annotations

import base64
import binascii

from emberpc.server.errors import ServiceError, invalid

#: Most items of a page of any list.
MAX_PAGE_SIZE = 1000
#: Longest token in characters. The longest encodes a pair of ids of 512 bytes as JSON, up to six characters per byte.
_MAX_TOKEN = 16 * 1024


def encode_token(last: str) -> str:
    """Return the token of the page that starts after the item `last`."""
    return base64.urlsafe_b64encode(last.encode()).decode()


def decode_token(token: str) -> str:
    """Return the item after which a page starts; empty for an empty token, which means the first page.

    Raises:
        ServiceError: INVALID_ARGUMENT if this server cannot have made the token.
    """
    if len(token) > _MAX_TOKEN:
        raise wrong_token()
    try:
        last = base64.b64decode(token, altchars=b"-_", validate=True).decode()
    except (binascii.Error, ValueError) as error:
        raise wrong_token() from error
    # Ids and names contain no control characters.
    if any(ord(character) < ord(" ") for character in last):
        raise wrong_token()
    return last


def wrong_token() -> ServiceError:
    """Return the INVALID_ARGUMENT error for a page token that this server did not make."""
    return invalid("page_token", "is not a token that this call returned; start again without a token")
