"""Run texts through a classifier."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from emberpc.bundle import LabelDecisions, Task
from emberpc.server.engine import Caller, Engine, Inference, InferenceRequest, Model, Truncation
from emberpc.server.errors import Code, ServiceError, invalid, items_of
from emberpc.server.pipelines.limits import Limits

#: Maximum number of bytes in the response beside the characters of the labels: of a label with its score, of a label
#: that is given, and of the rest of the result for one text.
_SCORE_BYTES, _LABEL_BYTES, _TEXT_BYTES = 13, 4, 30
#: Maximum number of products of a call's texts and the numbers of a rejection score's vectors that are computed on the
#: event loop. More would hold up other calls for over about 10 ms, so a thread computes them.
_LOOP_PRODUCTS = 2**26


@dataclass(frozen=True)
class ClassificationRequest:
    """Texts to classify.

    Attributes:
        classifier: name of the model; empty: the only classifier.
        texts: the texts.
        top_k: maximum number of labels with scores that the response will have for each text; 0: all.
        nearest_examples: number of training examples to return for each text. It must be 0: classifiers keep none.
        truncation: the truncation of long texts.
    """

    classifier: str
    texts: Sequence[str]
    top_k: int
    nearest_examples: int
    truncation: Truncation


class ClassifiedTexts(NamedTuple):
    """The result of a classification.

    Attributes:
        model: the classifier.
        inference: the logits, float32 (texts, labels), with token counts and times.
        decisions: the decisions on all labels of the classifier for each text, whatever `top_k` the request has: the
            caller selects the labels to return.
    """

    model: Model
    inference: Inference
    decisions: LabelDecisions


class TextClassifier:
    """Runs texts through fine-tuned classifiers.

    Args:
        engine: the models.
        limits: limits of a call.
    """

    def __init__(self, engine: Engine, limits: Limits) -> None:
        self._engine = engine
        self._limits = limits

    async def classify(self, request: ClassificationRequest, caller: Caller) -> ClassifiedTexts:
        """Classify texts: return their logits, and the decisions on all labels of the classifier.

        `top_k` does not shorten the result; it is used to estimate whether the response would be too large.

        Raises:
            ServiceError: NOT_FOUND if the classifier is not served; INVALID_ARGUMENT for no texts, too many texts, a
                text that is empty or too long, or a negative `top_k`, or if no classifier is named and several are
                served; FAILED_PRECONDITION if the model is no classifier, none is served, or examples are requested;
                RESOURCE_EXHAUSTED if the response would be too large or the queue is full; any other error of
                `Inferrer.infer`.
        """
        model = self._engine.model(request.classifier, Task.CLASSIFICATION, "classifier")
        texts = request.texts
        self._limits.check_count(len(texts), "texts", "text")
        self._limits.check_texts(texts, items_of("texts"))
        if request.top_k < 0:
            raise invalid("top_k", f"is {request.top_k}; it must be 0 (for all labels) or more")
        if request.nearest_examples:
            raise ServiceError(
                Code.FAILED_PRECONDITION,
                f"classifier {model.name!r} is a fine-tuned model and keeps no examples; leave nearest_examples unset",
                reason="NO_EXAMPLES",
            )
        manifest = model.manifest
        of_text = max_bytes_of_text(manifest.labels, request.top_k, multi_label=manifest.multi_label)
        self._limits.check_response(len(texts) * of_text, "set top_k, or send fewer texts in one call")
        inference = await self._engine.inferrer.infer(
            InferenceRequest(model, texts, manifest.prompts.passage, request.truncation, items_of("texts"), caller)
        )
        decide = partial(manifest.decision_rule.decide, inference.output, inference.encoded, model.scope_vectors)
        stored = 0 if model.scope_vectors is None else model.scope_vectors.vectors.size
        many = len(texts) * stored > _LOOP_PRODUCTS
        return ClassifiedTexts(model, inference, await asyncio.to_thread(decide) if many else decide())


def max_bytes_of_text(labels: Sequence[str], top_k: int, *, multi_label: bool) -> int:
    """Return the maximum number of bytes of a text's result in the response; `top_k` 0: scores of all labels."""
    longest = max(len(label.encode()) for label in labels)
    scores, given = min(top_k or len(labels), len(labels)), len(labels) if multi_label else 1
    return scores * (longest + _SCORE_BYTES) + given * (longest + _LABEL_BYTES) + _TEXT_BYTES
