"""What a classifier costs to serve: measured on the ONNX file that it becomes."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter

import numpy as np

from emberpc.export.comparing.bases import Base, export_fitted
from emberpc.export.linear import Matrix
from emberpc.export.strategies import Fitted

#: Texts that are timed one by one; the median is taken.
_TEXTS = 100


@dataclass(frozen=True)
class ServingCost:
    """What one text costs, alone, from text to logits, and what has to be kept.

    `agreement` is the share of texts for which the ONNX file gives the same
    best label as the strategy did in the comparison.
    """

    base: str
    strategy: str
    #: Texts that the strategy was fitted to.
    texts: int
    milliseconds: float
    size_bytes: int
    agreement: float


class ServingCosts:
    """Measures the serving costs of a base's strategies, each once.

    Args:
        path: the file where they are kept.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            costs = [ServingCost(**item) for item in json.loads(path.read_text(encoding="utf-8"))]
        except (OSError, ValueError, TypeError):
            costs = []
        #: By base and strategy.
        self.known = {(cost.base, cost.strategy): cost for cost in costs}

    def measure(self, base: Base, strategy: str, fitted: Fitted, trained_on: int, texts: Sequence[str]) -> None:
        """Measure a strategy unless that was done; one that keeps its texts, again with more of them.

        Args:
            base: the base.
            strategy: name of the strategy.
            fitted: what it made.
            trained_on: texts that it was fitted to.
            texts: what to measure on.
        """
        encoder = base.encoder
        known = self.known.get((encoder.name, strategy))
        if known is not None and (fitted.head is not None or known.texts >= trained_on):
            return
        sample = list(texts[:_TEXTS])
        prompted = [encoder.prompts.passage + text for text in sample]
        expected = fitted.classify(sample)
        with tempfile.TemporaryDirectory() as folder:
            runner, size = export_fitted(base, fitted, Path(folder))
            output = "sentence_embedding" if fitted.head is None else "logits"
            took = _median_seconds(lambda i: runner.run(prompted[i : i + 1], output), len(sample))
            got = expected if fitted.head is None else runner.run(prompted, output)
        if fitted.head is None:
            # The vectors are kept, and each text's is compared with them.
            took += _median_seconds(lambda i: fitted.classify(sample[i : i + 1]), len(sample))
            size += trained_on * base.converted.dimensions * np.dtype(np.float32).itemsize
        agreement = float((got.argmax(axis=1) == expected.argmax(axis=1)).mean())
        cost = ServingCost(encoder.name, strategy, trained_on, 1000 * took, size, agreement)
        self.known[encoder.name, strategy] = cost
        self._path.write_text(json.dumps([asdict(cost) for cost in self.known.values()], indent=2), encoding="utf-8")


def _median_seconds(run: Callable[[int], Matrix], count: int) -> float:
    """Return the median time of runs, each with its number."""
    run(0)
    taken = []
    for number in range(count):
        start = perf_counter()
        run(number)
        taken.append(perf_counter() - start)
    return float(np.median(taken))
