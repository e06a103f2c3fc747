"""What errors of the server and the client say, in the words of the command line."""

from __future__ import annotations

import re

_TRUNCATE = "set the call's `truncation` to 'end' or 'start'"
_REMEDIES = (
    (_TRUNCATE, "give --truncation end or start"),
    ("see ListCollections, or create it", "see `emberpc collection list`"),
    ("give a longer timeout, or send less at once", "give a longer --timeout, or send less at once"),
    ("name a model, or give 1 to", "give --model, or --dimensions for vectors only: 1 to"),
)
#: Items of a request that are arguments of a command, and what the command line calls them.
_ITEMS = {"texts": "text", "targets": "target", "ids": "id"}
_ITEM = re.compile(rf"^({'|'.join(_ITEMS)})\[(\d+)\]")
_ONE = ((re.compile(r"^sources\[0\]"), "the source"), (re.compile(r"^queries\[0\](\.text)?|^query(?= )"), "the query"))
#: Fields of a request that are options of a command.
_FIELD = re.compile(r"^(?:collection\.)?(?:hnsw\.)?(model|classifier|dimensions|truncation|m|ef_construction)(?=: )")
_TIMEOUT = re.compile(r"^timeout(?= is )")


def reworded(message: str, collection: str = "") -> str:
    """Return what an error says, with options in place of a request's fields, and commands in place of the API's calls.

    Args:
        message: of an error of the client or the server.
        collection: the collection that records were to be written to; empty: none were.
    """
    if collection:
        message = message.replace(
            _TRUNCATE,
            f"give `emberpc upsert` --truncation end; `emberpc collection update {collection} --truncation end` sets "
            "it for all writes",
        )
    for words, ours in _REMEDIES:
        message = message.replace(words, ours)
    message = _ITEM.sub(_numbered, message)
    for pattern, ours in _ONE:
        message = pattern.sub(ours, message)
    message = _FIELD.sub(_option, message)
    return _TIMEOUT.sub("--timeout", message)


def _numbered(found: re.Match[str]) -> str:
    return f"{_ITEMS[found[1]]} {int(found[2]) + 1}"


def _option(found: re.Match[str]) -> str:
    return f"--{found[1].replace('_', '-')}"
