"""Choose `ef`, the number of candidates that a graph search keeps: the caller's, one for min_recall, or a default."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from emberpc.server.collections.types import Distance
from emberpc.server.index.graph.neighbours import Neighbours
from emberpc.server.index.search import recall
from emberpc.server.index.storage.store import Store

#: Recall that the default ef must have, as measured on the collection. The documents promise 0.98. The reserve is for
#: queries that are less like the records than the queries of the measurement.
_RECALL = 0.99
#: Limits of the default ef. The least is not smaller, since queries may be unlike the records. A value above the
#: greatest is used only if it is needed for `_LEAST_RECALL`, or for twice top_k. The greatest is also the default ef if
#: the measurement has no points.
_LEAST, _MOST = 100, 800
#: Least default ef before the graph's recall is measured.
_UNMEASURED = 200
#: Recall for which the default ef may be greater than `_MOST`. If no measured ef has this recall, every vector is
#: compared.
_LEAST_RECALL = 0.95
#: Greatest share of strays, vectors that graph searches miss, with which a graph is searched by the default ef before
#: its recall is measured. With more, every vector is compared: what causes strays makes searches miss other vectors
#: too, and a better graph is being built.
_MAX_STRAY_SHARE = 0.02
#: The default ef is at least this many times top_k.
_PER_HIT = 2


class EfChooser:
    """Chooses `ef` for the searches of a collection by measurements of its graph.

    Args:
        folder: the folder of the collection, where measurements are saved. Saved measurements are loaded here.
        neighbours: the vectors of the collection in memory.
    """

    def __init__(self, folder: Path, neighbours: Neighbours) -> None:
        self._folder = folder
        self._neighbours = neighbours
        self._measured = recall.load(folder)
        #: Cache of the default ef by `top_k`; None: every vector must be compared. A new dict replaces it when
        #: measurements are made or discarded (see `_set`).
        self._by_default: dict[int, int | None] = {}

    def ef(self, top_k: int, ef: int, min_recall: float) -> int | None:
        """Return the ef of a search; None if every vector must be compared instead of searching the graph.

        Args:
            top_k: hits to find for each query.
            ef: the ef that the caller set, which is returned; 0: choose one.
            min_recall: share of the true nearest records to find, in (0, 1]. 1, a share that no measured ef finds, or a
                graph without measurements gives None. An empty graph with a share below 1 gives 800. 0: no target, so
                that the default ef is returned; None if no measured ef finds 0.95, or if the graph is not measured and
                has too many strays (`_is_poor`).
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
        """Whether the graph must be measured: it is large enough, and has grown by half since the last measurement.

        `recall.MIN_SIZE` vectors are enough. A graph without a measurement must be measured.
        """
        size = self._neighbours.graph_size
        return size >= recall.MIN_SIZE and (self._measured is None or self._measured.outgrown(size))

    def forget(self) -> None:
        """Discard the measurements in memory, since the graph was rebuilt; those saved in the folder stay."""
        self._set(None)

    def measure(self, store: Store, distance: Distance, stop: Callable[[], bool]) -> None:
        """Measure the recall of the graph, use the result from now on, and save it in the collection's folder.

        Nothing changes if the measurement is stopped or the graph fails.

        Args:
            store: the records of the collection.
            distance: the distance of the collection.
            stop: whether to stop; called every few milliseconds.
        """
        measured = recall.measure(store, self._neighbours, distance, stop)
        if measured:
            self._set(measured)
            recall.save(measured, self._folder)

    def _set(self, measured: recall.RecallMap | None) -> None:
        self._measured = measured
        # Replaced after `_measured` is set. A thread that still computes a default ef from the old measurements stores
        # it in the old dict.
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
        """Return whether the graph is large enough to be measured and has more strays than `_MAX_STRAY_SHARE`."""
        return self._neighbours.graph_size >= recall.MIN_SIZE and self._neighbours.stray_share > _MAX_STRAY_SHARE
