"""What turns token ids into vectors or logits; one serves all models that are the same but for their heads."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from itertools import count
from time import perf_counter
from weakref import WeakValueDictionary

import numpy as np

from emberpc.bundle import Interface
from emberpc.server.deadlines import Deadline
from emberpc.server.engine.sessions.onnx_runtime import LoadCancellation, OnnxSession, Output, SessionError
from emberpc.server.engine.tokenizing import TokenIds
from emberpc.server.memory import return_memory

log = logging.getLogger(__name__)

#: The text that tells whether a session with several threads is the faster one: its tokens, and how often it is run.
_PROBE_TOKENS, _PROBES = 32, 5
_numbers = count()


class Encoder:
    """An ONNX model and how to call it.

    Args:
        session: the model, one thread for a run.
        interface: how to call it.
        pad_token_id: what fills up the shorter texts of a batch.
        sha256: hash (hex) of the ONNX file that was loaded.
    """

    def __init__(self, session: OnnxSession, interface: Interface, pad_token_id: int, sha256: str = "") -> None:
        self.interface = interface
        self.sha256 = sha256
        #: Of this loading: what a cache kept of one before it is not of this one.
        self.number = next(_numbers)
        self._session = session
        self._pad_token_id = pad_token_id
        self._wide: OnnxSession | None = None
        self._lock = threading.Lock()
        #: Makes the session with several threads; started once.
        self._widener: threading.Thread | None = None
        self._closing = LoadCancellation()

    @property
    def wide(self) -> bool:
        """Whether there is a session with several threads."""
        return self._wide is not None

    def run(self, batch: Sequence[TokenIds], threads: int = 1) -> Output:
        """Run texts' token ids as one batch; float32 (texts, width).

        Args:
            batch: the texts.
            threads: that are free for it. More than one need a session of their own, which takes the model's memory
                once more, less the large tables: it is made beside the first run that could use it.
        """
        if threads > 1 and self._widener is None:
            self._start_widening(threads)
        session = self._wide if threads > 1 and self._wide is not None else self._session
        return self._run_on(session, batch)

    def close(self, deadline: Deadline | None = None) -> bool:
        """Stop making a session with several threads. `run` keeps working on the session that is there.

        A thread that is inside ONNX Runtime when the interpreter ends would abort the process.

        Args:
            deadline: until when to wait for the thread; None: without limit.

        Returns:
            Whether the thread has ended.
        """
        with self._lock:
            self._closing.cancel()
            widener = self._widener
        return widener is None or (deadline or Deadline()).join(widener)

    def _start_widening(self, threads: int) -> None:
        with self._lock:
            if self._widener is not None or self._closing.cancelled:
                return
            widener = threading.Thread(target=self._widen, args=(threads,), name="widen", daemon=True)
            try:
                widener.start()
            except RuntimeError:  # the system gives no thread; the next run tries again
                log.warning("no thread could be started to load %s for several threads", self._session.path)
                return
            self._widener = widener

    def _run_on(self, session: OnnxSession, batch: Sequence[TokenIds]) -> Output:
        return session.run(batch, self.interface, self._pad_token_id)

    def _widen(self, threads: int) -> None:
        """Make a session with several threads, and keep it if it is the faster one."""
        try:
            wide = self._session.with_threads(threads, self._closing)
        except SessionError as error:  # one thread does it, too
            if not self._closing.cancelled:
                log.warning("%s; texts that are alone run on one core", error)
            return
        faster = self._is_faster(wide)
        if faster:
            self._wide = wide
        elif not self._closing.cancelled:
            log.info("%s is no faster on %d threads", self._session.path, threads)
        del wide
        # Reading the weights took as much again as they take in the end; and if the session is not kept, all of it.
        return_memory()

    def _is_faster(self, wide: OnnxSession) -> bool:
        """Run a short text on both sessions, in turns, since what else runs holds up both; the fastest run counts.

        False as soon as the encoder is closed.
        """
        probe = [np.full(_PROBE_TOKENS, self._pad_token_id, dtype=np.int64)]
        times = []
        for _ in range(_PROBES):
            if self._closing.cancelled:
                return False
            times.append((self._seconds(wide, probe), self._seconds(self._session, probe)))
        return min(ours for ours, _ in times) < min(theirs for _, theirs in times)

    def _seconds(self, session: OnnxSession, batch: Sequence[TokenIds]) -> float:
        start = perf_counter()
        self._run_on(session, batch)
        return perf_counter() - start


class Encoders:
    """The encoders in use, by what tells one from another. Thread-safe."""

    def __init__(self) -> None:
        self._known: WeakValueDictionary[tuple[str, int], Encoder] = WeakValueDictionary()
        self._lock = threading.Lock()

    @property
    def is_empty(self) -> bool:
        """Whether none is in use."""
        return not self._known

    def get(self, fingerprint: str, max_tokens: int, load: Callable[[], Encoder], *, fresh: bool = False) -> Encoder:
        """Return an encoder that is in use, or load it.

        Args:
            fingerprint: of the models that it serves, made of the bytes of their files.
            max_tokens: where their texts are cut; other cuts are other vectors.
            load: loads it.
            fresh: load it anyway, and share that from now on.
        """
        with self._lock:
            key = (fingerprint, max_tokens)
            encoder = None if fresh else self._known.get(key)
            if encoder is None:
                encoder = self._known[key] = load()
            return encoder
