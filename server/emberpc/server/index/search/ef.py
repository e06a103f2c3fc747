"""Choose `ef`, the number of candidates that a graph search keeps, or choose to compare every vector instead."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from emberpc.server.collections.types import Distance
from emberpc.server.index.graph.neighbours import Neighbours
from emberpc.server.index.search import recall
from emberpc.server.index.storage.store import Store

#: Recall, by the measurements of the graph, for which the default ef is chosen, if an ef up to `_MAX_EF` has this
#: recall. It is so high because queries of callers may be less like the records than the queries of the measurement.
_RECALL = 0.99
#: Limits of the default ef of a measured graph. The minimum is not smaller, since queries may be unlike the records. A
#: value above the greatest is used only if it is needed for `_MIN_RECALL`, or for twice top_k. The greatest is also
#: the default ef if the measurement has no points, and the ef for a `min_recall` below 1 if the graph is empty.
_MIN_EF, _MAX_EF = 100, 800
#: Default ef before the graph's recall is measured, unless twice top_k is greater.
_UNMEASURED = 200
#: Recall for which the default ef may be greater than `_MAX_EF`. If no measured ef has this recall, there is no default
#: ef: a search without `ef` and `min_recall` compares every vector.
_MIN_RECALL = 0.95
#: Greatest share of strays with which a graph of at least `recall.MIN_SIZE` vectors is searched before its recall is
#: measured. With more, a search without `ef` and `min_recall` compares every vector: searches of a graph with many
#: strays probably miss further vectors, which are not known as strays yet.
_MAX_STRAY_SHARE = 0.02
#: The default ef is at least this many times top_k.
_PER_HIT = 2


class EfChooser:
    """Chooses `ef` for the searches of a collection by measurements of its graph.

    Args:
        folder: the folder of the collection, where `measure` saves measurements. The constructor loads them.
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
            top_k: the greatest top_k of the queries.
            ef: the ef that the caller set; 0: choose one.
            min_recall: share of the true nearest records to find, in (0, 1]; 0: no target. Read only if `ef` is 0.

        Returns:
            `ef` if it is not 0; it may be less than `top_k`. Without a target, the default ef; None if the graph is not
            measured and has too many strays (`_is_poor`), or its measurement has points, but no ef for a recall of
            0.95. With a target of 1, None. With a lower target, 800 if the graph is empty; else the ef that
            `RecallMap.ef` returns for the target, or None if the graph is not measured.
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
            return _MAX_EF  # the buffer is exact; this is for a graph that may be started at this moment
        return self._measured.ef(top_k, min_recall) if self._measured else None

    @property
    def due(self) -> bool:
        """Whether the graph must be measured now.

        That is so if the graph has at least `recall.MIN_SIZE` vectors, and either has no measurement or has grown by
        half since its measurement.
        """
        size = self._neighbours.graph_size
        return size >= recall.MIN_SIZE and (self._measured is None or self._measured.outgrown(size))

    def forget(self) -> None:
        """Discard the measurements in memory, since the graph was rebuilt.

        The measurements in the folder stay until `measure` replaces them; an opening before that loads them again.
        """
        self._set(None)

    def measure(self, store: Store, distance: Distance, stop: Callable[[], bool]) -> None:
        """Measure the recall of the graph, use the result from now on, and save it in the collection's folder.

        Nothing changes if the measurement is stopped or the graph fails. An error of saving is only logged.

        Args:
            store: the records of the collection.
            distance: the distance of the collection.
            stop: whether to stop; called before each batch of vectors or queries.

        Raises:
            ServiceError: the errors of reading the store.
        """
        measured = recall.measure(store, self._neighbours, distance, stop)
        if measured:
            self._set(measured)
            recall.save(measured, self._folder)

    def _set(self, measured: recall.RecallMap | None) -> None:
        self._measured = measured
        # Replaced after `_measured` is set. A thread that still computes a default ef from the old measurements stores
        # this ef in the old dict, so the new dict never has it.
        self._by_default = {}

    def _default(self, top_k: int) -> int | None:
        minimum = max(_MIN_EF if self._measured else _UNMEASURED, _PER_HIT * top_k)
        if not self._measured:
            return minimum
        if not self._measured.points:
            return max(minimum, _MAX_EF)
        chosen = self._measured.ef(top_k, _RECALL)
        if chosen is None or chosen > _MAX_EF:
            enough = self._measured.ef(top_k, _MIN_RECALL)
            if enough is None:
                return None
            chosen = max(_MAX_EF, enough)
        return max(minimum, chosen)

    def _is_poor(self) -> bool:
        """Return whether the graph is large enough to be measured, and its `stray_share` exceeds `_MAX_STRAY_SHARE`."""
        return self._neighbours.graph_size >= recall.MIN_SIZE and self._neighbours.stray_share > _MAX_STRAY_SHARE
