"""How many candidates a search of the graph keeps: as told, by a recall that is wanted, or by default."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from emberpc.server.collections.types import Distance
from emberpc.server.index.graph.neighbours import Neighbours
from emberpc.server.index.search import recall
from emberpc.server.index.storage.store import Store

#: By default: what finds so much of the true nearest, as measured of the collection, within these bounds. More than
#: the 0.98 that is promised, and never the fewest candidates: queries need not be like the records.
_RECALL = 0.99
_LEAST, _MOST = 100, 800
#: Before it is measured.
_UNMEASURED = 200
#: If no number of candidates within the bounds finds this share, more are kept, and where none finds it every vector is
#: compared.
_LEAST_RECALL = 0.95
#: Before it is measured, every vector is compared if a greater share of the graph's is not found by their own vectors:
#: others are missed for the same cause, and a better graph is being built.
_MAX_STRAY_SHARE = 0.02
#: Whatever was measured, so many times the hits that are wanted.
_PER_HIT = 2


class EfChooser:
    """Chooses `ef` for the searches of a collection, by what was measured of its graph.

    Args:
        folder: the collection's, where that is kept.
        neighbours: its vectors in memory.
    """

    def __init__(self, folder: Path, neighbours: Neighbours) -> None:
        self._folder = folder
        self._neighbours = neighbours
        self._measured = recall.load(folder)
        #: Of what was measured, by `top_k`; replaced whenever that is.
        self._by_default: dict[int, int | None] = {}

    def ef(self, top_k: int, ef: int, min_recall: float) -> int | None:
        """Return how many candidates to keep; None if every vector is to be compared.

        Args:
            top_k: hits wanted.
            ef: what the caller says; 0: nothing.
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
            return _MOST  # the buffer is exact; this is for the graph that may begin in this moment
        return self._measured.ef(top_k, min_recall) if self._measured else None

    @property
    def due(self) -> bool:
        """Whether the graph is new, or so much larger than when it was measured that it is another one."""
        size = self._neighbours.graph_size
        return size >= recall.MIN_SIZE and (self._measured is None or self._measured.outgrown(size))

    def forget(self) -> None:
        """Forget what was measured: the graph is another one."""
        self._set(None)

    def measure(self, store: Store, distance: Distance, stop: Callable[[], bool]) -> None:
        """Measure the graph, and keep what was found, unless told to stop."""
        measured = recall.measure(store, self._neighbours, distance, stop)
        if measured:
            self._set(measured)
            recall.save(measured, self._folder)

    def _set(self, measured: recall.RecallMap | None) -> None:
        self._measured = measured
        # After what it follows from: who still computes by the old one keeps it where nobody looks any more.
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
        """Whether many vectors of a graph that is to be measured are not found by their own vectors."""
        return self._neighbours.graph_size >= recall.MIN_SIZE and self._neighbours.stray_share > _MAX_STRAY_SHARE
