"""Measure the serving cost of a classifier on the ONNX file that would be served."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

from emberpc.bundle import Head, best_labels
from emberpc.export.classify.linear import Matrix
from emberpc.export.classify.strategies import STRATEGIES, Fitted
from emberpc.export.compare.base_encoders import Base, export_head, size_of
from emberpc.export.files import write_text
from emberpc.export.progress import Progress
from emberpc.export.timing import Cost

#: Number of texts on which the labels of the ONNX file and of the strategy are compared.
_TEXTS = 100
#: Number of texts that are timed one by one in each round.
_TIMED = 24
#: Number of rounds; the median over the rounds counts.
_ROUNDS = 7
#: Time of one text alone, as a multiple of its time in a batch. This is approximate and serves estimates only.
_ALONE_FACTOR = 2.0
#: Time of writing and opening an ONNX file with a head, as a multiple of the time of opening the base. This is
#: approximate and serves the first estimate only; the measured time replaces it.
_WRITING_FACTOR = 0.3
_BYTES_PER_FLOAT = 4


@dataclass(frozen=True)
class ServingCost:
    """Time to classify one text alone, from text to logits, and the bytes that serving needs, for a strategy on a base.

    All strategies with a linear head have the same ONNX graph, apart from its weights. So they are timed once for each
    base, with the first of them that is fitted and with the encoder's original weights. `size_bytes` counts the ONNX
    file with its weights, the tokenizer's files, and the vectors that the strategy stores.
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
    #: Share of texts, in [0, 1], for which the ONNX file and the strategy in the comparison give the same best label.
    #: None for a strategy that trains the encoder: its ONNX file is written and compared only when it is exported.
    agreement: float | None

    @property
    def milliseconds(self) -> float:
        """Milliseconds of wall time to classify one text alone."""
        return self.times_encoder * self.encoder_milliseconds

    @property
    def milliseconds_beside(self) -> float:
        """Milliseconds of wall time to classify one text whose vector by the base's encoder is computed anyway."""
        tunes = STRATEGIES[self.strategy].tunes
        return self.milliseconds if tunes else max(0.0, self.milliseconds - self.encoder_milliseconds)


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
        self._alone = {cost.base: cost.encoder_milliseconds for cost in costs}
        #: Wall seconds of writing and opening an ONNX file with a head, by base.
        self._writing: dict[str, float] = {}

    def estimate(self, base: Base, strategy: str, trained_on: int, per_text: float) -> float:
        """Return an estimate of the seconds that `measure` will take for a strategy; 0 if the cost is known.

        Args:
            base: the base.
            strategy: name of the strategy.
            trained_on: number of texts that the strategy is fitted to.
            per_text: seconds that embedding one text in a batch takes.
        """
        if self._is_measured(base, strategy, trained_on):
            return 0.0
        timed = 2 * _ALONE_FACTOR * _ROUNDS * _TIMED
        if not STRATEGIES[strategy].exportable:
            return (timed + _TEXTS) * per_text
        known = self._with_head(base.encoder.name) is not None
        if known and STRATEGIES[strategy].tunes:
            return 0.0
        writing = self._writing.get(base.encoder.name, _WRITING_FACTOR * base.seconds)
        return writing + (timed * (not known) + _TEXTS) * per_text

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
        it was measured before. A strategy that is not served, such as `tf-idf`, is not measured.

        Args:
            base: the base.
            strategy: name of the strategy.
            fitted: the fitted classifier.
            trained_on: number of texts that the classifier was fitted to.
            texts: at least one text to measure on; the first 100 are used, and the first 24 are timed.
            progress: called before each text that is timed; an exception that it raises ends the measurement, and
                nothing is stored.

        Raises:
            OSError: the file of the costs cannot be written.
        """
        if self._is_measured(base, strategy, trained_on):
            return
        name, sample = base.encoder.name, list(texts[:_TEXTS])
        same = self._with_head(name)
        if fitted.head is None:
            times, size, agreement = self._stored_vectors(base, fitted, trained_on, sample, progress)
        elif fitted.tuned is not None and same is not None:
            times, size, agreement = same.times_encoder, same.size_bytes, None
        else:
            times, size, agreement = self._head(base, fitted, fitted.head, same, sample, progress)
        cost = ServingCost(name, strategy, trained_on, times, self._alone[name], size, agreement)
        self.known[name, strategy] = cost
        write_text(self._path, json.dumps([asdict(cost) for cost in self.known.values()], indent=2))

    def _head(
        self, base: Base, fitted: Fitted, head: Head, same: ServingCost | None, texts: list[str], progress: Progress
    ) -> tuple[float, int, float | None]:
        """Return time, bytes and agreement of a strategy with a linear head; time and bytes of `same`, if given."""
        prompted = [base.encoder.prompts.passage + text for text in texts]
        with tempfile.TemporaryDirectory() as folder:
            progress("writing the ONNX file", 0, 1)
            with Cost() as writing:
                runner, size = export_head(base, head, Path(folder))
            self._writing[base.encoder.name] = writing.seconds
            agreement = None
            if fitted.tuned is None:
                got, expected = runner.run(prompted, "logits", progress=progress), fitted.classify(texts)
                agreement = float((best_labels(got) == best_labels(expected)).mean())
            if same is not None:
                return same.times_encoder, same.size_bytes, agreement
            times = self._time(base, prompted, lambda i: runner.run(prompted[i : i + 1], "logits"), progress)
        return times, size, agreement

    def _stored_vectors(
        self, base: Base, fitted: Fitted, trained_on: int, texts: list[str], progress: Progress
    ) -> tuple[float, int, float | None]:
        """Return time, bytes and agreement of a strategy that compares a text with stored vectors.

        The base's own ONNX file serves it, so the agreement is 1.
        """
        prompted = [base.encoder.prompts.passage + text for text in texts]
        fitted.classify(texts)  # computes the vectors of the texts

        def serve(i: int) -> Matrix:
            base.runner.run(prompted[i : i + 1], "sentence_embedding")
            return fitted.classify(texts[i : i + 1])  # the vector is cached, so this only compares

        times = self._time(base, prompted, serve, progress)
        return times, size_of(base.folder) + trained_on * base.converted.dimensions * _BYTES_PER_FLOAT, 1.0

    def _time(self, base: Base, prompted: list[str], serve: Callable[[int], Matrix], progress: Progress) -> float:
        """Return the time of `serve` as a multiple of the encoder's; keep the encoder's time if it is the first."""

        def embed(i: int) -> Matrix:
            return base.runner.run(prompted[i : i + 1], "sentence_embedding")

        seconds, times = _time_alternately(embed, serve, min(_TIMED, len(prompted)), progress)
        self._alone.setdefault(base.encoder.name, 1000 * seconds)
        return times

    def _with_head(self, base: str) -> ServingCost | None:
        """Return the known cost of a strategy with a linear head on a base, or None."""
        return next((c for c in self.known.values() if c.base == base and STRATEGIES[c.strategy].exportable), None)

    def _is_measured(self, base: Base, strategy: str, trained_on: int) -> bool:
        if not STRATEGIES[strategy].served:
            return True
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
        progress: called before each text.

    Returns:
        Two medians over the rounds: the wall seconds of `reference` for one text, and the ratio of the time of `own` to
        that of `reference`.
    """
    reference(0), own(0)
    seconds: list[float] = []
    ratios: list[float] = []
    for done in range(_ROUNDS):
        taken = []
        for number in range(count):
            progress("timing", done * count + number, _ROUNDS * count)
            taken.append((_seconds(reference, number), _seconds(own, number)))
        first, second = (sum(column) for column in zip(*taken, strict=True))
        seconds.append(first / count)
        ratios.append(second / first)
    return median(seconds), median(ratios)


def _seconds(run: Callable[[int], Matrix], number: int) -> float:
    start = perf_counter()
    run(number)
    return perf_counter() - start
