"""Find the fastest way to run a model on this host."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from time import time

from emberpc.bundle.contents import Contents
from emberpc.bundle.onnx_file import external_files
from emberpc.server.engine.choices import SAME_MODEL, Choice, Runtimes
from emberpc.server.engine.measuring import HostBusyError, best_size, compare_encoders, compare_sizes
from emberpc.server.engine.models.agreement import agreement, agreement_texts, encoder_of, outputs
from emberpc.server.engine.models.encoders import Encoder
from emberpc.server.engine.models.extremes import ENGINE_BOUNDS, fault_at_the_limits
from emberpc.server.engine.models.model import Model
from emberpc.server.engine.sessions.runtime import Runtime
from emberpc.server.engine.sessions.session import SessionError
from emberpc.server.engine.tokenizing import TokenIds, Truncation
from emberpc.server.errors import items_of
from emberpc.server.memory import free_memory

log = logging.getLogger(__name__)

#: Another way to run a model than the first one is chosen only if it is at least this many times as fast.
_GAIN = 1.1
#: Number of agreement texts by which two engines in fp32 are compared.
_FEW = 32


#: Memory that measuring one engine may take: this many times the bytes of the weights, and this many bytes. With
#: MiniLM (90 MB), three engines took 628 MB and one engine 284 MB; with a file of 0.1 MB, three took 82 MB.
_FILES, _BYTES = 2, 100 * 2**20


def tune(model: Model, runtimes: Runtimes, stop: Callable[[], bool] = lambda: False) -> Choice:
    """Measure the ways to run a model that the settings leave open; store and return the choice.

    Blocks for some seconds with a small model. Each engine takes the memory of the weights again until the function
    returns; nothing is loaded if this memory may not be free. The first way is the fallback: another one is chosen
    only if it is at least 10 % faster, and if its vectors count as the same. For the precision fp32, they must be
    nearly equal; for others, see `choices.SAME_MODEL`.

    Args:
        model: the model.
        runtimes: what the settings leave open, and where the choice is stored.
        stop: returns whether to stop measuring; called before each batch.

    Raises:
        HostBusyError: the host has too little free processor time or memory; nothing is stored.
        MeasurementStoppedError: `stop` returned True.
        SessionError: the model's file changed since the model was loaded, or the fallback cannot be loaded again.
        BundleError: the model's file cannot be read, or `stop` returned True while the file was hashed.
        Exception: the tokenizer or the model failed; the exceptions of the engines have no common base class.
    """
    (text,) = model.tokenizer.tokenize([agreement_texts()[0]], "", Truncation.END, items_of("texts"))
    max_tokens = model.tokenizer.max_tokens
    candidates = runtimes.candidates(model.name, model.encoder.sha256, model.variant.engine)
    _check_memory(model, len(candidates.runtimes))
    encoders = _encoders(model, candidates.runtimes, text.ids, stop)
    best = fallback = next(iter(encoders))
    reasons = []
    if len(encoders) > 1:
        speeds = compare_encoders(encoders, text.ids, max_tokens, stop)
        gains = {runtime: speeds.gain(runtime, fallback) for runtime in encoders}
        reasons.append(f"{fallback.name} {speeds.rate(fallback):.0f} tokens/s")
        for runtime in sorted(gains, key=lambda runtime: -gains[runtime]):
            if runtime is fallback:
                continue
            fault = "" if gains[runtime] >= _GAIN else "no gain of 10 %"
            if not fault and best is not fallback:
                fault = "slower"
            fault = fault or _fault(model, runtimes, encoders, fallback, runtime, stop)
            reasons.append(f"{runtime.name} {gains[runtime]:.2f} times{f' ({fault})' if fault else ''}")
            best = best if fault else runtime
    sizes = compare_sizes(encoders[best], text.ids, max_tokens, stop)
    size = best_size(sizes)
    reasons.append(f"micro-batches of {size} tokens")
    choice = Choice(best.engine, best.precision, size, time(), f"measured on one thread: {', '.join(reasons)}")
    runtimes.choices.keep(model.encoder.sha256, candidates.text, choice)
    log.info("model %s: %s %s, %s", model.name, choice.engine, choice.precision, choice.reason)
    return choice


def _check_memory(model: Model, engines: int) -> None:
    """Raise HostBusyError if loading a model with some engines at once may take more memory than is free.

    Raises:
        BundleError: the model's file cannot be read.
    """
    files = (model.variant.path, *external_files(model.folder, model.variant.path))
    size = sum((model.folder / file).stat().st_size for file in files)
    needed, free = engines * (_FILES * size + _BYTES), free_memory()
    if needed > free:
        raise HostBusyError(
            f"measuring {engines} engines may take {needed / 1e6:.0f} MB of memory, and {free / 1e6:.0f} MB are free"
        )


def _encoders(
    model: Model, runtimes: tuple[Runtime, ...], ids: TokenIds, stop: Callable[[], bool]
) -> dict[Runtime, Encoder]:
    """Load the model with each runtime. A runtime that cannot load the model, or run `ids`, is left out.

    The errors of the first runtime pass through.
    """
    found: dict[Runtime, Encoder] = {}
    contents = Contents(stop)  # all runtimes share it, so the file is read and hashed once
    for runtime in runtimes:
        try:
            encoder = encoder_of(model, replace(runtime, streams=1), contents)
        except SessionError as error:
            if not found:
                raise
            log.info("model %s: %s is not measured: %s", model.name, runtime.name, error)
            continue
        try:
            encoder.run([ids])
        except Exception:  # the exceptions of the engines have no common base class
            if not found:
                raise
            log.exception("model %s: %s is not measured, since it fails on a text", model.name, runtime.name)
            continue
        found[runtime] = encoder
    return found


def _fault(
    model: Model,
    runtimes: Runtimes,
    encoders: Mapping[Runtime, Encoder],
    expected: Runtime,
    got: Runtime,
    stop: Callable[[], bool],
) -> str:
    """Return why the outputs of a runtime may not take the place of another's; empty if they may."""
    if fault := fault_at_the_limits(model.tokenizer, encoders[expected], encoders[got], got.precision):
        return fault
    if got.precision == expected.precision:
        texts = agreement_texts()[:_FEW]
        few = [outputs(model, encoders[runtime], texts, stop) for runtime in (expected, got)]
        return "; ".join(ENGINE_BOUNDS[got.precision].faults(few[0], few[1]))
    found = agreement(model, runtimes.choices, got, encoders[expected], encoders[got], stop)
    return "" if found >= SAME_MODEL else f"agrees with fp32 in {found:.1%}, less than {SAME_MODEL:.0%}"
