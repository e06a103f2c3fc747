"""ClassificationService: texts to labels."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from emberpc.bundle import Manifest, Task
from emberpc.server.engine import Engine
from emberpc.server.errors import Code, ServiceError, invalid, items_of
from emberpc.server.services import replies, requests
from emberpc.v1 import classification_pb2 as pb
from emberpc.v1 import classification_pb2_grpc

#: The probability from which a multi-label classifier without thresholds of its own gives a label.
_DEFAULT_THRESHOLD = 0.5
#: Bytes of a LabelScore beside the label.
_SCORE_BYTES = 10

Scores = npt.NDArray[np.float32]


class ClassificationService(classification_pb2_grpc.ClassificationServiceServicer):
    """Serves the fine-tuned classifiers of an engine."""

    def __init__(self, engine: Engine, limits: requests.Limits) -> None:
        self._engine = engine
        self._limits = limits

    async def Classify(self, request: pb.ClassifyRequest, context: requests.Context) -> pb.ClassifyResponse:
        """Classify texts."""
        model = self._engine.model(request.classifier, Task.CLASSIFICATION, "classifier")
        self._limits.check_count(len(request.texts), "texts", "text")
        self._limits.check_texts(request.texts, items_of("texts"))
        if request.top_k < 0:
            raise invalid("top_k", f"is {request.top_k}; it must be 0 (for all labels) or more")
        if request.nearest_examples:
            raise ServiceError(
                Code.FAILED_PRECONDITION,
                f"classifier {model.name!r} is a fine-tuned model and keeps no examples; leave nearest_examples unset",
                reason="NO_EXAMPLES",
            )
        manifest = model.manifest
        listed = min(request.top_k or len(manifest.labels), len(manifest.labels))
        longest = max(len(label.encode()) for label in manifest.labels)
        self._limits.check_response(
            len(request.texts) * (listed + len(manifest.labels) * manifest.multi_label) * (longest + _SCORE_BYTES),
            "set top_k, or send fewer texts in one call",
        )
        truncation = requests.truncation(request.truncation)
        inference = await self._engine.infer(
            model,
            request.texts,
            manifest.prompts.passage,
            truncation,
            items_of("texts"),
            requests.caller(context, request.priority),
        )
        response = pb.ClassifyResponse(model=replies.model_version(model), timings=replies.timings([inference]))
        scores = probabilities(inference.output, manifest)
        rejected = outside(inference.output, manifest)
        for row, reject, usage in zip(scores, rejected, replies.usages(inference), strict=True):
            classification = classify_row(row, manifest, request.top_k, rejected=bool(reject))
            classification.usage.CopyFrom(usage)
            response.classifications.append(classification)
        return response


def probabilities(logits: Scores, manifest: Manifest) -> Scores:
    """Turn logits into calibrated probabilities.

    Args:
        logits: float32, shape (texts, labels).
        manifest: says the temperature, and whether the labels exclude each other.

    Returns:
        float32 of the same shape, in [0, 1]; each row adds up to 1 unless multi-label.
    """
    scaled = logits / manifest.temperature
    if manifest.multi_label:
        # tanh does not overflow, whatever the logit.
        return np.asarray(0.5 * (1 + np.tanh(scaled / 2)), dtype=np.float32)
    exponentials = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(axis=1, keepdims=True), dtype=np.float32)


def outside(logits: Scores, manifest: Manifest) -> npt.NDArray[np.bool_]:
    """Say of each text, by its logits (texts, labels), whether it seems to be outside all labels."""
    if manifest.rejection_logit is None:
        return np.zeros(len(logits), dtype=bool)
    return np.asarray(logits.max(axis=1) < manifest.rejection_logit)


def classify_row(scores: Scores, manifest: Manifest, top_k: int, *, rejected: bool) -> pb.Classification:
    """Decide by one text's probabilities, float32 (labels,), and list the best `top_k` of them; 0 lists all."""
    order = np.argsort(-scores, kind="stable")
    listed = order[: top_k or None]
    thresholds = manifest.thresholds or (_DEFAULT_THRESHOLD,) * len(manifest.labels)
    if rejected:
        predicted = []
    elif manifest.multi_label:
        predicted = [manifest.labels[i] for i in order if scores[i] >= thresholds[i]]
    else:
        predicted = [manifest.labels[order[0]]]
    return pb.Classification(
        scores=[pb.LabelScore(label=manifest.labels[i], score=float(scores[i])) for i in listed],
        labels=predicted,
        rejected=rejected,
    )
