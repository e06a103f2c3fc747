"""ClassificationService: classify texts, and describe the classifiers."""

from __future__ import annotations

from contextlib import suppress
from datetime import datetime

from emberpc.bundle import LabelDecisions, Manifest, Task
from emberpc.server.engine import Engine, Model
from emberpc.server.errors import Code, ServiceError, invalid, items_of
from emberpc.server.paging import decode_token, encode_token
from emberpc.server.services import replies, requests
from emberpc.v1 import classification_pb2 as pb
from emberpc.v1 import classification_pb2_grpc

#: Bytes of a LabelScore beside the label.
_SCORE_BYTES = 10
#: Bytes of a reply beside the only classifier in it, its page token included: a name has at most 128 characters.
_REPLY_BYTES = 1024
#: A page of classifiers ends before this many bytes, or after one classifier: classifiers with many labels would exceed
#: the limit of a message.
_MAX_PAGE_BYTES = 2**20


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
        decisions = manifest.decision_rule.decide(inference.output)
        for row, usage in enumerate(replies.usages(inference)):
            classification = classify_row(decisions, row, manifest, request.top_k)
            classification.usage.CopyFrom(usage)
            response.classifications.append(classification)
        return response

    async def ListClassifiers(
        self, request: pb.ListClassifiersRequest, context: requests.Context
    ) -> pb.ListClassifiersResponse:
        """List the classifiers by name."""
        size = requests.page_size(request.page_size)
        after = decode_token(request.page_token)
        models = [model for model in self._engine.models() if model.manifest.task is Task.CLASSIFICATION]
        rest = [model for model in models if model.name > after]
        response = pb.ListClassifiersResponse()
        size_bytes, most_bytes = 0, min(_MAX_PAGE_BYTES, self._limits.max_response_bytes - _REPLY_BYTES)
        for model in rest[:size]:
            description = describe(model)
            size_bytes += description.ByteSize()
            if response.classifiers and size_bytes > most_bytes:
                break
            self._check_size(description)
            response.classifiers.append(description)
        if response.classifiers and len(response.classifiers) < len(rest):
            response.next_page_token = encode_token(response.classifiers[-1].name)
        return response

    async def GetClassifier(
        self, request: pb.GetClassifierRequest, context: requests.Context
    ) -> pb.GetClassifierResponse:
        """Return one classifier."""
        description = describe(self._engine.model(request.name, Task.CLASSIFICATION, "name"))
        self._check_size(description)
        return pb.GetClassifierResponse(classifier=description)

    def _check_size(self, description: pb.Classifier) -> None:
        """Raise RESOURCE_EXHAUSTED if a reply with this classifier alone would be over the limit."""
        self._limits.check_response(
            description.ByteSize() + _REPLY_BYTES,
            f"the labels of {description.name!r} are too long; start the server with a higher --max-response-bytes",
        )


def classify_row(decisions: LabelDecisions, row: int, manifest: Manifest, top_k: int) -> pb.Classification:
    """Return the result for text `row`, with its best `top_k` labels; 0 returns all."""
    scores, ranking, given = decisions.probabilities[row], decisions.ranking[row], decisions.labels[row]
    return pb.Classification(
        scores=[pb.LabelScore(label=manifest.labels[i], score=float(scores[i])) for i in ranking[: top_k or None]],
        labels=[manifest.labels[i] for i in ranking if given[i]],
        rejected=bool(decisions.rejected[row]),
    )


def describe(model: Model) -> pb.Classifier:
    """Return the description of a fine-tuned classifier, which is in its manifest."""
    manifest = model.manifest
    rule = manifest.decision_rule
    description = pb.Classifier(
        name=model.name,
        kind=pb.CLASSIFIER_KIND_FINE_TUNED,
        model=replies.model_version(model),
        labels=[pb.Label(name=label) for label in manifest.labels],
        multi_label=rule.multi_label,
        thresholds=rule.label_thresholds(len(manifest.labels)),
        temperature=rule.temperature,
        rejects=rule.rejection_logit is not None,
        rejection_threshold=rule.rejection_logit or 0.0,
        quality=manifest.quality,
        base_model=manifest.base_model,
        fine_tuning_strategy=manifest.strategy,
        max_tokens=manifest.max_tokens,
    )
    # The manifest states the time as text, which another tool may have written in another form.
    with suppress(ValueError, OverflowError):
        description.fit_time.FromDatetime(datetime.fromisoformat(manifest.created))
    return description
