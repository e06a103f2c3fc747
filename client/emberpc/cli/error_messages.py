"""Translate error messages of server and client to the terms of the command line.

Fields of a request become options or arguments, and calls of the API become commands.
"""

from __future__ import annotations

import re

_TRUNCATE = "set the call's `truncation` to 'end' or 'start'"
_REMEDIES = (
    (_TRUNCATE, "give --truncation end or start"),
    (
        "see ListCollections, or create it",
        "see `emberpc collection list`, or create it with `emberpc collection create NAME --model MODEL`",
    ),
    ("give a longer timeout, or send less at once", "give a longer --timeout, or fewer texts in one request"),
    ("give it a longer timeout, send fewer texts,", "give a longer --timeout, fewer texts in one request,"),
    ("name a model, or give 1 to", "give --model NAME or, for vectors only, --dimensions 1 to"),
    ("give the address of another server", "give the address of another server with --target HOST:PORT"),
    ("it must be 0 (for 10) to", "it must be 1 to"),  # the command line refuses 0
)
#: Repeated fields of a request that are arguments of a command, with their names on the command line.
_ITEMS = {"texts": "text", "targets": "target", "ids": "id"}
#: Matches an item of one of these fields at the start of a message.
_ITEM = re.compile(rf"^({'|'.join(_ITEMS)})\[(\d+)\]")
#: Items of which a command sends exactly one: the pattern of the item in a message, and its name on the command line.
_SINGLE_ITEMS = (
    (re.compile(r"^sources\[0\]"), "the source"),
    (re.compile(r"^queries\[0\](\.text)?|^query(?= )"), "the query"),
)
#: Matches, at the start of a message, one of these fields of a request, each of which is an option of a command.
_FIELD = re.compile(
    r"^(?:collection\.)?(?:hnsw\.)?(model|classifier|dimensions|truncation|m|ef_construction|top_k)(?=: )"
)
#: Matches the argument `timeout` of the client at the start of a message.
_TIMEOUT = re.compile(r"^timeout(?= is )")


def in_cli_terms(message: str, collection: str = "") -> str:
    """Return an error message with the fields and remedies that this module lists replaced by options and commands.

    Items are then counted from 1: `texts[3]` at the start of a message becomes `text 4`.

    Args:
        message: message of an error of the client or the server.
        collection: the collection that the command writes records to; empty: it writes none.
    """
    if collection:
        message = message.replace(
            _TRUNCATE,
            f"give `emberpc upsert` --truncation end; `emberpc collection update {collection} --truncation end` sets "
            "it for all writes",
        )
    for remedy, translated in _REMEDIES:
        message = message.replace(remedy, translated)
    message = _ITEM.sub(_numbered, message)
    for pattern, translated in _SINGLE_ITEMS:
        message = pattern.sub(translated, message)
    message = _FIELD.sub(_option, message)
    return _TIMEOUT.sub("--timeout", message)


def _numbered(found: re.Match[str]) -> str:
    return f"{_ITEMS[found[1]]} {int(found[2]) + 1}"


def _option(found: re.Match[str]) -> str:
    return f"--{found[1].replace('_', '-')}"
