"""What turns token ids into vectors or logits; one serves all models that are the same but for their heads."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from itertools import count
from weakref import WeakValueDictionary

from emberpc.bundle import Interface
from emberpc.server.engine.session import OnnxSession, Output, SessionError
from emberpc.server.engine.tokenizing import TokenIds

log = logging.getLogger(__name__)

#: A text of so many tokens is worth a session with several threads. Where there is one, shorter texts gain from it too:
#: on two cores MiniLM takes 16.2 and 10.7 ms for 128 tokens, 2.8 and 2.2 ms for 8.
_LONG = 128
_numbers = count()


class Encoder:
    """An ONNX model and how to call it.

    Args:
        session: the model, one thread for a run.
        interface: how to call it.
        pad_token_id: what fills up the shorter texts of a batch.
    """

    def __init__(self, session: OnnxSession, interface: Interface, pad_token_id: int) -> None:
        self.interface = interface
        #: Of this loading: what a cache kept of one before it is not of this one.
        self.number = next(_numbers)
        self._session = session
        self._pad_token_id = pad_token_id
        self._wide: OnnxSession | None = None
        self._widening = threading.Lock()

    @property
    def wide(self) -> bool:
        """Whether there is a session with several threads."""
        return self._wide is not None

    def run(self, batch: Sequence[TokenIds], threads: int = 1) -> Output:
        """Run texts' token ids as one batch; float32 (texts, width).

        Args:
            batch: the texts.
            threads: that are free for it. More than one need a session of their own, which takes the model's memory
                once more: it is made beside the first run of a long text that could use it.
        """
        session = self._session
        if threads > 1:
            session = self._wide or (self._widen(threads) if len(batch[0]) >= _LONG else session)
        return session.run(batch, self.interface, self._pad_token_id)

    def _widen(self, threads: int) -> OnnxSession:
        """Have a session with several threads made, and return the other one meanwhile."""
        if self._widening.acquire(blocking=False):  # once; never released
            threading.Thread(target=self._make_wide, args=(threads,), name="widen", daemon=True).start()
        return self._session

    def _make_wide(self, threads: int) -> None:
        try:
            self._wide = OnnxSession(self._session.path, threads)
        except SessionError:  # the file was removed meanwhile: one thread does it, too
            log.warning("%s cannot be loaded again; long texts run on one core", self._session.path)


class Encoders:
    """The encoders in use, by what tells one from another. Thread-safe."""

    def __init__(self) -> None:
        self._known: WeakValueDictionary[tuple[str, int], Encoder] = WeakValueDictionary()
        self._lock = threading.Lock()

    def get(self, fingerprint: str, max_tokens: int, load: Callable[[], Encoder], *, fresh: bool = False) -> Encoder:
        """Return an encoder that is in use, or load it.

        Args:
            fingerprint: of the models that it serves.
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
