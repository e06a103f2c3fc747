"""Translate error messages of server and client to the terms of the command line.

The fields of a request that this module lists become options or arguments. The remedies that this module lists name
options and commands instead of fields and calls of the API.
"""

from __future__ import annotations

import re

_TRUNCATE = "set the call's `truncation` to 'end' or 'start'"
_SEND_LESS = "fewer texts in one request"
_REMEDIES = (
    (_TRUNCATE, "give --truncation end or start"),
    (
        "create it, or list the collections to find the name of another",
        "see `emberpc collection list`, or create it with `emberpc collection create NAME --model MODEL`",
    ),
    ("`verify_collection`", "`emberpc collection verify`"),
    ("`backup_collection`", "`emberpc collection backup`"),
    ("is given beside ef;", "is given beside --ef;"),
    ("is given beside min_recall;", "is given beside --min-recall;"),
    ("set mode to 'hybrid'", "give --mode hybrid"),
    ("give a text, or use mode 'dense'", "give a text, or --mode dense"),
    ("give it some text, or search by a vector or a record id", "give it some text, or --id ID"),
    ("give another record in queries[0]", "give another --id"),
    ("ask for fewer hits, or fewer parts of the records", "give a smaller --top-k, or leave out --vectors"),
    ("and 0 means", "and without --dimensions"),
    ("give a longer timeout, or send less at once", f"give a longer --timeout, or {_SEND_LESS}"),
    ("give it a longer timeout, send fewer texts,", f"give a longer --timeout, {_SEND_LESS},"),
    ("name a model, or give 1 to", "give --model NAME or, for vectors only, --dimensions 1 to"),
    ("give the address of another server", "give the address of another server with --target HOST:PORT"),
)
#: Repeated fields of a request that are arguments of a command, with their names on the command line.
_ITEMS = {"texts": "text", "targets": "target", "ids": "id"}
#: Matches an item of a field of `_ITEMS`, such as `texts[3]`, at the start of a message.
_ITEM = re.compile(rf"^({'|'.join(_ITEMS)})\[(\d+)\]")
#: Fields of which a command sends one item only, and the filter, which is the option --where: the pattern at the start
#: of a message, and the words to put there.
_SINGLE_ITEMS = (
    (re.compile(r"^sources\[0\] is empty; leave it out or "), "the source is empty; "),
    (re.compile(r"^sources\[0\]"), "the source"),
    (re.compile(r"^queries\[0\](\.text)?|^query(?= )"), "the query"),
    (re.compile(r"^name(?= is )"), "the name"),
    (re.compile(r"^where(?=, column \d+: | (?:is|has) )|^filter(?= (?:is|has|makes) )"), "--where"),
    (re.compile(r"^filter\.(?=[\w.\[\]]+ (?:is|has|makes) )"), "--where: "),
)
#: Matches, at the start of a message, an argument of the client that is an option of a command. Group 1 is the option
#: with `_` instead of `-`.
_FIELD = re.compile(
    r"^(target|timeout|model|classifier|dimensions|truncation|normalize|m|ef_construction|top_k|ef|min_recall|"
    r"dense_weight|fusion|min_score)(?=:? (?:is|has) )"
)


def in_cli_terms(message: str, collection: str = "", *, batches: bool = False) -> str:
    """Return an error message with the fields and remedies that this module lists in the terms of the command line.

    A field is replaced only at the start of the message. An item is then counted from 1: `texts[3]` becomes `text 4`.

    Args:
        message: message of an error of the client or the server.
        collection: the collection that the command writes records to, which the remedy for too many tokens then names;
            empty: the command writes no records.
        batches: whether the command has the option --batch-size, which the remedy for a missed deadline then names.
    """
    if collection:
        message = message.replace(
            _TRUNCATE,
            f"give `emberpc upsert` --truncation end; `emberpc collection update {collection} --truncation end` sets "
            "it for all writes",
        )
    for remedy, translated in _REMEDIES:
        message = message.replace(remedy, translated)
    if batches:
        message = message.replace(_SEND_LESS, "a smaller --batch-size")
    message = _ITEM.sub(_numbered, message)
    for pattern, translated in _SINGLE_ITEMS:
        message = pattern.sub(translated, message)
    return _FIELD.sub(_option, message)


def _numbered(found: re.Match[str]) -> str:
    return f"{_ITEMS[found[1]]} {int(found[2]) + 1}"


def _option(found: re.Match[str]) -> str:
    return f"--{found[1].replace('_', '-')}"
