"""Validation of records to be stored, of expected revisions, and of the options of a search."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from emberpc.server.collections.types import NewRecord
from emberpc.server.errors import Code, ServiceError, Violation, invalid, invalid_fields

MAX_ID_BYTES = 512
MAX_LABEL_BYTES = 512
MAX_METADATA_BYTES = 64 * 1024
MAX_TOP_K = 10_000
MAX_EF = 1_000_000


def check_records(records: Sequence[NewRecord], *, restored: bool = False) -> list[str]:
    """Check that the records of one write can be stored, and encode their metadata.

    Args:
        records: the records.
        restored: whether the records come from a backup. Then labels may be longer than the limit, and metadata may
            contain NUL characters, since older versions accepted both.

    Returns:
        The metadata of each record, as JSON.

    Raises:
        ServiceError: INVALID_ARGUMENT if there are no records; INVALID_ARGUMENT, naming every wrong field, if ids,
            texts, labels or metadata are malformed, ids, labels or metadata are too long, or two records have the same
            id (the later record is named). The length of texts and the time to live are not checked.
    """
    if not records:
        raise invalid("records", "is empty; give at least one record")
    violations = []
    metadata_texts = []
    seen: dict[str, int] = {}
    for i, record in enumerate(records):
        metadata_text, wrong_metadata = _metadata_text(record, restored=restored)
        metadata_texts.append(metadata_text)
        wrong = {"id": _wrong_id(record.id), "metadata": wrong_metadata}
        for name, text in (("text", record.text), ("label", record.label)):
            wrong[name] = "" if _size(text) is not None else "has half a surrogate pair; send Unicode text"
        if not wrong["id"] and record.id in seen:
            wrong["id"] = f"is {record.id!r} as that of records[{seen[record.id]}]; leave one out"
        seen.setdefault(record.id, i)
        if not wrong["label"] and not restored and len(record.label.encode()) > MAX_LABEL_BYTES:
            size = len(record.label.encode())
            wrong["label"] = f"has {size} bytes, a label has at most {MAX_LABEL_BYTES}; shorten it"
        violations += [Violation(f"records[{i}].{name}", why) for name, why in wrong.items() if why]
    if violations:
        raise invalid_fields(violations)
    return metadata_texts


def check_search(queries: int, top_k: Sequence[int], excluded: int, ef: int, min_recall: float = 0) -> None:
    """Raise INVALID_ARGUMENT, naming the first wrong option, unless the options of a search are valid.

    Args:
        queries: number of queries.
        top_k: `top_k` of each query; must have one item for each query, each 1 to 10,000.
        excluded: number of items of `exclude_ids`; must be the number of queries.
        ef: candidates of a search of the graph; must be 0 to 1,000,000. 0: the server chooses.
        min_recall: minimum recall; must be 0 to 1, and 0 if `ef` is given. 0: no target.
    """
    if len(top_k) != queries:
        raise invalid("top_k", f"has {len(top_k)} items for {queries} queries; give one for each")
    if excluded != queries:
        raise invalid("exclude_ids", f"has {excluded} items for {queries} queries; give one for each")
    for i, size in enumerate(top_k):
        if not 1 <= size <= MAX_TOP_K:
            raise invalid(f"queries[{i}].top_k", f"is {size}; it must be 1 to {MAX_TOP_K}")
    if not 0 <= ef <= MAX_EF:
        raise invalid("ef", f"is {ef}; it must be 0 (the server chooses) to {MAX_EF}")
    if not 0 <= min_recall <= 1:  # true for NaN too
        raise invalid("min_recall", f"is {min_recall:g}; it must be above 0 and at most 1, or 0 for no target")
    if ef and min_recall:
        raise invalid("min_recall", "is given beside ef; give one of the two")


def check_revision(record_id: str, expected: int, present: int) -> None:
    """Raise ABORTED if the `present` revision of a record is not the `expected` one; each is 0 for a missing record."""
    if expected != present:
        raise ServiceError(
            Code.ABORTED,
            f"record {record_id!r} has revision {present}, not {expected}; the request wrote nothing, read the record "
            "and retry",
            reason="REVISION_MISMATCH",
            metadata={"record": record_id, "expected_revision": str(expected), "present_revision": str(present)},
        )


def _wrong_id(record_id: str) -> str:
    """Return what is wrong with an id, as a part of an error message; empty if the id is valid."""
    size = _size(record_id)
    if size is None:
        return "has half a surrogate pair; send Unicode text"
    if not size:
        return "is empty; give every record an id"
    if size > MAX_ID_BYTES:
        return f"has {size} bytes, an id has at most {MAX_ID_BYTES}; shorten it"
    if any(unicodedata.category(character) == "Cc" for character in record_id):
        return "has a control character; leave it out"
    return ""


def _metadata_text(record: NewRecord, *, restored: bool) -> tuple[str, str]:
    """Return the metadata of a record as JSON, and what is wrong with it, as a part of an error message.

    The message is empty if the metadata is valid; otherwise the JSON is empty. With `restored`, NUL characters are
    accepted.
    """
    if not isinstance(record.metadata, Mapping):
        return "", "is no JSON object; give one"
    try:
        metadata_text = json.dumps(dict(record.metadata), ensure_ascii=False, allow_nan=False)
        size = len(metadata_text.encode())
    except (TypeError, ValueError, RecursionError):
        return "", "holds what JSON cannot: use texts, finite numbers, booleans, nulls, lists and objects"
    if size > MAX_METADATA_BYTES:
        return "", f"has {size} bytes as JSON, it may have {MAX_METADATA_BYTES}; shorten it"
    # JSON contains NUL only as the escape \u0000. But the JSON of a backslash followed by "u0000" contains the same
    # characters, without any NUL. So the metadata itself is searched as well.
    if not restored and "\\u0000" in metadata_text and (field := _field_with_nul(dict(record.metadata))) is not None:
        what = f"a NUL character (U+0000) in field {field[:100]!r}"
        return "", f"holds {what}, which filters cannot compare; leave it out"
    return metadata_text, ""


def _field_with_nul(value: Any, path: tuple[str, ...] = ()) -> str | None:
    """Return the first metadata field whose value or last key has a NUL character; None if there is none.

    The field is returned as its keys, joined by dots.

    Args:
        value: the metadata, or a part of it.
        path: the keys that lead to that part.
    """
    if isinstance(value, str):
        return ".".join(path) if "\0" in value else None
    parts: Iterable[tuple[tuple[str, ...], Any]] = ()
    if isinstance(value, Mapping):
        parts = (((*path, str(key)), inner) for key, inner in value.items())
    elif isinstance(value, (list, tuple)):
        parts = ((path, inner) for inner in value)
    for inner_path, inner in parts:
        if inner_path != path and "\0" in inner_path[-1]:
            return ".".join(inner_path)
        if (found := _field_with_nul(inner, inner_path)) is not None:
            return found
    return None


def _size(text: str) -> int | None:
    """Return the number of bytes of a text as UTF-8; None if it has half a surrogate pair, which UTF-8 cannot hold."""
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        return None
