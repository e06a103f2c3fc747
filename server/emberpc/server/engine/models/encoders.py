"""Encoders: ONNX models that compute vectors or logits from token ids. Models that differ by their heads share one."""

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

#: Before a session with several threads is used, its speed is compared with the session with a single thread. First
#: value: tokens of the text of this measurement. Second value: runs with each session.
_PROBE_TOKENS, _PROBES = 32, 5
_numbers = count()


class Encoder:
    """An ONNX model with its interface.

    Args:
        session: the model, with one thread for a run.
        interface: roles of the model's inputs and outputs.
        pad_token_id: token id that fills up the shorter texts of a batch.
        sha256: SHA-256 (hex) of the ONNX file that was loaded.
    """

    def __init__(self, session: OnnxSession, interface: Interface, pad_token_id: int, sha256: str = "") -> None:
        self.interface = interface
        self.sha256 = sha256
        #: Number of this loaded encoder. Cached outputs of an encoder that was loaded before do not match it.
        self.number = next(_numbers)
        self._session = session
        self._pad_token_id = pad_token_id
        self._wide: OnnxSession | None = None
        self._lock = threading.Lock()
        #: Thread that loads the session with several threads; started once.
        self._widener: threading.Thread | None = None
        self._closing = LoadCancellation()

    @property
    def wide(self) -> bool:
        """Whether there is a session with several threads."""
        return self._wide is not None

    def run(self, batch: Sequence[TokenIds], threads: int = 1) -> Output:
        """Run the token ids of texts as one batch; return float32 (texts, width).

        Args:
            batch: token ids of each text.
            threads: number of threads that the run may use. More than one need a second session, which takes the
                memory of the model again, without the large tables. The first run that could use the second session
                starts to load it in the background.
        """
        if threads > 1 and self._widener is None:
            self._start_widening(threads)
        session = self._wide if threads > 1 and self._wide is not None else self._session
        return self._run_on(session, batch)

    def close(self, deadline: Deadline | None = None) -> bool:
        """Cancel the loading of the session with several threads. `run` still works, on the first session.

        A thread that is inside ONNX Runtime at the end of the interpreter would abort the process.

        Args:
            deadline: how long to wait for the thread; None: without limit.

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
            except RuntimeError:  # the system allows no thread; the next run tries again
                log.warning("no thread could be started to load %s for several threads", self._session.path)
                return
            self._widener = widener

    def _run_on(self, session: OnnxSession, batch: Sequence[TokenIds]) -> Output:
        return session.run(batch, self.interface, self._pad_token_id)

    def _widen(self, threads: int) -> None:
        """Load a session with several threads, and keep it if it is faster."""
        try:
            wide = self._session.with_threads(threads, self._closing)
        except SessionError as error:  # the session with one thread goes on
            if not self._closing.cancelled:
                log.warning("%s; single texts run on one core", error)
            return
        faster = self._is_faster(wide)
        if faster:
            self._wide = wide
        elif not self._closing.cancelled:
            log.info("%s is no faster on %d threads", self._session.path, threads)
        del wide
        # Loading takes twice the memory of the weights for a moment; and a session that is not kept takes none.
        return_memory()

    def _is_faster(self, wide: OnnxSession) -> bool:
        """Return whether a session runs a short text faster than the session with one thread.

        The sessions run in turns, so that other work on the host slows both. The fastest run of each counts. False as
        soon as the encoder is closed.
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
    """The encoders in use, by fingerprint and length limit. Thread-safe."""

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
            fingerprint: fingerprint of its models.
            max_tokens: length limit of texts, in tokens; with another limit a long text has another vector.
            load: loads the encoder.
            fresh: whether to load it even if one is in use; later calls get the new one.
        """
        with self._lock:
            key = (fingerprint, max_tokens)
            encoder = None if fresh else self._known.get(key)
            if encoder is None:
                encoder = self._known[key] = load()
            return encoder
