"""The lexical baseline: TF-IDF and logistic regression, without the encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from emberpc.export.classify.cached_encoder import CachedEncoder
from emberpc.export.classify.linear import Matrix, balanced_weights
from emberpc.export.classify.strategies.base import Fitted, Options, hold_out
from emberpc.export.data.examples import Examples
from emberpc.export.progress import Progress

#: Inverse strength of regularization. TF-IDF vectors have length 1 and many entries, so a weak regularization is best.
_C = 10.0
#: Maximum number of words and word pairs, the most frequent ones, that are features.
_MAX_FEATURES = 50_000
#: Words and punctuation marks. Words of one letter, such as "I", and "?" and "!" say much in questions and reviews.
_WORDS = r"\w+|[^\w\s]"
#: Logit of a label that no training text has.
_NEVER = -20.0
#: Cross-validation fits 5 times. With more texts times labels than this, one part of the texts is held out instead.
_MAX_CROSS_VALIDATED = 200_000
#: Number of texts whose words are counted between two reports.
_REPORTED_TEXTS = 100


@dataclass(frozen=True)
class TfIdf:
    """Logistic regression on TF-IDF of words and word pairs (Wang and Manning, "Baselines and Bigrams", 2012).

    The strategy is a baseline: what it gains shows how much of the task the words alone decide. It cannot be exported.
    """

    name: str = "tf-idf"
    exportable: bool = False
    tunes: bool = False
    served: bool = False
    uses_encoder: bool = False

    def passes(self, examples: Examples, layers: int, *, quick: bool = False) -> float:
        """Return 0: no encoder is used."""
        return 0.0

    def fit(self, examples: Examples, cached_encoder: CachedEncoder, options: Options) -> Fitted:
        """Return a classifier of word statistics; the encoder is not used.

        The held-out texts are those of the validation file; without one, `examples` are cross-validated, or a part of
        them is held out if the texts times the labels are more than 200,000.
        """

        def classify(known: Examples, texts: Sequence[str]) -> Matrix:
            return _fit(known.described(), options)(texts)

        once = len(examples.texts) * len(examples.labels) > _MAX_CROSS_VALIDATED
        return Fitted(_fit(examples.described(), options), hold_out(classify, examples, options, once=once))


def _reported(texts: Sequence[str], progress: Progress) -> Iterator[str]:
    """Yield texts, and report how many were read, so that a time limit can stop the work."""
    for done, text in enumerate(texts):
        if done % _REPORTED_TEXTS == 0:
            progress("counting words", done, len(texts))
        yield text


def _fit(examples: Examples, options: Options) -> Callable[[Sequence[str]], Matrix]:
    """Return a function that gives the logits of texts, by one binary regression for each label."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    vectorizer = TfidfVectorizer(
        ngram_range=(1, 2), sublinear_tf=True, max_features=_MAX_FEATURES, token_pattern=_WORDS
    )
    try:
        features: Any = vectorizer.fit_transform(_reported(examples.texts, options.progress))
    except ValueError:  # no text has a word
        return lambda texts: np.zeros((len(texts), len(examples.labels)), dtype=np.float32)
    weights = balanced_weights(examples.targets) if options.balanced else None
    models: list[Any] = []
    for label in range(len(examples.labels)):
        options.progress("fitting TF-IDF", label, len(examples.labels))
        own = examples.targets[:, label]
        if own.all() or not own.any():
            models.append(None)
            continue
        model = LogisticRegression(C=_C, solver="liblinear", random_state=options.seed)
        models.append(model.fit(features, own, sample_weight=weights))

    def classify(texts: Sequence[str]) -> Matrix:
        found = vectorizer.transform(_reported(texts, options.progress))
        logits = np.full((len(texts), len(models)), _NEVER, dtype=np.float32)
        for label, model in enumerate(models):
            if model is not None:
                logits[:, label] = model.decision_function(found)
            elif examples.targets[:, label].any():
                logits[:, label] = -_NEVER
        return logits

    return classify
