"""Measure the serving cost of a classifier on the ONNX file that would be served."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np

from emberpc.bundle import best_labels
from emberpc.export.classify.linear import Matrix
from emberpc.export.classify.strategies import STRATEGIES, Fitted
from emberpc.export.compare.base_encoders import Base, export_fitted
from emberpc.export.files import write_text
from emberpc.export.progress import Progress

#: Number of texts on which the labels of the ONNX file and of the strategy are compared.
_TEXTS = 100
#: Number of texts that are timed one by one in each round.
_TIMED = 24
#: Number of rounds; the median over the rounds counts.
_ROUNDS = 7
#: Time of one text alone, as a multiple of its time in a batch. This is approximate and serves estimates only.
_ALONE_FACTOR = 2.0


@dataclass(frozen=True)
class ServingCost:
    """Time to classify one text alone, from text to logits, and the bytes that serving needs, for a strategy on a base.

    `size_bytes` counts the ONNX file with its weights, the tokenizer's files, and the vectors that the strategy stores.
    `agreement` is the share of texts, in [0, 1], for which the ONNX file and the strategy in the comparison give the
    same best label.
    """

    base: str
    strategy: str
    #: Number of texts that the strategy was fitted to.
    texts: int
    #: Time to classify one text as a multiple of the time in which the base's encoder alone embeds it. The two are run
    #: alternately.
    times_encoder: float
    #: Milliseconds in which the base's encoder embeds one text. This is measured once for each base and used for all
    #: strategies on the base, so that strategies differ by their own work only.
    encoder_milliseconds: float
    size_bytes: int
    agreement: float

    @property
    def milliseconds(self) -> float:
        """Milliseconds of wall time to classify one text alone."""
        return self.times_encoder * self.encoder_milliseconds


class ServingCosts:
    """Measures the serving cost of each strategy on each base once, and stores it in a file.

    Args:
        path: JSON file with the costs, which is read now. A file that is missing or cannot be read counts as empty.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            costs = [ServingCost(**item) for item in json.loads(path.read_text(encoding="utf-8"))]
        except (OSError, ValueError, TypeError):
            costs = []
        #: Costs measured so far, by the names of base and strategy.
        self.known = {(cost.base, cost.strategy): cost for cost in costs}

    def estimate(self, base: Base, strategy: str, trained_on: int, per_text: float) -> float:
        """Return an estimate of the seconds that `measure` will take for a strategy; 0 if its cost is known already.

        Args:
            base: the base.
            strategy: name of the strategy.
            trained_on: number of texts that the strategy is fitted to.
            per_text: seconds that embedding one text in a batch takes.
        """
        if self._is_measured(base, strategy, trained_on):
            return 0.0
        converting = base.seconds if STRATEGIES[strategy].tunes else 0.0
        return converting + (2 * _ALONE_FACTOR * _ROUNDS * _TIMED + 2 * _TEXTS) * per_text

    def measure(
        self,
        base: Base,
        strategy: str,
        fitted: Fitted,
        trained_on: int,
        texts: Sequence[str],
        progress: Progress,
    ) -> None:
        """Measure the serving cost of a strategy on a base, and store it in the file, unless it is known already.

        A strategy that stores its texts, such as `nearest`, is measured again if it was fitted to more texts than when
        it was measured before.

        Args:
            base: the base.
            strategy: name of the strategy.
            fitted: the fitted classifier.
            trained_on: number of texts that the classifier was fitted to.
            texts: at least one text to measure on; the first 100 are used, and the first 24 are timed.
            progress: called before each round; an exception that it raises ends the measurement.

        Raises:
            ExportError: the classifier cannot be converted to ONNX.
            OSError: the file of the costs cannot be written.
        """
        if self._is_measured(base, strategy, trained_on):
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
                embed(i)  # `classify` has the text's vector already and only compares it with each stored vector
                return fitted.classify(sample[i : i + 1])

            reference, times = _time_alternately(embed, serve, timed, progress)
            got = expected if fitted.head is None else runner.run(prompted, "logits")
        if fitted.head is None:
            size += trained_on * base.converted.dimensions * np.dtype(np.float32).itemsize
        agreement = float((best_labels(got) == best_labels(expected)).mean())
        before = [cost.encoder_milliseconds for cost in self.known.values() if cost.base == encoder.name]
        alone = before[0] if before else 1000 * reference
        cost = ServingCost(encoder.name, strategy, trained_on, times, alone, size, agreement)
        self.known[encoder.name, strategy] = cost
        write_text(self._path, json.dumps([asdict(cost) for cost in self.known.values()], indent=2))

    def _is_measured(self, base: Base, strategy: str, trained_on: int) -> bool:
        known = self.known.get((base.encoder.name, strategy))
        return known is not None and (STRATEGIES[strategy].exportable or known.texts >= trained_on)


def _time_alternately(
    reference: Callable[[int], Matrix], own: Callable[[int], Matrix], count: int, progress: Progress
) -> tuple[float, float]:
    """Time two functions alternately, text by text, so that other load on the host slows both.

    Args:
        reference: runs on the text of an index.
        own: the function to compare with `reference`; also runs on the text of an index.
        count: number of texts; the indexes are 0 to `count` - 1.
        progress: called before each round.

    Returns:
        Two medians over the rounds: the wall seconds of `reference` for one text, and the ratio of the time of `own` to
        that of `reference`.
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
