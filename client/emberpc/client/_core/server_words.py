"""Put error messages of the server in the terms of the Python client."""

from __future__ import annotations

import re

#: Methods of the client for RPCs that messages of the server name.
_METHODS = {
    "BackupCollection": "backup_collection",
    "BatchGetRecords": "get",
    "ClusterRecords": "clusters",
    "FindDuplicates": "duplicates",
    "GetServerInfo": "server_info",
    "ListCollections": "collections",
    "ListModels": "models",
    "ReembedCollection": "reembed_collection",
    "RestoreCollection": "restore_collection",
    "VerifyCollection": "verify_collection",
}
#: Finds what `python_words` replaces: an enum value is group 1, an RPC group 2. The pattern also matches text in
#: quotes, then without these groups: this text must stay unchanged, since it may come from the caller.
_WIRE_WORD = re.compile(
    r"""(?<!\w)'[^']*'|"[^"]*"|\b(REFUSE|END|START|DENSE|LEXICAL|HYBRID|SCORES|RANKS|QUERY|PASSAGE|INTERACTIVE|BULK|"""
    rf"""COSINE|DOT_PRODUCT|EUCLIDEAN|FLOAT32|FLOAT16|INT8|BINARY)\b|`?(?<![\w/])({"|".join(_METHODS)})\b`?"""
)
#: Matches, at the start of a message, the path of a field of a new collection. The field is an argument of the client.
_COLLECTION_FIELD = re.compile(r"^collection\.(?:hnsw\.)?(?=\w)")
#: Matches the name of a row of the request's field `vectors` at the start of a message.
_VECTOR = re.compile(r"vectors\[(\d+)\]")


def python_words(message: str) -> str:
    """Return a message of the server in the terms of the client.

    Outside quotes, an enum value becomes the client's word, such as `END` `'end'`, and an RPC becomes the name of its
    method, such as `ListCollections` `` `collections` ``. At the start, `collection.name` becomes `name`.
    """

    def replace(found: re.Match[str]) -> str:
        if found[1]:
            return repr(found[1].lower())
        return f"`{_METHODS[found[2]]}`" if found[2] else found[0]

    return _COLLECTION_FIELD.sub("", _WIRE_WORD.sub(replace, message))


def renumber(text: str, items: str, first: int, vector: str) -> str:
    """Replace each index of an item in a message, such as `texts[3]`, by the index in the caller's list.

    Args:
        text: the message. Indexes are also replaced inside quotes.
        items: name of the repeated field of the request that has one part of the caller's list; empty: there is none.
        first: the caller's index of the first item of this part.
        vector: the caller's name of the vector of an item, with `{}` for its index. It replaces `vectors[…]` at the
            start of the message. Empty: no name is replaced.
    """
    if vector and (found := _VECTOR.match(text)):
        return vector.format(int(found[1]) + first) + text[found.end() :]
    if not (first and items):
        return text
    return re.sub(rf"\b{re.escape(items)}\[(\d+)\]", lambda found: f"{items}[{int(found[1]) + first}]", text)
