"""Decide how each model is run: by the settings and, where they leave it open, by what was measured on this host.

What was measured is in a file of the data directory: the choice for each model, and agreements of precisions.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import time
from typing import Any

from emberpc.bundle.atomic_files import write_text_atomically
from emberpc.bundle.cores import processor_names, quota, usable_cores
from emberpc.server.engine.sessions.runtime import Runtime

log = logging.getLogger(__name__)

#: The engines. Each has the name of its package.
ENGINES = ("onnxruntime", "openvino")
#: Seconds (30 days) after which a choice is measured again: hosts and the other work on them change.
_MAX_AGE = 30 * 24 * 3600.0
_FORMAT = 1
#: Limits of what is read from the file: bytes of the file (a model takes about 1 kB), tokens of a micro-batch, and
#: characters of a reason. Larger values are damage.
_MAX_BYTES, _MAX_BATCH_TOKENS, _MAX_REASON = 16 * 2**20, 2**16, 2**12
#: Fields of a choice in the file, with their types in JSON.
_FIELDS = {"engine": str, "precision": str, "batch_tokens": int, "measured": float, "reason": str}
#: The value of the settings `engine` and `precision` that leaves the choice to a measurement.
AUTO = "auto"
#: A precision counts as the same model as fp32 if at least this share of the ten nearest neighbours, or of the best
#: labels of a classifier whose graph gives logits, is the same on the agreement texts.
SAME_MODEL = 0.99


@dataclass(frozen=True)
class Choice:
    """The fastest way to run a model on a host.

    Attributes:
        engine: the library.
        precision: the precision of matrix products.
        batch_tokens: maximum number of tokens of a micro-batch, padding included.
        measured: when this was measured, in seconds since 1970.
        reason: what was measured, for people to read.
    """

    engine: str
    precision: str
    batch_tokens: int
    measured: float
    reason: str

    @property
    def is_recent(self) -> bool:
        """Whether the choice is at most 30 days old and not from the future."""
        return 0 <= time() - self.measured <= _MAX_AGE


class Choices:
    """The choices of this host, and the agreements of precisions, from a JSON file. Thread-safe.

    A choice holds for a model's ONNX file and a host: processor, its features, number of cores, and versions of the
    engines. So a data directory that is copied to another host has no choice there. An agreement holds on every host.
    A file that is missing, damaged, too large or of another format counts as empty, and so does a damaged entry. The
    file is read again when it has changed, as by `emberpc tune`. If it cannot be written, everything is kept in memory.

    Args:
        path: the file; None: everything is kept in memory only.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        #: Held while the file is read again or written.
        self._lock = threading.Lock()
        #: State of the file when it was read last.
        self._seen: tuple[int, ...] = ()
        self._known = self._read()

    @cached_property
    def _host(self) -> str:
        return host_text()

    def choice(self, sha256: str, among: str) -> Choice | None:
        """Return the choice for an ONNX file on this host; None if there is none.

        Args:
            sha256: SHA-256 (hex) of the ONNX file.
            among: the ways to run the model that were compared, as text; see `RuntimeCandidates.text`.
        """
        return self._current().choices.get(self._key(sha256, among))

    def keep(self, sha256: str, among: str, choice: Choice) -> None:
        """Store a choice; for the arguments, see `choice`. If the file cannot be written, that is logged."""
        with self._lock:
            known = self._merged()
            known.choices[self._key(sha256, among)] = choice
            self._write(known)

    def agreement(self, sha256: str, engine: str, precision: str) -> float | None:
        """Return the agreement, in [0, 1], of an ONNX file in a precision with fp32; None if it was not measured.

        Args:
            sha256: SHA-256 (hex) of the ONNX file.
            engine: the engine, whose version counts, too.
            precision: the precision.
        """
        return self._current().agreements.get(self._agreement_key(sha256, engine, precision))

    def keep_agreement(self, sha256: str, engine: str, precision: str, agreement: float) -> None:
        """Store an agreement; see `agreement`. A stored agreement is never replaced."""
        with self._lock:
            known = self._merged()
            known.agreements.setdefault(self._agreement_key(sha256, engine, precision), agreement)
            self._write(known)

    def _key(self, sha256: str, among: str) -> str:
        return hashlib.sha256(f"{self._host} {sha256} {among}".encode()).hexdigest()

    def _agreement_key(self, sha256: str, engine: str, precision: str) -> str:
        return f"{sha256} {engine} {version_of(engine)} {precision}"

    def _current(self) -> _Known:
        """Return what is known, after reading the file if it has changed. Does not wait for a write in progress."""
        if self._state() != self._seen and self._lock.acquire(blocking=False):
            try:
                self._known = self._merged()
            finally:
                self._lock.release()
        return self._known

    def _state(self) -> tuple[int, ...]:
        """Return values that change when the file is replaced; empty if there is no file."""
        try:
            found = self._path.stat() if self._path is not None else None
        except OSError:
            found = None
        return () if found is None else (found.st_ino, found.st_size, found.st_mtime_ns)

    def _merged(self) -> _Known:
        """Return what is known, with what another process has written to the file since. Of two choices, the newer."""
        found, choices = self._read(), dict(self._known.choices)
        for key, choice in found.choices.items():
            choices[key] = max(choices.get(key, choice), choice, key=lambda each: (each.is_recent, each.measured))
        return _Known(choices, found.agreements | self._known.agreements)

    def _read(self) -> _Known:
        found: Any = None
        self._seen = self._state()
        try:
            # A pipe in the place of the file would never end.
            if self._path is not None and self._path.is_file() and self._path.stat().st_size <= _MAX_BYTES:
                found = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            pass
        fits = isinstance(found, dict) and found.get("format") == _FORMAT
        choices, agreements = (found.get(name) if fits else None for name in ("choices", "agreements"))
        return _Known(
            {key: one for key, entry in _items(choices) if (one := _choice_of(entry)) is not None},
            {key: float(entry) for key, entry in _items(agreements) if type(entry) in (int, float) and 0 <= entry <= 1},
        )

    def _write(self, known: _Known) -> None:
        self._known = known
        if self._path is None:
            return
        text = json.dumps({"format": _FORMAT, "host": self._host, **asdict(known)}, indent=2) + "\n"
        try:
            write_text_atomically(self._path, text)
        except OSError as error:
            log.warning(
                "%s cannot be written (%s): what was measured is lost when this process ends; check free space, "
                "permissions, and whether the folder exists",
                self._path,
                error.strerror or error,
            )


@dataclass(frozen=True)
class _Known:
    """Choices and agreements by their keys in the file."""

    choices: dict[str, Choice]
    agreements: dict[str, float]


def _items(part: Any) -> list[tuple[str, Any]]:
    return list(part.items()) if isinstance(part, dict) else []


def _choice_of(entry: Any) -> Choice | None:
    """Return the choice of an entry of the file; None if the entry is damaged."""
    if not isinstance(entry, dict) or entry.keys() != _FIELDS.keys():
        return None
    fits = (
        all(type(entry[name]) is kind for name, kind in _FIELDS.items())
        and entry["engine"] in ENGINES
        and 1 <= entry["batch_tokens"] <= _MAX_BATCH_TOKENS
        and len(entry["reason"]) <= _MAX_REASON
        and entry["reason"].isprintable()
    )
    return Choice(**entry) if fits else None


@dataclass(frozen=True)
class RuntimeCandidates:
    """What the settings leave open for a model.

    Attributes:
        runtimes: the allowed ways to run the model. The first one is used until the others are measured, and if none is
            faster.
        batch_tokens: whether the size of micro-batches is open.
    """

    runtimes: tuple[Runtime, ...]
    batch_tokens: bool

    @property
    def any_open(self) -> bool:
        """Whether there is anything to measure."""
        return self.batch_tokens or len(self.runtimes) > 1

    @property
    def text(self) -> str:
        """Names of the engines and precisions."""
        return ", ".join(runtime.name for runtime in self.runtimes)


@dataclass(frozen=True)
class RuntimePlan:
    """How a model is run now.

    Attributes:
        runtime: the engine and the precision.
        batch_tokens: maximum number of tokens of a micro-batch, padding included; 0: the server's default.
        reason: why, for people to read.
    """

    runtime: Runtime
    batch_tokens: int
    reason: str


@dataclass(frozen=True)
class Runtimes:
    """How the models are run.

    Attributes:
        engines: engines, or `auto`, by the name of the model; the empty name is for all other models.
        precisions: precisions, or `auto`, by the name of the model; the empty name is for all other models.
        streams: number of batches that run at the same time.
        batch_tokens: the setting `batch_tokens`: maximum number of tokens of a micro-batch; 0: it is measured.
        choices: what was measured.
    """

    engines: Mapping[str, str] = field(default_factory=dict)
    precisions: Mapping[str, str] = field(default_factory=dict)
    streams: int = 1
    batch_tokens: int = 0
    choices: Choices = field(default_factory=lambda: Choices(None))

    def candidates(self, name: str, sha256: str, made_for: str = "") -> RuntimeCandidates:
        """Return what the settings leave open for a model.

        Args:
            name: name of the model.
            sha256: SHA-256 (hex) of its ONNX file.
            made_for: the engine that the served variant was made for; empty: any engine. Where the settings leave it
                open, the variant runs in this engine with the precision fp32.
        """
        engine = self.engines.get(name, self.engines.get("", AUTO))
        precision = self.precisions.get(name, self.precisions.get("", AUTO))
        if made_for:
            engine = made_for if engine == AUTO else engine
            precision = "fp32" if precision == AUTO else precision
        pairs = [("onnxruntime", "fp32"), ("openvino", "fp32"), ("openvino", "bf16")]
        if AUTO in (engine, precision):
            pairs = [pair for pair in pairs if engine in (AUTO, pair[0]) and precision in (AUTO, pair[1])]
        else:
            pairs = [(engine, precision)]
        first, *others = pairs
        installed = [pair for pair in others if version_of(pair[0])]
        return RuntimeCandidates(
            tuple(self._runtime(*pair, sha256) for pair in (first, *installed)), batch_tokens=not self.batch_tokens
        )

    def plan(self, name: str, sha256: str, made_for: str = "") -> RuntimePlan:
        """Return how a model is run now; for the arguments, see `candidates`."""
        candidates = self.candidates(name, sha256, made_for)
        runtime, choice = self._chosen(candidates, sha256)
        if choice is not None:
            return RuntimePlan(runtime, self.batch_tokens or choice.batch_tokens, choice.reason)
        reason = f"the variant was made for {made_for}" if made_for else "set by the settings"
        reason = "not measured yet" if candidates.any_open else reason
        return RuntimePlan(runtime, self.batch_tokens, reason)

    def is_due(self, name: str, sha256: str, made_for: str = "") -> bool:
        """Return whether a model must be measured; for the arguments, see `candidates`."""
        candidates = self.candidates(name, sha256, made_for)
        _, choice = self._chosen(candidates, sha256)
        return candidates.any_open and (choice is None or not choice.is_recent)

    def unmeasured(self) -> Runtimes:
        """Return these settings without choices: each model is run in the first way that the settings allow."""
        return replace(self, choices=Choices(None))

    def _chosen(self, candidates: RuntimeCandidates, sha256: str) -> tuple[Runtime, Choice | None]:
        """Return the chosen runtime with its choice; without a valid choice, the first runtime and None.

        A choice of a precision whose agreement with fp32 is unknown, as in a damaged file, or too low is not valid,
        unless the settings state this precision: the model would get another fingerprint by itself.
        """
        first = candidates.runtimes[0]
        choice = self.choices.choice(sha256, candidates.text)
        for runtime in candidates.runtimes:
            if choice is not None and (runtime.engine, runtime.precision) == (choice.engine, choice.precision):
                return (runtime, choice) if runtime.same_model or runtime == first else (first, None)
        return first, None

    def _runtime(self, engine: str, precision: str, sha256: str) -> Runtime:
        same = precision == "fp32" or (self.choices.agreement(sha256, engine, precision) or 0.0) >= SAME_MODEL
        return Runtime(engine, precision, self.streams, same)


@cache
def version_of(engine: str) -> str:
    """Return the version of an engine's package; empty if it is not installed."""
    try:
        return version(engine)
    except PackageNotFoundError:
        return ""


def host_text() -> str:
    """Return a text that describes this host: processor, features, cores, and versions of the engines."""
    processor = processor_names()
    flags = hashlib.sha256(" ".join(sorted(processor["flags"].split())).encode()).hexdigest()[:16]
    engines = " ".join(f"{engine} {version_of(engine) or 'not installed'}" for engine in ENGINES)
    cores = f"{usable_cores()} cores (quota {quota():g})"
    return f"{platform.machine()} {processor['model name']} features {flags} {cores} {engines}"
