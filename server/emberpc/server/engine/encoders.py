"""What turns token ids into vectors or logits; one serves all models that are the same but for their heads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from weakref import WeakValueDictionary

from emberpc.bundle import Interface
from emberpc.server.engine.session import OnnxSession, Output
from emberpc.server.engine.tokenizing import TokenIds


@dataclass(eq=False)
class Encoder:
    """An ONNX model and how to call it."""

    session: OnnxSession
    interface: Interface
    pad_token_id: int
    #: Of this loading: what a cache kept of one before it is not of this one.
    number: int = field(default_factory=count().__next__)

    def run(self, batch: Sequence[TokenIds]) -> Output:
        """Run texts' token ids as one batch; float32 (texts, width)."""
        return self.session.run(batch, self.interface, self.pad_token_id)


class Encoders:
    """The encoders in use, by what tells one from another. Thread-safe."""

    def __init__(self) -> None:
        self._known: WeakValueDictionary[tuple[str, int], Encoder] = WeakValueDictionary()
        self._lock = threading.Lock()

    def get(self, fingerprint: str, max_tokens: int, load: Callable[[], Encoder]) -> Encoder:
        """Return an encoder that is in use, or load it.

        Args:
            fingerprint: of the models that it serves.
            max_tokens: where their texts are cut; other cuts are other vectors.
            load: loads it.
        """
        with self._lock:
            key = (fingerprint, max_tokens)
            encoder = self._known.get(key)
            if encoder is None:
                encoder = self._known[key] = load()
            return encoder
