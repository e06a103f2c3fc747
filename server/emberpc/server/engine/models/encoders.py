"""Encoders: ONNX models that compute vectors or logits from token ids.

Models with the same fingerprint and length limit, such as classifiers that differ only in their heads, can share one
encoder.
"""

from __future__ import annotations

import logging
import threading
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from time import perf_counter
from weakref import WeakValueDictionary

import numpy as np

from emberpc.bundle import Interface
from emberpc.server.deadlines import Deadline
from emberpc.server.engine.sessions.runtime import Runtime
from emberpc.server.engine.sessions.session import LoadCancellation, Output, Session, SessionError
from emberpc.server.engine.tokenizing import TokenIds
from emberpc.server.memory import return_memory

log = logging.getLogger(__name__)

#: A session with several threads is used only if it runs a short text faster than the session with one thread: the
#: number of tokens of that text, and the number of runs with each session.
_PROBE_TOKENS, _PROBES = 32, 5
#: Allowed numbers of texts of a batch for a library that compiles shapes, ascending; above 128, multiples of 64. Of
#: up to 128 texts that fit into a micro-batch, less than a fifth waits for the next one.
_ROWS: tuple[int, ...] = (*range(1, 9), 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128)
_numbers = count()


def padded_length(tokens: int, maximum: int) -> int:
    """Return the length to which a batch is padded for a library that compiles shapes.

    It is a multiple of 4 up to 32 tokens, of 8 up to 128, and of 16 above, but at most `maximum`.

    Args:
        tokens: number of tokens of the longest text of the batch.
        maximum: maximum number of tokens of a text of the model.
    """
    step = 4 if tokens <= 32 else 8 if tokens <= 128 else 16
    return max(tokens, min(-(-tokens // step) * step, maximum))


class Encoder:
    """An ONNX model with its interface. Thread-safe.

    Args:
        session: the loaded ONNX file. It uses one thread for a run.
        interface: roles of the inputs and outputs of the ONNX file.
        pad_token_id: token id that fills up the shorter texts of a batch.
        sha256: SHA-256 (hex) of the ONNX file.
        batch_tokens: maximum number of tokens of a micro-batch, padding included; 0: the default of the scheduler.
        max_tokens: maximum number of tokens of a text; 0: unknown, and then the lengths of batches are not rounded.
    """

    def __init__(
        self,
        session: Session,
        interface: Interface,
        pad_token_id: int,
        sha256: str = "",
        batch_tokens: int = 0,
        max_tokens: int = 0,
    ) -> None:
        self.interface = interface
        self.sha256 = sha256
        self.batch_tokens = batch_tokens
        #: Unique number of this object. Outputs are cached by it, so those of an encoder that was loaded earlier are
        #: not found.
        self.number = next(_numbers)
        self._session = session
        self.pad_token_id = pad_token_id
        self.max_tokens = max_tokens
        self._wide: Session | None = None
        #: Whether `_wide` runs a short text faster than `_session`.
        self._wide_is_faster = False
        #: Number of runs in progress in `_session`. Runs in `_wide` do not count: they take no stream of `_session`.
        self._running = 0
        self._lock = threading.Lock()
        #: Thread that loads the session with several threads; started once, and None before that.
        self._widener: threading.Thread | None = None
        self._closing = LoadCancellation()

    @property
    def path(self) -> Path:
        """The ONNX file."""
        return self._session.path

    @property
    def wide(self) -> bool:
        """Whether a session with several threads was loaded and is used for runs on several threads."""
        return self._wide is not None and self._wide_is_faster

    def padded(self, tokens: int) -> int:
        """Return the length to which a batch is padded, if its longest text has that many tokens.

        A library that compiles the model for each shape gets few shapes. To compile a shape takes 5 to 30 % of the
        time of a full micro-batch, and several times as long as the run of a short text.
        """
        return padded_length(tokens, self.max_tokens) if self._session.compiles_shapes else tokens

    def rows(self, texts: int) -> int:
        """Return how many of `texts` texts, which fit into a micro-batch, to run as one batch; see `padded`."""
        if not self._session.compiles_shapes:
            return texts
        return _ROWS[bisect_right(_ROWS, texts) - 1] if texts <= _ROWS[-1] else texts // 64 * 64

    def run(self, batch: Sequence[TokenIds], threads: int = 1) -> Output:
        """Run the token ids of texts as one batch; return float32 (texts, width).

        Args:
            batch: token ids of each text, at least one text.
            threads: 1, or the number of threads that the run may use. Several threads need a second session, which
                takes the memory of the model again, except the large tables, which both sessions share. The first run
                with several threads starts to load the second session in the background, with that number of threads;
                later runs with any number above 1 use this session. Runs use one thread until the second session is
                loaded, and always if it is no faster, cannot be loaded, or the encoder was closed before. The second
                session also runs the batches that the first one has no free stream for, such as a short text beside
                bulk texts; so it is loaded at the first batch of this kind, too.

        Raises:
            BundleError: the output has another number of axes than the interface expects.
            Exception: the engine failed; the exceptions of the engines have no common base class.
        """
        limit = self._session.max_runs
        with self._lock:
            full = limit is not None and self._running >= limit
            wide = self._wide if full or (threads > 1 and self._wide_is_faster) else None
            self._running += wide is None
        try:
            if (threads > 1 or full) and self._widener is None:
                self._start_widening(max(threads, limit or 1))
            return self._run_on(wide or self._session, batch)
        finally:
            with self._lock:
                self._running -= wide is None

    def close(self, deadline: Deadline | None = None) -> bool:
        """Cancel the loading of the session with several threads, now and later, and wait for the thread that loads it.

        `run` still works. The wait is needed since a thread that is inside ONNX Runtime when the interpreter ends could
        abort the process. ONNX Runtime before 1.22 loads the session to its end.

        Args:
            deadline: until when to wait for the thread; None: without limit.

        Returns:
            Whether no such thread is running any more.
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

    def _run_on(self, session: Session, batch: Sequence[TokenIds]) -> Output:
        length = self.padded(max(len(ids) for ids in batch))
        input_ids = np.full((len(batch), length), self.pad_token_id, dtype=np.int64)
        mask = np.zeros((len(batch), length), dtype=np.int64)
        for row, ids in enumerate(batch):
            input_ids[row, : len(ids)] = ids
            mask[row, : len(ids)] = 1
        output = session.run(self.interface.inputs.feeds(input_ids, mask), self.interface.output)
        return self.interface.finish(output, mask)

    def _widen(self, threads: int) -> None:
        """Load a session with several threads, and keep it if it is faster or takes runs that would wait.

        Called on a thread of its own. If the session is not kept, cannot be loaded or fails, all runs stay on one
        thread. That is logged. If the encoder was closed meanwhile, only a failure of the session is logged.
        """
        try:
            wide = self._session.with_threads(threads, self._closing)
            faster = self._is_faster(wide)
        except SessionError as error:  # the session with one thread goes on
            if not self._closing.cancelled:
                log.warning("%s; single texts run on one core", error)
            return
        except Exception:  # ONNX Runtime's exceptions share no base class of their own
            log.exception("%s fails on %d threads; single texts run on one core", self._session.path, threads)
            return
        if faster or (self._session.max_runs is not None and not self._closing.cancelled):
            self._wide_is_faster, self._wide = faster, wide
        elif not self._closing.cancelled:
            log.info("%s is no faster on %d threads", self._session.path, threads)
        del wide
        # Loading needed twice the memory of the weights for a moment, and a session that is not kept is freed.
        return_memory()

    def _is_faster(self, wide: Session) -> bool:
        """Return whether the session `wide` runs a short text faster than the session with one thread.

        The two sessions take turns, so that other work on the host slows both. The fastest run of each session counts.
        If the encoder is closed meanwhile, the result is False.
        """
        probe = [np.full(_PROBE_TOKENS, self.pad_token_id, dtype=np.int64)]
        times = []
        for _ in range(_PROBES):
            if self._closing.cancelled:
                return False
            times.append((self._seconds(wide, probe), self._seconds(self._session, probe)))
        return min(ours for ours, _ in times) < min(theirs for _, theirs in times)

    def _seconds(self, session: Session, batch: Sequence[TokenIds]) -> float:
        start = perf_counter()
        self._run_on(session, batch)
        return perf_counter() - start


class Encoders:
    """The encoders in use, by fingerprint, length limit and runtime: for each, the encoder loaded last. Thread-safe.

    An encoder is in use as long as any object refers to it. This object does not count: an encoder that nothing else
    refers to is removed and freed.
    """

    def __init__(self) -> None:
        self._known: WeakValueDictionary[tuple[str, int, Runtime], Encoder] = WeakValueDictionary()
        self._lock = threading.Lock()

    @property
    def is_empty(self) -> bool:
        """Whether no encoder of this object is in use."""
        return not self._known

    def get(
        self, fingerprint: str, max_tokens: int, runtime: Runtime, load: Callable[[], Encoder], *, fresh: bool = False
    ) -> Encoder:
        """Return the encoder in use with a fingerprint, a length limit and a runtime, or load it.

        While an encoder is loaded, other calls of this method wait.

        Args:
            fingerprint: fingerprint of the models that share the encoder.
            max_tokens: length limit of texts, in tokens. With another limit a long text has another vector.
            runtime: the engine that runs the encoder, and its precision.
            load: loads the encoder; its errors pass through.
            fresh: whether to load an encoder even if one is in use. Later calls get the encoder loaded last.
        """
        with self._lock:
            key = (fingerprint, max_tokens, runtime)
            encoder = None if fresh else self._known.get(key)
            if encoder is None:
                encoder = self._known[key] = load()
            return encoder
