"""Results of the clients' methods for classification: frozen dataclasses of plain Python values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from emberpc.client.details import ModelVersion


@dataclass(frozen=True)
class LabelScore:
    """A label, and as `score` its probability in [0, 1]; those of a single-label classifier add up to 1."""

    label: str
    score: float


@dataclass(frozen=True)
class Classification:
    """The result of classifying one text."""

    #: Single-label classifier: the most probable label. Multi-label classifier: each label whose probability is at
    #: least its threshold, the most probable first, not limited by `top_k`; perhaps none. Empty if `rejected`.
    labels: tuple[str, ...]
    #: Labels with their probabilities, the most probable first: at most `top_k`, all if that is 0; also if `rejected`.
    scores: tuple[LabelScore, ...]
    #: Whether the text seems to have none of the labels; see `Classifier.rejection_threshold`.
    rejected: bool
    #: Number of tokens that the model read, special tokens and prompt included.
    tokens: int
    #: Whether the text was truncated.
    truncated: bool
    #: Score that decides whether the text is rejected, of the kind `Classifier.rejection_score`; higher means that the
    #: text is more likely to have a label. None: the classifier rejects no text, or the server is older than the score.
    rejection_score: float | None = None

    @property
    def label(self) -> str | None:
        """The predicted label, or the most probable of several predicted labels; None if no label was predicted."""
        return self.labels[0] if self.labels else None


@dataclass(frozen=True)
class ClassifierLabel:
    """A label of a classifier, and its description."""

    name: str
    #: Description in words of the texts that have the label; empty for a fine-tuned classifier.
    description: str


@dataclass(frozen=True)
class Classifier:
    """A classifier that a server serves, with the values that decide which labels a text gets."""

    name: str
    #: `fine_tuned`: a model that was made offline, by an export or another tool. `examples`: made by the server from
    #: records of a collection; planned, no server has such classifiers yet.
    kind: str
    #: Version of the fine-tuned model itself, or of the embedding model of a classifier made from examples.
    model: ModelVersion
    #: Labels of the classifier, in the order of its logits.
    labels: tuple[ClassifierLabel, ...]
    #: True: a text gets any number of labels. False: a text gets one label, or none if it is rejected.
    multi_label: bool
    #: Thresholds of a multi-label classifier, in the order of `labels`: a text that is not rejected gets each label
    #: whose probability is at least its threshold. Empty for a single-label classifier.
    thresholds: tuple[float, ...]
    #: Number that the logits are divided by before they become probabilities.
    temperature: float
    #: A text whose `Classification.rejection_score` is below this threshold is rejected. None: no text is rejected.
    rejection_threshold: float | None
    #: Fine-tuned classifier: name of the model that it was made from, and strategy of the export. Each is empty if it
    #: is not known, as the strategy of a foreign folder.
    base_model: str
    fine_tuning_strategy: str
    #: Maximum number of tokens of a text that the model reads, special tokens and prompt included.
    max_tokens: int
    #: Classifier made from examples: name of its collection, strategy, and number of examples. Empty and 0 for a
    #: fine-tuned classifier.
    collection: str
    strategy: str
    example_count: int
    #: Time (UTC) of the export, or of the last fit of a classifier made from examples; None: unknown.
    fit_time: datetime | None
    #: Figures by name: quality on held-out or cross-validated texts, such as `accuracy` and `ece`, and facts of the
    #: training, such as `train_texts`. May be empty.
    quality: Mapping[str, float]
    #: Score that decides which texts are rejected: `max_logit`, `energy`, `class_cosine` or `nearest_prototype`, as the
    #: enum RejectionScore of classification.proto defines them. None: no text is rejected, or the server is older than
    #: this field (its score is `max_logit`).
    rejection_score: str | None = None
