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

from emberpc.bundle.cores import quota, usable_cores
from emberpc.server.engine.models.model import Model
from emberpc.server.engine.tokenizing import Truncation
from emberpc.server.errors import items_of

log = logging.getLogger(__name__)

#: Size before the measurement, and on hosts where it fails.
DEFAULT_BATCH_TOKENS = 512
#: Measured sizes. Smaller batches do not keep the arithmetic units of a core busy; larger ones fit into no cache.
_CANDIDATES = (128, 256, 512, 1024)
_TEXT_TOKENS = 32
#: Runs of each size, in turns. The fastest run counts, since other work on the host only makes runs slower.
_ROUNDS = 3
#: Share of the best throughput that suffices. The smallest size that reaches it is chosen: a call that comes next waits
#: for a shorter batch.
_NEAR = 0.98
#: Least share of a core that the measuring thread has on an idle host; with less, the host was busy.
_IDLE_SHARE = 0.9
#: Seconds after which a measurement is done again at the next start: hosts and neighbours change.
_MAX_AGE = 30 * 24 * 3600.0
_SOME_TEXT = "what a text is about does not matter here, only how many tokens it has when it is cut to measure"


@dataclass(frozen=True)
class Calibration:
    """The best size of a micro-batch in tokens, and whether the host was busy when it was measured."""

    batch_tokens: int
    busy: bool = False


@dataclass(frozen=True)
class _Measured:
    """Tokens per second of one thread, by the tokens of a batch; and the share of a core that the thread had."""

    rates: dict[int, float]
    share: float


def calibrated_batch_tokens(model: Model, record: Path, stop: Callable[[], bool] = lambda: False) -> Calibration | None:
    """Return the best size of a micro-batch in tokens, from the record if it was measured before.

    Args:
        model: what to measure with.
        record: JSON file with the result. It is written if it is missing, older than 30 days, or of another model,
            processor, number of cores or ONNX Runtime. It is not written if the host is busy: measure again later.
        stop: whether to stop measuring; called between batches.

    Returns:
        The best size; None if `stop` ended the measurement.
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
        record.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    except OSError:
        log.warning("%s cannot be written; the size of micro-batches is measured again at the next start", record)
    return Calibration(best)


def choose(rates: Mapping[int, float]) -> int:
    """Return the smallest size of micro-batches, in tokens, that has at least 98 % of the best throughput.

    Args:
        rates: tokens per second, by the size of micro-batches in tokens.
    """
    best = max(rates.values())
    return min(tokens for tokens, rate in rates.items() if rate >= _NEAR * best)


def _circumstances(model: Model) -> str:
    """Return a text of everything that a measurement depends on."""
    cores = f"{usable_cores()} cores (quota {quota():g})"
    return f"{model.fingerprint} {platform.machine()} {_processor()} {cores} onnxruntime {ort.__version__}"


def _is_recent(known: Mapping[str, object]) -> bool:
    """Return whether a record was measured at most 30 days ago, and not in the future."""
    measured = known.get("measured")
    return isinstance(measured, float) and 0 <= time() - measured <= _MAX_AGE


def _measure(model: Model, stop: Callable[[], bool]) -> _Measured | None:
    """Measure each size; return None if `stop` ended the measurement."""
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
