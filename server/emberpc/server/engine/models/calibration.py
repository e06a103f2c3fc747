"""Measure the best size of a micro-batch on this host, in tokens, and keep the result in a file."""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, thread_time, time

import numpy as np
import onnxruntime as ort

from emberpc.bundle.atomic_files import write_text_atomically
from emberpc.bundle.cores import quota, usable_cores
from emberpc.server.engine.models.model import Model
from emberpc.server.engine.tokenizing import Truncation
from emberpc.server.errors import items_of

log = logging.getLogger(__name__)

#: Maximum number of tokens of a micro-batch, padding included, until the best size is known; not used if the settings
#: state a size.
DEFAULT_BATCH_TOKENS = 512
#: Measured sizes of micro-batches, in tokens. Smaller batches do not keep the arithmetic units of a core busy. Larger
#: batches do not fit into the caches of a processor.
_CANDIDATES = (128, 256, 512, 1024)
#: Tokens of each text of the measured batches, or the model's length limit if that is less.
_TEXT_TOKENS = 32
#: Runs of each size. The sizes take turns. The fastest run counts, since other work on the host only makes runs slower.
_ROUNDS = 3
#: Share of the best throughput that suffices. The smallest size that reaches this share is chosen: during a smaller
#: batch, a new call waits less.
_NEAR = 0.98
#: Least CPU time of the measuring thread on an idle host, as a share of the wall time. With less, the host was busy.
_IDLE_SHARE = 0.9
#: Seconds (30 days) after which a measurement is repeated at the next start of the server: hosts and the other work on
#: them change.
_MAX_AGE = 30 * 24 * 3600.0
#: The text whose token ids are repeated or cut to the length of the texts that are run.
_SOME_TEXT = "what a text is about does not matter here, only how many tokens it has when it is cut to measure"


@dataclass(frozen=True)
class Calibration:
    """The best size of a micro-batch in tokens, and whether the host was too busy for a reliable measurement."""

    batch_tokens: int
    busy: bool = False


@dataclass(frozen=True)
class _Measured:
    """A measurement of all sizes.

    Attributes:
        rates: tokens per second of one thread in the fastest run, by the size of a micro-batch in tokens.
        share: CPU time of the thread as a share of the wall time (0 to 1), over all runs.
    """

    rates: dict[int, float]
    share: float


def calibrated_batch_tokens(model: Model, record: Path, stop: Callable[[], bool] = lambda: False) -> Calibration | None:
    """Return the best size of a micro-batch in tokens, from a file if it was measured before, else by measuring it.

    A result of a busy host is returned, but not written to the file: the caller should measure again later. If the file
    cannot be written, that is logged.

    Args:
        model: the model that is run to measure.
        record: JSON file with the last measurement. If it is missing, damaged, older than 30 days, from the future, or
            of another model, processor, number of cores or ONNX Runtime, the size is measured and, on an idle host, the
            file is written.
        stop: returns whether to stop measuring; called before each batch.

    Returns:
        A `Calibration`; `busy` is False if the size comes from the file. None if `stop` ended the measurement.

    Raises:
        Exception: the tokenizer or the model failed; the exceptions of ONNX Runtime have no common base class.
    """
    circumstances = _circumstances(model)
    known = _read(record)
    for tokens in _CANDIDATES:
        if known.get("circumstances") == circumstances and known.get("batch_tokens") == tokens and _is_recent(known):
            return Calibration(tokens)
    measured = _measure(model, stop)
    if measured is None:
        return None
    rates, best = measured.rates, choose(measured.rates)
    log.info(
        "micro-batches of %d tokens; measured, in tokens per second of one worker: %s",
        best,
        ", ".join(f"{tokens}: {rate:.0f}" for tokens, rate in rates.items()),
    )
    if measured.share < _IDLE_SHARE:
        log.info("the host was busy while that was measured; it is measured again later")
        return Calibration(best, busy=True)
    found = {
        "circumstances": circumstances,
        "measured": time(),
        "batch_tokens": best,
        "tokens_per_second": rates,
        "core_share": measured.share,
    }
    try:
        write_text_atomically(record, json.dumps(found, indent=2) + "\n")
    except OSError:
        log.warning("%s cannot be written; the size of micro-batches is measured again at the next start", record)
    return Calibration(best)


def choose(rates: Mapping[int, float]) -> int:
    """Return the smallest size of micro-batches, in tokens, that has at least 98 % of the best throughput.

    Args:
        rates: tokens per second, by the size of micro-batches in tokens; at least one.
    """
    best = max(rates.values())
    return min(tokens for tokens, rate in rates.items() if rate >= _NEAR * best)


def _circumstances(model: Model) -> str:
    """Return a text to compare: a measurement holds for the same model, processor, number of cores and ONNX Runtime."""
    cores = f"{usable_cores()} cores (quota {quota():g})"
    return f"{model.fingerprint} {platform.machine()} {_processor()} {cores} onnxruntime {ort.__version__}"


def _is_recent(known: Mapping[str, object]) -> bool:
    """Return whether the measurement in a record has a time that is at most 30 days old and not in the future."""
    measured = known.get("measured")
    return isinstance(measured, float) and 0 <= time() - measured <= _MAX_AGE


def _measure(model: Model, stop: Callable[[], bool]) -> _Measured | None:
    """Measure the throughput of each size by running a model on this thread; return None if `stop` returns True.

    `stop` is called before each of the 12 runs.
    """
    (text,) = model.tokenizer.tokenize([_SOME_TEXT], "", Truncation.END, items_of("texts"))
    ids = np.resize(text.ids, min(_TEXT_TOKENS, model.tokenizer.max_tokens))
    seconds = dict.fromkeys(_CANDIDATES, np.inf)
    all_taken = all_own = 0.0
    for _ in range(_ROUNDS):
        for tokens in _CANDIDATES:
            batch = [ids] * (tokens // len(ids))
            if stop():
                return None
            start, start_own = perf_counter(), thread_time()
            model.encoder.run(batch)  # on one thread: this one
            taken, own = perf_counter() - start, thread_time() - start_own
            seconds[tokens] = min(seconds[tokens], taken)
            all_taken, all_own = all_taken + taken, all_own + own
    rates = {tokens: tokens // len(ids) * len(ids) / taken for tokens, taken in seconds.items()}
    return _Measured(rates, all_own / all_taken)


def _processor() -> str:
    """Return the name of the processor; empty if it is unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _read(record: Path) -> dict[str, object]:
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
