"""Verify a collection: its database, records, counters and word index, its vectors in memory, and searches."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from emberpc.server.collections.metric import check_vectors, nearest, prepare
from emberpc.server.collections.types import CollectionSpec, Labels, Matrix, Problem, Verified
from emberpc.server.errors import Code, ServiceError, items_of
from emberpc.server.index.graph.neighbours import Candidates, Neighbours
from emberpc.server.index.storage import counters
from emberpc.server.index.storage.lexical_terms import search_text
from emberpc.server.index.storage.rows import Row
from emberpc.server.index.storage.store import Store

_BATCH = 500
#: For each attempt to find records by their own vectors: `ef`, and the number of records that one call searches for
#: while other searches may wait. The second attempt is for records that the first misses. Its `ef` is the usual upper
#: limit of the default ef.
_TRIES = ((200, 8), (800, 1))
#: Number of records, on average, that a verification searches for unless it is full; all if there are fewer.
_SAMPLE = 2000
#: Maximum number of hits of a search for a record; fewer if the graph has fewer than 20 labels.
_HITS = 10
_WRONG_WORDS = "the words that are searched were not those of the text; they were built from the texts again"


@dataclass
class Verifier:
    """Checks a collection once, while reads and writes continue.

    The caller may replace `store` and `neighbours` between two steps, after the collection was closed and opened again.
    The check makes two repairs: a word index that does not match the texts is rebuilt, and vectors that searches miss
    become strays.

    Attributes:
        store: the records, from which memory can be rebuilt.
        neighbours: the vectors in memory, which searches use.
        write_lock: held by every write, from before it changes the store until it has changed memory.
        spec: the spec of the collection.
        full: whether to search for every undamaged record by its own vector; if not, for about 2,000 random ones.
    """

    store: Store
    neighbours: Neighbours
    write_lock: threading.Lock
    spec: CollectionSpec
    full: bool = False
    _found_damaged: bool = False
    _found_wrong_words: bool = False
    _newest_label: int = 0
    _newest_revision: int = 0

    def steps(self) -> Iterator[Verified]:
        """Check the collection; yield after each step the numbers of checked and of all records, and its new problems.

        The first step is SQLite's integrity check. Then each step checks at most 500 records. The last three steps
        check the counters, the word index, and whether memory has vectors of no record; the last has `done` set.

        Raises:
            ServiceError: DEADLINE_EXCEEDED if the call of this thread is cancelled; the errors of reading the store.
        """
        # The records are read from SQLite's smallest integer on, since a damaged label may be any integer.
        total, checked, first = self.store.count(), 0, -(2**63)
        share = 1.0 if self.full else _SAMPLE / max(1, total)
        yield Verified(0, total, [Problem("", "DATABASE_DAMAGED", each) for each in self.store.integrity_errors()])
        while first < 2**63 and (rows := self.store.rows(first, _BATCH)):
            first, checked = rows[-1].label + 1, checked + len(rows)
            yield Verified(checked, max(total, checked), self._batch(rows, share))
        yield Verified(checked, checked, self._counters())
        yield Verified(checked, checked, self._words())
        yield Verified(checked, checked, self._unknown_vectors(), done=True)

    def _batch(self, rows: Sequence[Row], share: float) -> list[Problem]:
        """Return the problems of some records, and note what `_counters` and `_words` need.

        Problems are damage, wrong search words, differences between store and memory, and missed searches. A damaged
        record is not checked further.

        Args:
            rows: the records, damaged or not.
            share: probability with which each record is searched for; 1 or more: always.
        """
        problems = []
        whole: list[tuple[Row, Matrix]] = []
        for row in rows:
            try:
                whole.append((row, self._decoded(row)))
            except ServiceError as error:
                self._found_damaged = True
                problems.append(Problem(row.name, "RECORD_DAMAGED", f"record {row.name!r}: {error.message}"))
                continue
            self._newest_label = max(self._newest_label, row.label)
            self._newest_revision = max(self._newest_revision, row.revision)
            if row.search_text != search_text(row.text):
                self._found_wrong_words = True
                problems.append(Problem(row.id, "WORDS_DAMAGED", f"record {row.id!r}: {_WRONG_WORDS}"))
        if whole:
            labels = np.array([row.label for row, _ in whole], dtype=np.int64)
            vectors = prepare(np.vstack([vector for _, vector in whole]), self.spec.distance)
            problems += self._check_memory([row for row, _ in whole], labels, vectors, share)
        return problems

    def _counters(self) -> list[Problem]:
        """Return a problem if a counter is missing, out of range, or less than the greatest label or revision.

        These are of the undamaged records, so call this after all records are checked.
        """
        found = self.store.counter_problem(self._newest_label, self._newest_revision)
        message = counters.damaged(f"collection {self.spec.name!r}", found).message
        return [Problem("", "DATABASE_DAMAGED", message)] if found else []

    def _decoded(self, row: Row) -> Matrix:
        """Check a stored record; return its vector as stored, not prepared: float32 (1, dimensions).

        Raises:
            ServiceError: the record is damaged; the message says in what way.
        """
        try:
            metadata = json.loads(row.metadata)
        except (ValueError, TypeError, RecursionError):
            metadata = None
        if not isinstance(metadata, dict):
            raise ServiceError(Code.INTERNAL, "its metadata is no JSON object; upsert it again")
        if not row.is_intact:
            raise ServiceError(Code.INTERNAL, "it is not as it was written; delete it or upsert it again")
        size = 4 * self.spec.dimensions
        if len(row.vector) != size:
            message = f"its vector has {len(row.vector)} bytes, not {size}; upsert it again"
            raise ServiceError(Code.INTERNAL, message)
        vector: Matrix = np.frombuffer(row.vector, dtype="<f4")[None]
        check_vectors(vector, self.spec.dimensions, self.spec.distance, items_of("vector"))
        return vector

    def _check_memory(self, rows: Sequence[Row], labels: Labels, vectors: Matrix, share: float) -> list[Problem]:
        """Return a problem for each record whose vector in memory is missing or not equal, or that searches miss.

        A record that a write deleted or replaced meanwhile is no problem.

        Args:
            rows: the records, undamaged.
            labels: label of each record, int64 (n,).
            vectors: prepared stored vector of each record, float32 (n, dimensions).
            share: probability with which each record is searched for; 1 or more: always.
        """
        held = self.neighbours.held(labels.tolist())
        problems, there = [], []
        for i, row in enumerate(rows):
            vector = held.get(row.label)
            if vector is None:
                if self._missing(row.label):
                    message = f"record {row.id!r} is not in memory, so no search finds it; restart the server"
                    problems.append(Problem(row.id, "NOT_IN_MEMORY", message))
            elif not np.array_equal(vector, vectors[i]):
                message = f"the stored vector of record {row.id!r} is not the one that is searched; upsert it again"
                problems.append(Problem(row.id, "VECTOR_DIFFERS", message))
            elif random.random() < share:  # noqa: S311 - a sample, no secret
                there.append(i)
        if there:
            problems += self._unreachable([rows[i] for i in there], labels[there], vectors[there])
        return problems

    def _unreachable(self, rows: Sequence[Row], labels: Labels, vectors: Matrix) -> list[Problem]:
        """Search for each record by its own vector; return a problem for each that both attempts of `_TRIES` miss.

        The vectors of missed records become strays, which every search covers. If the graph cannot answer, or the
        record was deleted meanwhile, the record is not missed. Arguments as for `_check_memory`.
        """
        suspects = list(range(len(rows)))
        for ef, turn in _TRIES:
            # The graph answers only for fewer hits than half of its labels. With one or two labels it does not answer,
            # and searches do not use it either.
            k = min(_HITS, max(1, (self.neighbours.graph_size - 1) // 2))
            found: list[Candidates | None] = []
            for start in range(0, len(suspects), turn):
                found += self.neighbours.search(vectors[suspects[start : start + turn]], k, ef)
            suspects = [
                i
                for i, each in zip(suspects, found, strict=True)
                if each and self._missed(each, int(labels[i]), vectors[i])
            ]
            if not suspects:
                return []
        missed = [i for i in suspects if self.neighbours.held([int(labels[i])])]
        self.neighbours.compare_always([int(labels[i]) for i in missed])
        return [
            Problem(
                rows[i].id,
                "UNREACHABLE",
                f"no link of the graph led to record {rows[i].id!r}, so searches missed it; they find it from now on, "
                "and it need not be upserted again",
            )
            for i in missed
        ]

    def _missed(self, found: Candidates, label: int, vector: Matrix) -> bool:
        """Return whether a search for a record's vector found a record farther away than it, but not the record itself.

        `vector` is the prepared vector, float32 (dimensions,).
        """
        if label in found.labels or not found.scores:
            return False
        (own,) = nearest(vector[None], vector[None], 1, self.spec.distance)[1][0]
        return bool(min(found.scores) < own - 1e-5 * max(abs(own), *map(abs, found.scores)))

    def _missing(self, label: int) -> bool:
        """Return whether a record is in the store, undamaged, but not in memory; takes the write lock meanwhile."""
        with self.write_lock:
            return bool(len(self.store.vectors([label])[0])) and not self.neighbours.held([label])

    def _words(self) -> list[Problem]:
        """Rebuild the word index if it is suspected, a record had wrong search words, or it differs from the texts.

        Returns:
            A problem if the index cannot be rebuilt. Else a problem if the index differs from the texts, unless a
            suspicion, or wrong words or damage of a record, explain that. Else no problem.
        """
        suspect = self.store.words_suspect
        if not suspect and not self._found_wrong_words and self.store.words_are_intact():
            return []
        try:
            with self.write_lock:
                self.store.build_words()
        except ServiceError as error:
            message = f"the word index does not match the texts, and it cannot be built again: {error.message}"
            return [Problem("", "WORDS_DAMAGED", message)]
        # No problem if the index was suspected, since maintenance would have rebuilt it, or if wrong words or damage of
        # a record was reported: the index may still have the words that the text had before its damage.
        if suspect or self._found_wrong_words or self._found_damaged:
            return []
        return [Problem("", "WORDS_DAMAGED", f"the word index: {_WRONG_WORDS}")]

    def _unknown_vectors(self) -> list[Problem]:
        """Return a problem if memory has vectors of no record, also when compared a second time with writes blocked."""
        suspects = self.neighbours.labels() - set(self.store.labels().tolist())
        if suspects:
            with self.write_lock:
                suspects = self.neighbours.labels() - set(self.store.labels().tolist())
        if not suspects:
            return []
        message = f"memory has {len(suspects)} vectors that belong to no record; restart the server"
        return [Problem("", "UNKNOWN_VECTORS", message)]
