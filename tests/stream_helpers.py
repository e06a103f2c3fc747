"""Texts and messages that tests of EmbedStream send, and the responses that they receive."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np

from emberpc.v1 import embedding_pb2 as pb
from emberpc.v1 import errors_pb2, types_pb2
from emberpc.wire import vectors

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def texts_of(count: int) -> list[str]:
    """Return texts of 1 to 20 tokens."""
    return [" ".join(LETTERS[(i + k) % 26] for k in range(1 + i % 20)) for i in range(count)]


def messages(
    items: Iterable[tuple[str, str]], size: int, config: pb.EmbedStreamConfig | None = None
) -> Iterator[pb.EmbedStreamRequest]:
    """Yield a message with the config, and then the items in messages of `size` items."""
    yield pb.EmbedStreamRequest(config=config or pb.EmbedStreamConfig())
    listed = [pb.EmbedStreamItem(id=key, text=text) for key, text in items]
    for first in range(0, len(listed), size):
        yield pb.EmbedStreamRequest(items=listed[first : first + size])


class Answers:
    """The responses of a stream: vectors, usages and failures by id, and the number of answers of each id."""

    def __init__(self, responses: Iterable[pb.EmbedStreamResponse]) -> None:
        self.responses = list(responses)
        self.vectors: dict[str, np.ndarray] = {}
        self.usages: dict[str, types_pb2.TokenUsage] = {}
        self.failures: dict[str, errors_pb2.ErrorStatus] = {}
        self.times: Counter[str] = Counter()
        for response in self.responses:
            matrix = vectors.decode(response.embeddings)
            assert len(matrix) == len(response.ids) == len(response.usages)
            for key, row, usage in zip(response.ids, matrix, response.usages, strict=True):
                self.vectors[key], self.usages[key] = row, usage
            self.failures |= {failure.id: failure.error for failure in response.failures}
            self.times.update([*response.ids, *(failure.id for failure in response.failures)])
