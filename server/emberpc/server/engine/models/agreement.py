"""Measure how well the vectors or labels of a model in a lower precision agree with those of fp32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from emberpc.bundle import Task, best_labels
from emberpc.bundle.agreement import neighbour_agreement
from emberpc.bundle.contents import Contents
from emberpc.server.engine.choices import Choices
from emberpc.server.engine.models.encoders import Encoder
from emberpc.server.engine.models.model import Model
from emberpc.server.engine.sessions.runtime import Runtime
from emberpc.server.engine.sessions.session import Output, SessionError
from emberpc.server.engine.tokenizing import Truncation
from emberpc.server.errors import items_of

#: 1,200 sentences and paragraphs of the documents and docstrings of emberpc, one on each line.
_TEXTS = Path(__file__).parent / "agreement_texts.txt"
#: Maximum number of tokens of a batch, padding included. A longer text is run alone.
_BATCH_TOKENS = 512


class MeasurementStoppedError(Exception):
    """A measurement was stopped."""


def agreement_texts() -> list[str]:
    """Return the texts on which precisions are compared."""
    return _TEXTS.read_text(encoding="utf-8").splitlines()


def encoder_of(model: Model, runtime: Runtime, contents: Contents) -> Encoder:
    """Load the ONNX file of a served model once more, for runs on the calling thread.

    Args:
        model: the served model.
        runtime: the engine and precision to load the file with.
        contents: reads and hashes the file.

    Raises:
        SessionError: the engine cannot load the file, or the file changed since the model was loaded.
        BundleError: the file cannot be read, or `contents` stopped hashing.
    """
    served = model.encoder
    if contents.sha256(served.path) != served.sha256:
        raise SessionError(f"{served.path} changed since the model was loaded; reload the model")
    session = runtime.open(served.path, contents)
    return Encoder(session, served.interface, served.pad_token_id, served.sha256, max_tokens=served.max_tokens)


def agreement(
    model: Model, choices: Choices, runtime: Runtime, expected: Encoder, got: Encoder, stop: Callable[[], bool]
) -> float:
    """Return the agreement of a model in a precision with fp32, in [0, 1]; measure and store it if it is unknown.

    For vectors, the agreement is the mean share of the ten nearest neighbours that are the same. For the logits of a
    classifier, it is the share of texts with the same best label.

    Args:
        model: the model.
        choices: where the agreement is stored.
        runtime: engine and precision of `got`.
        expected: the model's encoder in fp32.
        got: the model's encoder in the precision.
        stop: returns whether to stop; called before each batch.

    Raises:
        MeasurementStoppedError: `stop` returned True.
        Exception: the tokenizer or an encoder failed.
    """
    key = (expected.sha256, runtime.engine, runtime.precision)
    known = choices.agreement(*key)
    if known is not None:
        return known
    texts = agreement_texts()
    both = [outputs(model, encoder, texts, stop) for encoder in (expected, got)]
    if model.head is None and model.manifest.task is Task.CLASSIFICATION:
        found = float((best_labels(both[0]) == best_labels(both[1])).mean())
    else:
        found = neighbour_agreement(both[0], both[1])
    choices.keep_agreement(*key, found)
    return found


def outputs(model: Model, encoder: Encoder, texts: list[str], stop: Callable[[], bool]) -> Output:
    """Return the outputs of an encoder of a model for some texts, float32 (texts, width).

    The texts are run in order of their lengths, in batches of at most 512 tokens. For the errors, see `agreement`.
    """
    tokens = [text.ids for text in model.tokenizer.tokenize(texts, "", Truncation.END, items_of("texts"))]
    waiting = sorted(range(len(texts)), key=lambda row: len(tokens[row]))
    found: dict[int, Output] = {}
    while waiting:
        if stop():
            raise MeasurementStoppedError
        longest = len(tokens[waiting[-1]])
        rows = [waiting.pop() for _ in range(min(len(waiting), max(1, _BATCH_TOKENS // longest)))]
        found |= zip(rows, encoder.run([tokens[row] for row in rows]), strict=True)
    return np.stack([found[row] for row in range(len(texts))])
