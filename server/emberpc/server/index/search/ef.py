"""Choice of `ef`, the number of candidates that a graph search keeps: by the caller, by min_recall, or by default."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from emberpc.server.collections.types import Distance
from emberpc.server.index.graph.neighbours import Neighbours
from emberpc.server.index.search import recall
from emberpc.server.index.storage.store import Store

#: The default ef is the one that finds this share of the true nearest, as measured on the collection, within the limits
#: below. The share is above the promised 0.98, and ef is never very small, because queries may be unlike the records.
_RECALL = 0.99
_LEAST, _MOST = 100, 800
#: Default ef before the graph is measured.
_UNMEASURED = 200
#: If no ef within the limits finds this share, a greater one is used; if none finds it, every vector is compared.
_LEAST_RECALL = 0.95
#: Before the graph is measured, every vector is compared if the graph has more than this share of strays: the cause of
#: strays makes searches miss other vectors too, and a better graph is being built.
_MAX_STRAY_SHARE = 0.02
#: The default ef is at least this many times top_k.
_PER_HIT = 2


class EfChooser:
    """Chooses `ef` for the searches of a collection by measurements of its graph.

    Args:
        folder: the folder of the collection, which holds the measurements.
        neighbours: its vectors in memory.
    """

    def __init__(self, folder: Path, neighbours: Neighbours) -> None:
        self._folder = folder
        self._neighbours = neighbours
        self._measured = recall.load(folder)
        #: Default ef by `top_k`; reset at each measurement.
        self._by_default: dict[int, int | None] = {}

    def ef(self, top_k: int, ef: int, min_recall: float) -> int | None:
        """Return the ef of a search; None if every vector must be compared.

        Args:
            top_k: hits per query.
            ef: the caller's ef; 0: none.
            min_recall: share of the true nearest to be found; 0: no target.
        """
        if ef:
            return ef
        if not min_recall:
            if not self._measured and self._is_poor():
                return None
            by_default = self._by_default
            if top_k not in by_default:
                by_default[top_k] = self._default(top_k)
            return by_default[top_k]
        if min_recall == 1:
            return None
        if not self._neighbours.graph_size:
            return _MOST  # the buffer is exact; this is for a graph that may be started at this moment
        return self._measured.ef(top_k, min_recall) if self._measured else None

    @property
    def due(self) -> bool:
        """Whether the graph was never measured, or has grown by half since."""
        size = self._neighbours.graph_size
        return size >= recall.MIN_SIZE and (self._measured is None or self._measured.outgrown(size))

    def forget(self) -> None:
        """Forget the measurements, since the graph was rebuilt."""
        self._set(None)

    def measure(self, store: Store, distance: Distance, stop: Callable[[], bool]) -> None:
        """Measure the graph and save the result, unless stopped."""
        measured = recall.measure(store, self._neighbours, distance, stop)
        if measured:
            self._set(measured)
            recall.save(measured, self._folder)

    def _set(self, measured: recall.RecallMap | None) -> None:
        self._measured = measured
        # Reset after `_measured` is set: a thread that still computes from old values stores them in the old dict.
        self._by_default = {}

    def _default(self, top_k: int) -> int | None:
        least = max(_LEAST if self._measured else _UNMEASURED, _PER_HIT * top_k)
        if not self._measured:
            return least
        if not self._measured.points:
            return max(least, _MOST)
        chosen = self._measured.ef(top_k, _RECALL)
        if chosen is None or chosen > _MOST:
            enough = self._measured.ef(top_k, _LEAST_RECALL)
            if enough is None:
                return None
            chosen = max(_MOST, enough)
        return max(least, chosen)

    def _is_poor(self) -> bool:
        """Return whether a graph that must be measured has many strays."""
        return self._neighbours.graph_size >= recall.MIN_SIZE and self._neighbours.stray_share > _MAX_STRAY_SHARE
