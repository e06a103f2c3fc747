"""Whether the vectors of a file were made by the model that a collection is under."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from emberpc.cli.errors import CliError, ExitCode
from emberpc.cli.output import note
from emberpc.client import Client, EmberpcError, InputError, InputTypeError
from emberpc.client.types import Truncation

#: Records whose texts are embedded to compare their vectors, and among how many records at the start they are looked
#: for.
_COMPARED, _LOOKED_AT = 8, 256
#: Least cosine of a vector to the one that the same model gives the text again: a quantised model computes it slightly
#: differently in another batch, and other models are far below.
_MIN_COSINE = 0.999

Records = Iterator[dict[str, Any]]


def with_vectors_of(
    client: Client, records: Records, source: str, stated: str, *, model: str, fingerprint: str, truncation: Truncation
) -> Records:
    """Return records after a check that their vectors compare with those of a model.

    The same model has another fingerprint where a file was written by a version with another scheme of fingerprints.
    So where the fingerprints differ, some texts at the start of the file are embedded, and the vectors are compared.

    Args:
        client: to the server that has the model.
        records: the records of the file.
        source: the file's name.
        stated: fingerprint (hex) of the model that made the vectors, as the file states it; empty: it states none.
        model: the model.
        fingerprint: its fingerprint (hex); empty: there is no model.
        truncation: what happens to texts that are too long for it.

    Raises:
        CliError: the vectors were made by another model.
    """
    if not fingerprint or stated in ("", fingerprint):
        return records
    first = list(itertools.islice(records, _LOOKED_AT))
    compared = _compared(first)
    if not compared or not _are_of(client, compared, model, truncation):
        raise CliError(
            f"the vectors in {source} were made by another model than {model!r}, as it is here; have the texts "
            "embedded anew with --text-only",
            ExitCode.CONFLICT,
        )
    note(
        f"{source} has another fingerprint of {model!r}, and {model!r} gives {len(compared)} of its texts the vectors "
        "that it has; its vectors are taken"
    )
    return itertools.chain(first, records)


def _compared(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return records with a text and a vector, evenly taken."""
    found = [
        record
        for record in records
        if isinstance(text := record.get("text"), str) and text.strip() and record.get("vector") is not None
    ]
    step = max(1, len(found) // _COMPARED)
    return found[::step][:_COMPARED]


def _are_of(client: Client, records: Sequence[dict[str, Any]], model: str, truncation: Truncation) -> bool:
    """Return whether a model gives the texts of records the vectors that they have."""
    try:
        theirs = np.stack([np.asarray(record["vector"], dtype=np.float64) for record in records])
        texts = [record["text"] for record in records]
        found = client.embed(texts, model=model, dimensions=theirs.shape[1], truncation=truncation)
    except (EmberpcError, InputError, InputTypeError, ValueError, IndexError):
        return False  # a width that the model does not have, or a text that it does not take
    ours = found.astype(np.float64)
    lengths = np.linalg.norm(theirs, axis=1) * np.linalg.norm(ours, axis=1)
    return bool(((theirs * ours).sum(axis=1) >= _MIN_COSINE * lengths).all() and (lengths > 0).all())
