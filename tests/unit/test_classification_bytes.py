"""The estimate of the bytes of a classification is at least the number of bytes, and not much more."""

from __future__ import annotations

import pytest

from emberpc.server.pipelines.classification import max_bytes_of_text
from emberpc.v1 import classification_pb2, types_pb2


@pytest.mark.server
@pytest.mark.parametrize("length", [1, 20, 127, 128, 16_384])
@pytest.mark.parametrize("top_k", [0, 1, 2, 9])
@pytest.mark.parametrize("multi_label", [False, True])
def test_no_classification_has_more_bytes_than_estimated(length: int, top_k: int, multi_label: bool) -> None:
    labels = [name * length for name in "abc"]
    result = classification_pb2.Classification(
        scores=[classification_pb2.LabelScore(label=label, score=0.3) for label in labels[: top_k or None]],
        labels=labels if multi_label else labels[:1],
        rejected=True,
        usage=types_pb2.TokenUsage(tokens=8192, truncated=True),
        rejection_score=0.5,
    )
    response = classification_pb2.ClassifyResponse(classifications=[result] * 10)
    estimate = 10 * max_bytes_of_text(labels, top_k, multi_label=multi_label)
    assert response.ByteSize() <= estimate <= 2 * response.ByteSize()
