"""ClassificationService: classify texts, and describe the classifiers."""

from __future__ import annotations

from contextlib import suppress
from datetime import datetime

from emberpc.bundle import LabelDecisions, Manifest, RejectionScore, Task
from emberpc.server.engine import Engine, Model
from emberpc.server.paging import decode_token
from emberpc.server.pipelines.classification import ClassificationRequest, TextClassifier
from emberpc.server.pipelines.limits import Limits
from emberpc.server.services import requests, responses
from emberpc.v1 import classification_pb2 as pb
from emberpc.v1 import classification_pb2_grpc

#: Bytes of a response that are reserved for the rest beside its classifiers. Most of them are for the page token, which
#: encodes a name of at most 128 characters.
_RESERVED_BYTES = 1024


_REJECTION_SCORES = {
    RejectionScore.MAX_LOGIT: pb.REJECTION_SCORE_MAX_LOGIT,
    RejectionScore.ENERGY: pb.REJECTION_SCORE_ENERGY,
    RejectionScore.CLASS_COSINE: pb.REJECTION_SCORE_CLASS_COSINE,
    RejectionScore.NEAREST_PROTOTYPE: pb.REJECTION_SCORE_NEAREST_PROTOTYPE,
}


class ClassificationService(classification_pb2_grpc.ClassificationServiceServicer):
    """Implements the ClassificationService of classification.proto for fine-tuned classifiers.

    The methods for classifiers made from examples are not implemented: their calls fail with UNIMPLEMENTED.

    Args:
        engine: the models.
        limits: limits of a call.
    """

    def __init__(self, engine: Engine, limits: Limits) -> None:
        self._engine = engine
        self._limits = limits
        self._classifier = TextClassifier(engine, limits)

    async def Classify(self, request: pb.ClassifyRequest, context: requests.Context) -> pb.ClassifyResponse:
        """Classify the texts of a request, and return labels, probabilities and token usage of each text.

        Errors are those of `TextClassifier.classify`; INVALID_ARGUMENT, too, for an unknown truncation or priority.
        """
        classification_request = ClassificationRequest(
            request.classifier,
            request.texts,
            request.top_k,
            request.nearest_examples,
            requests.truncation(request.truncation),
        )
        caller = requests.caller(context, request.priority)
        model, inference, decisions = await self._classifier.classify(classification_request, caller)
        response = pb.ClassifyResponse(model=responses.model_version(model), timings=responses.timings([inference]))
        for row, usage in enumerate(responses.usages(inference)):
            classification = classify_row(decisions, row, model.manifest, request.top_k)
            classification.usage.CopyFrom(usage)
            response.classifications.append(classification)
        return response

    async def ListClassifiers(
        self, request: pb.ListClassifiersRequest, context: requests.Context
    ) -> pb.ListClassifiersResponse:
        """Return a page of the served classifiers, sorted by name. A page of more than 1 MiB is shortened.

        Raises:
            ServiceError: INVALID_ARGUMENT for a wrong page size or page token; RESOURCE_EXHAUSTED if the first
                classifier of the page is too large for a response (`_check_size`).
        """
        size = requests.page_size(request.page_size)
        after = decode_token(request.page_token)
        models = [model for model in self._engine.models() if model.manifest.task is Task.CLASSIFICATION]
        max_bytes = min(responses.MAX_PAGE_BYTES, self._limits.max_response_bytes - _RESERVED_BYTES)
        page, token = responses.model_page(models, after, size, max_bytes, describe)
        for description in page[:1]:  # only the first classifier of a page may have more than `max_bytes`
            self._check_size(description)
        return pb.ListClassifiersResponse(classifiers=page, next_page_token=token)

    async def GetClassifier(
        self, request: pb.GetClassifierRequest, context: requests.Context
    ) -> pb.GetClassifierResponse:
        """Return the classifier `request.name`; empty: the only classifier. Errors are those of `Engine.model`.

        RESOURCE_EXHAUSTED, too, if the classifier is too large for a response (`_check_size`).
        """
        description = describe(self._engine.model(request.name, Task.CLASSIFICATION, "name"))
        self._check_size(description)
        return pb.GetClassifierResponse(classifier=description)

    def _check_size(self, description: pb.Classifier) -> None:
        """Raise RESOURCE_EXHAUSTED if a classifier and `_RESERVED_BYTES` together exceed `max_response_bytes`."""
        self._limits.check_response(
            description.ByteSize() + _RESERVED_BYTES,
            f"the labels of {description.name!r} are too long; start the server with a higher --max-response-bytes",
        )


def classify_row(decisions: LabelDecisions, row: int, manifest: Manifest, top_k: int) -> pb.Classification:
    """Return the message with the result for one text; `usage` stays unset.

    Args:
        decisions: the decisions on all texts of the call.
        row: index of the text.
        manifest: the manifest of the classifier.
        top_k: maximum number of items of the field `scores`; 0: all labels. The field `labels` is not limited.
    """
    scores, ranking, given = decisions.probabilities[row], decisions.ranking[row], decisions.labels[row]
    return pb.Classification(
        scores=[pb.LabelScore(label=manifest.labels[i], score=float(scores[i])) for i in ranking[: top_k or None]],
        labels=[manifest.labels[i] for i in ranking if given[i]],
        rejected=bool(decisions.rejected[row]),
        rejection_score=None if decisions.rejection_scores is None else float(decisions.rejection_scores[row]),
    )


def describe(model: Model) -> pb.Classifier:
    """Return the message `Classifier` that describes a fine-tuned classifier.

    `fit_time` stays unset if the manifest has no valid ISO time.
    """
    manifest = model.manifest
    rule = manifest.decision_rule
    description = pb.Classifier(
        name=model.name,
        kind=pb.CLASSIFIER_KIND_FINE_TUNED,
        model=responses.model_version(model),
        labels=[pb.Label(name=label) for label in manifest.labels],
        multi_label=rule.multi_label,
        thresholds=rule.label_thresholds(len(manifest.labels)),
        temperature=rule.temperature,
        rejects=rule.rejection_threshold is not None,
        rejection_threshold=rule.rejection_threshold or 0.0,
        quality=manifest.quality,
        base_model=manifest.base_model,
        fine_tuning_strategy=manifest.strategy,
        max_tokens=manifest.max_tokens,
    )
    if rule.rejection_threshold is not None:
        description.rejection_score = _REJECTION_SCORES[rule.rejection_score]
    # The manifest states the time as text. A bundle that another tool wrote may have a text that is no ISO time.
    with suppress(ValueError, OverflowError):
        description.fit_time.FromDatetime(datetime.fromisoformat(manifest.created))
    return description
