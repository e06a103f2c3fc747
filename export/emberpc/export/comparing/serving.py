"""What a classifier costs to serve: measured on the ONNX file that it becomes."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np

from emberpc.export.comparing.bases import Base, export_fitted
from emberpc.export.files import write_text
from emberpc.export.linear import Matrix
from emberpc.export.progress import Progress
from emberpc.export.strategies import STRATEGIES, Fitted

#: Texts that agreement is measured on, and those that are timed one by one, in so many rounds.
_TEXTS = 100
_TIMED = 24
_ROUNDS = 7
#: A text alone takes about so many times what it does in a batch.
_ALONE = 2.0


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
    #: What a text takes as a multiple of what the base's encoder alone takes, run in turns with it.
    times_encoder: float
    #: What the base's encoder takes: measured once for all strategies, so that these differ by their own work alone.
    encoder_milliseconds: float
    size_bytes: int
    agreement: float

    @property
    def milliseconds(self) -> float:
        """What a text takes."""
        return self.times_encoder * self.encoder_milliseconds


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

    def estimate(self, base: Base, strategy: str, trained_on: int, per_text: float) -> float:
        """Return the seconds that measuring a strategy will take; `per_text` is what embedding one in a batch takes."""
        if self._is_known(base, strategy, trained_on):
            return 0.0
        converting = base.seconds if STRATEGIES[strategy].tunes else 0.0
        return converting + (2 * _ALONE * _ROUNDS * _TIMED + 2 * _TEXTS) * per_text

    def measure(
        self,
        base: Base,
        strategy: str,
        fitted: Fitted,
        trained_on: int,
        texts: Sequence[str],
        progress: Progress,
    ) -> None:
        """Measure a strategy unless that was done; one that keeps its texts, again with more of them.

        Args:
            base: the base.
            strategy: name of the strategy.
            fitted: what it made.
            trained_on: texts that it was fitted to.
            texts: what to measure on.
            progress: told how far it is; what it raises ends the measuring.
        """
        if self._is_known(base, strategy, trained_on):
            return
        encoder = base.encoder
        sample = list(texts[:_TEXTS])
        prompted = [encoder.prompts.passage + text for text in sample]
        expected = fitted.classify(sample)
        timed = min(_TIMED, len(sample))
        with tempfile.TemporaryDirectory() as folder:
            runner, size = export_fitted(base, fitted, Path(folder), progress)

            def embed(i: int) -> Matrix:
                return base.runner.run(prompted[i : i + 1], "sentence_embedding")

            def serve(i: int) -> Matrix:
                if fitted.head is not None:
                    return runner.run(prompted[i : i + 1], "logits")
                embed(i)  # of which `classify` has the vectors at hand, and compares them with each that is kept
                return fitted.classify(sample[i : i + 1])

            reference, times = _in_turns(embed, serve, timed, progress)
            got = expected if fitted.head is None else runner.run(prompted, "logits")
        if fitted.head is None:
            size += trained_on * base.converted.dimensions * np.dtype(np.float32).itemsize
        agreement = float((got.argmax(axis=1) == expected.argmax(axis=1)).mean())
        before = [cost.encoder_milliseconds for cost in self.known.values() if cost.base == encoder.name]
        alone = before[0] if before else 1000 * reference
        cost = ServingCost(encoder.name, strategy, trained_on, times, alone, size, agreement)
        self.known[encoder.name, strategy] = cost
        write_text(self._path, json.dumps([asdict(cost) for cost in self.known.values()], indent=2))

    def _is_known(self, base: Base, strategy: str, trained_on: int) -> bool:
        known = self.known.get((base.encoder.name, strategy))
        return known is not None and (STRATEGIES[strategy].exportable or known.texts >= trained_on)


def _in_turns(
    reference: Callable[[int], Matrix], own: Callable[[int], Matrix], count: int, progress: Progress
) -> tuple[float, float]:
    """Run two things in turns, text by text, so that whatever else the host does slows both.

    Returns:
        The seconds of the reference for a text, and the other's as a multiple of them: the medians over the rounds.
    """
    reference(0), own(0)
    seconds: list[float] = []
    ratios: list[float] = []
    for done in range(_ROUNDS):
        progress("timing", done, _ROUNDS)
        taken = [(_seconds(reference, number), _seconds(own, number)) for number in range(count)]
        first, second = (float(np.sum(column)) for column in zip(*taken, strict=True))
        seconds.append(first / count)
        ratios.append(second / first)
    return median(seconds), median(ratios)


def _seconds(run: Callable[[int], Matrix], number: int) -> float:
    start = perf_counter()
    run(number)
    return perf_counter() - start
