"""Divide a caller's items among requests: by number and bytes, and a call with too large a response into two calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from emberpc.client._core.rpc_call import Call, Item, Response, Result

#: Maximum number of bytes of the items in one request, unless the request has a single item. Half of a server's default
#: limit (`max_message_bytes`, 16 MiB), since the rest of the request needs space too.
_MAX_CHUNK_BYTES = 8 * 2**20


def chunks(items: Iterable[Item], size: int, weigh: Callable[[Item], int]) -> Iterator[tuple[int, list[Item]]]:
    """Divide items into lists of at most `size` items and 8 MiB. An item of more than 8 MiB gets its own list.

    Args:
        items: the items; read as needed.
        size: maximum number of items of a list, at least 1.
        weigh: returns the bytes of an item, exactly or as an upper limit.

    Yields:
        The index of the list's first item among all items, and the list.
    """
    first, chunk, weight = 0, list[Item](), 0
    for item in items:
        bytes_of_item = weigh(item)
        if chunk and weight + bytes_of_item > _MAX_CHUNK_BYTES:
            yield first, chunk
            first, chunk, weight = first + len(chunk), [], 0
        chunk.append(item)
        weight += bytes_of_item
        # A list of `size` items is yielded before the next item is read. So the list is sent even if reading the next
        # item raises an error.
        if len(chunk) == size:
            yield first, chunk
            first, chunk, weight = first + len(chunk), [], 0
    if chunk:
        yield first, chunk


def divisible(
    make: Callable[[int, list[Item]], Call[Response, Result]], first: int, part: list[Item]
) -> Callable[[], Sequence[Call[Response, Result]]]:
    """Return a function, for `Call.halves`, that divides the call for one part of a list into two calls.

    Args:
        make: builds the call for a part. Its arguments are the caller's index of the first item, and the part.
        first: the caller's index of the first item of `part`.
        part: the part to divide, of at least two items.
    """
    middle = len(part) // 2
    return lambda: [make(first, part[:middle]), make(first + middle, part[middle:])]
