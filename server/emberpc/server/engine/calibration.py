"""How many tokens a micro-batch should have on this host: measured once, and kept."""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter

import numpy as np
import onnxruntime as ort

from emberpc.server.engine.model import Model
from emberpc.server.engine.tokenizing import Truncation
from emberpc.server.errors import items_of

log = logging.getLogger(__name__)

#: Until it is measured, and where it cannot be.
DEFAULT_BATCH_TOKENS = 512
#: Fewer than the first cannot keep a core's multipliers busy; more than the last leave every cache.
_CANDIDATES = (128, 256, 512, 1024)
_TEXT_TOKENS = 32
#: Runs of each candidate, in turns; the fastest counts, since whatever else ran on the host only slows one down.
_ROUNDS = 3
#: Of the best throughput. A smaller batch that comes so near is better: whoever comes next waits for less.
_NEAR = 0.98
_SOME_TEXT = "what a text is about does not matter here, only how many tokens it has when it is cut to measure"


def calibrated_batch_tokens(model: Model, record: Path) -> int:
    """Return the best size of a micro-batch in tokens, from the record if it was measured before.

    Args:
        model: what to measure with.
        record: a JSON file; written if it is not there, or is of other circumstances.
    """
    circumstances = f"{model.fingerprint} {platform.machine()} {_processor()} onnxruntime {ort.__version__}"
    known = _read(record)
    for tokens in _CANDIDATES:
        if known.get("circumstances") == circumstances and known.get("batch_tokens") == tokens:
            return tokens
    rates = _measure(model)
    best = choose(rates)
    log.info(
        "micro-batches of %d tokens; measured, in tokens per second of one worker: %s",
        best,
        ", ".join(f"{tokens}: {rate:.0f}" for tokens, rate in rates.items()),
    )
    found = {"circumstances": circumstances, "batch_tokens": best, "tokens_per_second": rates}
    try:
        record.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    except OSError:
        log.warning("%s cannot be written; the size of micro-batches is measured again at the next start", record)
    return best


def choose(rates: Mapping[int, float]) -> int:
    """Return the smallest size whose tokens per second come near the best."""
    best = max(rates.values())
    return min(tokens for tokens, rate in rates.items() if rate >= _NEAR * best)


def _measure(model: Model) -> dict[int, float]:
    """Return tokens per second of one thread, by the tokens of a batch."""
    (text,) = model.tokenizer.tokenize([_SOME_TEXT], "", Truncation.END, items_of("texts"))
    ids = np.resize(text.ids, min(_TEXT_TOKENS, model.tokenizer.max_tokens))
    seconds = dict.fromkeys(_CANDIDATES, np.inf)
    for _ in range(_ROUNDS):
        for tokens in _CANDIDATES:
            batch = [ids] * (tokens // len(ids))
            start = perf_counter()
            model.encoder.run(batch)
            seconds[tokens] = min(seconds[tokens], perf_counter() - start)
    return {tokens: tokens // len(ids) * len(ids) / taken for tokens, taken in seconds.items()}


def _processor() -> str:
    """Return the processor's name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _read(record: Path) -> dict[str, object]:
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
