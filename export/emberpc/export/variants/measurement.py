"""Measure a variant on real texts: agreement with fp32, accuracy or nDCG@10, speed and size; check it by a bound."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from time import perf_counter, process_time

from emberpc.bundle import Bound, Manifest, Measured, Reference, Task, best_labels, unit
from emberpc.bundle.agreement import neighbour_agreement
from emberpc.bundle.evaluation import measure
from emberpc.export.convert.onnx_runner import Matrix, OnnxRunner
from emberpc.export.convert.sessions import Feeds
from emberpc.export.data.examples import Targets
from emberpc.export.errors import ExportError
from emberpc.export.retrieval.metrics import DECIDING
from emberpc.export.retrieval.metrics import measure as measure_search
from emberpc.export.retrieval.queries import Queries

#: Number of timing rounds. In each round, fp32 and a variant run one after the other. The figures are medians of the
#: rounds, since other load on the host may disturb some of them.
ROUNDS = 5
#: Maximum number of texts to measure variants on if retrieval is not measured. More would cost time, since fp32 and
#: each candidate run every text.
MAX_TEXTS = 512
#: Minimum number of texts to time, if there are as many. Also the maximum number of texts to measure on if only fp32 is
#: measured: its accuracy needs no more texts, since fp32 has no bound.
TIMED_TEXTS = 64
#: Maximum number of queries to measure retrieval with; more would cost time.
MAX_QUERIES = 256
#: Maximum number of passages in which the answers of the queries are searched for; more would cost time.
MAX_PASSAGES = 1024


@dataclass(frozen=True)
class Trial:
    """Texts to measure variants on, and the fp32 model to compare them with.

    Args:
        folder: the bundle so far, with fp32, tokenizer and reference.
        manifest: the bundle's manifest so far.
        texts: at least 2 texts, without prompt; the passages if there are queries.
        targets: right labels of each text for a classifier, bool (texts, labels); None if the texts have no labels.
        queries: queries of an embedding model with the indexes of their relevant texts; None: retrieval is not
            measured.
        calibration: texts to calibrate `int8-static` with, without prompt; no figure is measured on them.
    """

    folder: Path
    manifest: Manifest
    texts: Sequence[str]
    targets: Targets | None = None
    queries: Queries | None = None
    calibration: Sequence[str] = ()

    def load(self, path: str, engine: str = "") -> tuple[OnnxRunner, float]:
        """Load the ONNX file at `path` in the bundle. Each call loads the file.

        Args:
            path: path of the file in the bundle.
            engine: the engine that runs it; empty: ONNX Runtime.

        Returns:
            The file's runner, with one thread, and the seconds that loading took.

        Raises:
            ExportError: the file cannot be loaded, or the engine is not installed.
        """
        manifest, tokenizer = self.manifest, self.folder / "tokenizer.json"
        start = perf_counter()
        runner = OnnxRunner(
            self.folder / path, tokenizer, manifest.max_tokens, manifest.pad_token_id, threads=1, engine=engine
        )
        return runner, perf_counter() - start

    @property
    def output(self) -> str:
        """Name of the output to compare: `logits` of a classifier, else `sentence_embedding`."""
        return "logits" if self.manifest.task is Task.CLASSIFICATION else "sentence_embedding"

    @property
    def fp32_path(self) -> str:
        """Path of fp32's ONNX file, relative to `folder`."""
        return self.manifest.variant().path

    @cached_property
    def reference(self) -> Reference:
        """The bundle's reference texts with their outputs by PyTorch; read at the first access only."""
        return Reference.read(self.folder)

    @cached_property
    def _loaded_fp32(self) -> tuple[OnnxRunner, float]:
        return self.load(self.fp32_path)

    @property
    def fp32(self) -> OnnxRunner:
        """Runner of the fp32 ONNX file, with one thread; loaded at the first access, with ExportError if that fails."""
        return self._loaded_fp32[0]

    @cached_property
    def prompted(self) -> list[str]:
        """The texts, each with the passage prompt before it, as a server runs them."""
        return [self.manifest.prompts.passage + text for text in self.texts]

    @property
    def timed(self) -> list[str]:
        """The texts to time, with prompts: 64 to 127 of the texts at equal distances, or all if there are fewer."""
        return self.prompted[:: max(1, len(self.prompted) // TIMED_TEXTS)]

    @cached_property
    def singles(self) -> list[Feeds]:
        """Inputs of the graph for the texts to time, each a batch of one text; also used to find outlier columns."""
        return self._each(self.timed)

    @cached_property
    def calibrating(self) -> list[Feeds]:
        """Inputs of the graph for the texts of `calibration`, with the passage prompt, each a batch of one text."""
        return self._each([self.manifest.prompts.passage + text for text in self.calibration])

    def _each(self, texts: Sequence[str]) -> list[Feeds]:
        return [batch for text in texts for batch in self.fp32.prepare([text])]

    @cached_property
    def expected(self) -> Matrix:
        """Outputs of fp32 for the texts, float32 (texts, dimensions or labels); computed at the first access only."""
        return self.fp32.run(self.prompted, self.output)

    @cached_property
    def fp32_accuracy(self) -> float | None:
        """Share of the texts to which fp32 gives exactly the right labels, in [0, 1]; None without `targets`."""
        return self._accuracy(self.expected)

    @cached_property
    def fp32_ndcg(self) -> float | None:
        """Mean nDCG@10 of fp32 over the queries, in [0, 1]; None without queries."""
        return self._ndcg(self.fp32, self.expected)

    def measure(self, path: str, bound: Bound | None = None, engine: str = "") -> tuple[Measured, list[str]]:
        """Measure one of the bundle's ONNX files, which may be fp32, and check it against a bound.

        Args:
            path: path of the file in the bundle.
            bound: the bound; None: nothing is checked.
            engine: the engine that runs the file; empty: ONNX Runtime, which also runs fp32.

        Returns:
            The figures, and a message for each figure of the bound that was measured and is missed. Agreement of
            neighbours or labels, and accuracy and nDCG@10 as shares of fp32's, may each miss their bound by one text or
            query.

        Raises:
            ExportError: the file cannot be loaded or run.
        """
        runner, load_seconds = self._loaded_fp32 if path == self.fp32_path else self.load(path, engine)
        got = self.expected if path == self.fp32_path else runner.run(self.prompted, self.output)
        cosines = (unit(got) * unit(self.expected)).sum(axis=1)
        rate, speedup = self._speed(runner, alone=path == self.fp32_path)
        same = float((best_labels(got) == best_labels(self.expected)).mean())
        measured = Measured(
            texts=len(self.texts),
            cosine_min=_rounded(cosines.min()),
            cosine_mean=_rounded(cosines.mean()),
            neighbour_agreement=neighbour_agreement(self.expected, got),
            texts_per_cpu_second=rate,
            speedup=speedup,
            load_seconds=load_seconds,
            size_bytes=_size(self.folder / path),
            label_agreement=same if self.targets is not None else 1.0,
            accuracy=self._accuracy(got),
            ndcg_at_10=self.fp32_ndcg if path == self.fp32_path else self._ndcg(runner, got),
        )
        return measured, [] if bound is None else self._faults(bound, measured, got)

    def _faults(self, bound: Bound, measured: Measured, got: Matrix) -> list[str]:
        found = bound.faults(self.expected, got)
        # A share may miss its bound by one text (or query): with few texts, a share cannot be measured more finely.
        one = 1 / measured.texts
        shares = [("mean cosine", measured.cosine_mean, bound.cosine_mean, 0.0)]
        if self.targets is None:
            shares.append(("neighbour agreement", measured.neighbour_agreement, bound.neighbour_agreement, one))
        else:
            shares.append(("label agreement", measured.label_agreement, bound.label_agreement, one))
            if self.fp32_accuracy and measured.accuracy is not None:
                share = measured.accuracy / self.fp32_accuracy
                shares.append(("accuracy as a share of fp32's", share, bound.accuracy_share, one / self.fp32_accuracy))
        if self.queries and self.fp32_ndcg and measured.ndcg_at_10 is not None:
            share, query = measured.ndcg_at_10 / self.fp32_ndcg, 1 / len(self.queries) / self.fp32_ndcg
            shares.append(("nDCG@10 as a share of fp32's", share, bound.ndcg_share, query))
        for name, value, minimum, slack in shares:
            if not value + slack >= minimum:
                found.append(f"a {name} of {value:.4f}, its bound is {minimum}")
        return found

    def _accuracy(self, logits: Matrix) -> float | None:
        if self.targets is None:
            return None
        return measure(logits, self.targets, self.manifest.decision_rule)["accuracy"]

    def _ndcg(self, runner: OnnxRunner, found: Matrix) -> float | None:
        if self.queries is None:
            return None
        prompt = self.manifest.prompts.query
        asked = runner.run([prompt + text for text in self.queries.texts], self.output)
        return measure_search(asked, found, self.queries)[DECIDING]

    def _speed(self, runner: OnnxRunner, *, alone: bool) -> tuple[float, float]:
        """Return the texts per CPU-second of a model, and their ratio to fp32's: medians of the rounds.

        The model runs on one thread, and the time of tokenizing does not count.

        Args:
            runner: runner of the model.
            alone: whether the model is fp32 itself, so that the ratio is 1 and only `runner` is timed.
        """
        batches = runner.prepare(self.timed)

        def seconds(timed: OnnxRunner) -> float:
            start = process_time()
            for batch in batches:
                timed.infer(batch, self.output)
            return max(process_time() - start, 1e-9)

        seconds(runner)  # the first run allocates memory for these shapes, so it is not timed
        if alone:
            return len(self.timed) / median(seconds(runner) for _ in range(ROUNDS)), 1.0
        seconds(self.fp32)
        pairs = [(seconds(self.fp32), seconds(runner)) for _ in range(ROUNDS)]
        return len(self.timed) / median(own for _, own in pairs), median(fp32 / own for fp32, own in pairs)


def _rounded(cosine: float) -> float:
    """Return a cosine as a Python float, reduced to 1.0 if rounding in float32 made it greater."""
    return min(1.0, float(cosine))


def _size(path: Path) -> int:
    """Return the bytes of an ONNX file, and of the file with its external weights if there is one."""
    data = path.with_name(f"{path.name}_data")
    return path.stat().st_size + (data.stat().st_size if data.exists() else 0)


def check_texts(texts: Sequence[str]) -> None:
    """Raise ExportError if there are fewer than 2 texts to measure on."""
    if len(texts) < 2:
        raise ExportError(f"there are {len(texts)} texts to measure variants on; give at least 2 with --validation")
