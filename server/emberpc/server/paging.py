"""Encode and decode page tokens of list calls.

A token encodes the name or id of the last item of the previous page (for duplicate pairs: negative score and both ids
as JSON). Callers do not interpret tokens. The next page starts after that item in the order of the list, so items that
are inserted or deleted between two pages do not make a page repeat or skip other items.
"""

from __future__ import annotations

import base64
import binascii

from emberpc.server.errors import ServiceError, invalid

#: Maximum number of items of a page of any list.
MAX_PAGE_SIZE = 1000
#: Limit of the characters of a token that is decoded. A token of this server encodes at most two ids of 512 bytes as
#: JSON, in which a byte takes at most six characters: at most about 8,200 characters of base64.
_MAX_TOKEN = 16 * 1024


def encode_token(last: str) -> str:
    """Return the token (base64) of the page that starts after the item whose name or id is `last`."""
    return base64.urlsafe_b64encode(last.encode()).decode()


def decode_token(token: str) -> str:
    """Return the name or id of the item after which a page starts; empty for an empty token, that of the first page.

    Raises:
        ServiceError: INVALID_ARGUMENT if the token has more than 16,384 characters, is not base64 of UTF-8, or encodes
            ASCII control characters below the space.
    """
    if len(token) > _MAX_TOKEN:
        raise wrong_token()
    try:
        last = base64.b64decode(token, altchars=b"-_", validate=True).decode()
    except (binascii.Error, ValueError) as error:
        raise wrong_token() from error
    # Ids and names contain no control characters, so the server cannot have made such a token.
    if any(ord(character) < ord(" ") for character in last):
        raise wrong_token()
    return last


def wrong_token() -> ServiceError:
    """Return the INVALID_ARGUMENT error for a page token that this server did not make."""
    return invalid("page_token", "is not a token that this call returned; start again without a token")
