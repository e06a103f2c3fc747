"""Check that the model of a collection made the vectors of a file."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from emberpc.cli.errors import CliError, ExitCode
from emberpc.cli.output import note
from emberpc.client import Client, FailedPrecondition, InputError, InputTypeError, InvalidArgument
from emberpc.client.types import Truncation

#: Number of records whose texts are embedded to compare vectors, and number of records at the start of the file that
#: these are chosen from.
_COMPARED, _LOOKED_AT = 8, 256
#: Least cosine between the stored and the new vector of a text, if the same model made both. A quantized model gives
#: slightly different vectors in different batches. The vectors of another model have far smaller cosines.
_MIN_COSINE = 0.999

Records = Iterator[dict[str, Any]]


def check_vectors(
    client: Client, records: Records, source: str, stated: str, *, model: str, fingerprint: str, truncation: Truncation
) -> Records:
    """Check that a model made the vectors of records, and return an iterator over all the records.

    A file that an older version of emberpc wrote has another fingerprint of the same model, since the rule of
    fingerprints changed. So if the fingerprints differ, some texts at the start of the file are embedded, and their
    vectors are compared with those of the file. Nothing is checked if one of the two fingerprints is empty.

    Args:
        client: client of the server that has the model.
        records: records of the file.
        source: name of the file, for messages.
        stated: fingerprint (hex) of the model that made the vectors, as the file states it; empty: not stated.
        model: name of the model.
        fingerprint: fingerprint (hex) of the model; empty: there is no model.
        truncation: treatment of texts with too many tokens.

    Raises:
        CliError: another model made the vectors, or they cannot be compared: none of the first 256 records has both a
            text and a vector, or the texts cannot be embedded.
    """
    if not fingerprint or stated in ("", fingerprint):
        return records
    first = list(itertools.islice(records, _LOOKED_AT))
    compared = _compared(first)
    if not compared or not _are_of(client, compared, model, truncation):
        raise CliError(
            f"the vectors in {source} were made by another model than {model!r}, as it is served here; have the texts "
            "embedded again with --text-only",
            ExitCode.CONFLICT,
        )
    note(
        f"{source} has another fingerprint of {model!r}, and {model!r} gives {len(compared)} of its texts the vectors "
        "that it has; its vectors are taken"
    )
    return itertools.chain(first, records)


def _compared(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return at most 8 of the records that have a text and a vector, at even distances."""
    found = [
        record
        for record in records
        if isinstance(text := record.get("text"), str) and text.strip() and record.get("vector") is not None
    ]
    step = max(1, len(found) // _COMPARED)
    return found[::step][:_COMPARED]


def _are_of(client: Client, records: Sequence[dict[str, Any]], model: str, truncation: Truncation) -> bool:
    """Return whether a model gives the texts of records nearly the vectors that the records have: cosine >= 0.999.

    False also if a vector has length 0, if the vectors of the records have different dimensions, or if the server
    refuses the call: the model is no embedding model, or does not accept their dimensions or a text.

    Raises:
        EmberpcError: the call failed for another reason, such as a server that does not answer.
    """
    try:
        theirs = np.stack([np.asarray(record["vector"], dtype=np.float64) for record in records])
        texts = [record["text"] for record in records]
        found = client.embed(texts, model=model, dimensions=theirs.shape[1], truncation=truncation)
    except (InvalidArgument, FailedPrecondition, InputError, InputTypeError, ValueError, IndexError):
        return False  # dimensions or a text that the model does not accept
    ours = found.astype(np.float64)
    lengths = np.linalg.norm(theirs, axis=1) * np.linalg.norm(ours, axis=1)
    return bool(((theirs * ours).sum(axis=1) >= _MIN_COSINE * lengths).all() and (lengths > 0).all())
