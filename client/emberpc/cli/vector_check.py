"""Check that a model, usually that of a collection, made the vectors of a file."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from emberpc.cli.errors import CliError, ExitCode
from emberpc.cli.output import note
from emberpc.client import Client, FailedPrecondition, InputError, InputTypeError, InvalidArgument
from emberpc.client.types import Truncation

#: Maximum number of records whose texts are embedded to compare vectors, and number of records at the start of the file
#: that these are chosen from.
_COMPARED, _LOOKED_AT = 8, 256
#: Minimum cosine between the vector of a text in the file and the new vector. It is below 1 since a quantized model
#: gives slightly different vectors in different batches. Another model usually gives far smaller cosines.
_MIN_COSINE = 0.999

Records = Iterator[dict[str, Any]]


def check_vectors(
    client: Client, records: Records, source: str, stated: str, *, model: str, fingerprint: str, truncation: Truncation
) -> Records:
    """Check that a model made the vectors of records, and return an iterator over all the records.

    Vectors are compared only if both fingerprints are known and differ. An older version of emberpc computed other
    fingerprints, so the model may be the same. Then up to 8 texts of the first 256 records are embedded, and the new
    vectors are compared with those of the file. If they are nearly equal, that is noted on stderr.

    Args:
        client: client of the server that has the model.
        records: iterator over the records of the file. Some are read here; the returned iterator has these too.
        source: name of the file, for messages.
        stated: fingerprint (hex) of the model that made the vectors, as the file states it; empty: not stated.
        model: name of the model on the server.
        fingerprint: fingerprint (hex) of the model on the server; empty: there is no model.
        truncation: treatment of texts with too many tokens.

    Raises:
        CliError: another model made the vectors, or they cannot be compared: none of the first 256 records has both a
            text and a vector, or the server refuses the texts. Or an error of `records`.
        EmberpcError: the texts could not be embedded for another reason, such as a server that does not answer.
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
    """Return at most 8 of the records that have a vector and a text that is not blank, at equal distances."""
    found = [
        record
        for record in records
        if isinstance(text := record.get("text"), str) and text.strip() and record.get("vector") is not None
    ]
    step = max(1, len(found) // _COMPARED)
    return found[::step][:_COMPARED]


def _are_of(client: Client, records: Sequence[dict[str, Any]], model: str, truncation: Truncation) -> bool:
    """Return whether a model gives the text of each record nearly the vector of the record: cosine >= 0.999.

    False also if an old or new vector has length 0, if the vectors of the records have different dimensions, or if the
    client or server refuses the call, for example since the model does not have their dimensions or refuses a text.

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
