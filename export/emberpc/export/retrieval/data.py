"""Queries and the passages that answer them: from files, and split by query."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from emberpc.export.datasets import label_of, read_rows, report_alike, text_of
from emberpc.export.errors import ExportError
from emberpc.export.examples import evenly

#: Share of the queries, and the most of them, held out where no validation file is given.
_HELD_OUT = 0.2
_MOST_HELD_OUT = 500
_FEWEST_QUERIES = 10

_PAIR = {"query", "passage"}
_FORMS = "query, passage and perhaps negative; or text, label"


@dataclass(frozen=True)
class Files:
    """Where the data is, as CSV, TSV, JSONL or Parquet.

    `train` has pairs (columns query, passage), triplets (a column negative,
    too) or labelled texts (text, label), of which those of a label answer each
    other. `validation` and `test` are of the same form; `corpus` (text, and
    perhaps title) has more passages to search among and to mine from.
    """

    train: Path | str
    validation: Path | str | None = None
    test: Path | str | None = None
    corpus: Path | str | None = None


@dataclass(frozen=True)
class Queries:
    """Queries, and by the indexes of passages what is known to answer each, and what is known not to.

    Passages neither here nor there may do either. `own` is the passage that is
    the query itself, which is not looked for: -1 unless texts have labels.
    """

    texts: tuple[str, ...]
    relevant: tuple[frozenset[int], ...]
    negatives: tuple[frozenset[int], ...]
    own: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Iterable[int]) -> Queries:
        """Return some of the queries."""
        rows = list(rows)
        return Queries(
            tuple(self.texts[row] for row in rows),
            tuple(self.relevant[row] for row in rows),
            tuple(self.negatives[row] for row in rows),
            tuple(self.own[row] for row in rows),
        )


@dataclass(frozen=True)
class Data:
    """All passages, each text once, and the queries to learn from, to choose by and to measure on, in this order."""

    passages: tuple[str, ...]
    train: Queries
    held_out: Queries
    test: Queries | None
    #: Indexes, ascending, of the passages that hard negatives may be: those of the queries to learn from and of the
    #: corpus. Others are held out, and may answer a query that does not know of it: texts of its own label.
    minable: tuple[int, ...]


@dataclass(frozen=True)
class Judged:
    """Queries, and the passages that are searched for what answers them."""

    passages: tuple[str, ...]
    queries: Queries

    def few(self, most_queries: int, most_passages: int) -> Judged:
        """Return so many of the queries at most, evenly taken, among so many passages: those that answer them first.

        A query none of whose answers finds room is left out.
        """
        rows = evenly(len(self.queries), most_queries)
        taken = self.queries.take(rows)
        answers = [sorted(known) for known in taken.relevant]
        # A first answer for every query, then a second one: labelled texts have many.
        by_turn = [known[turn] for turn in range(max(map(len, answers))) for known in answers if len(known) > turn]
        chosen = list(dict.fromkeys(by_turn))[:most_passages]
        others = np.setdiff1d(np.arange(len(self.passages)), chosen)
        chosen += others[evenly(len(others), most_passages - len(chosen))].tolist()
        place = {passage: i for i, passage in enumerate(chosen)}

        def moved(known: frozenset[int]) -> frozenset[int]:
            return frozenset(place[i] for i in known if i in place)

        queries = Queries(
            taken.texts,
            tuple(moved(known) for known in taken.relevant),
            tuple(moved(known) for known in taken.negatives),
            tuple(place.get(own, -1) for own in taken.own),
        )
        answered = (row for row in range(len(queries)) if queries.relevant[row])
        return Judged(tuple(self.passages[i] for i in chosen), queries.take(answered))


def read_judged(path: Path | str, corpus: Path | str | None = None) -> Judged:
    """Read a file of pairs, triplets or labelled texts, as those of `Files`, to measure with.

    Args:
        path: the file.
        corpus: more passages to search among.

    Raises:
        ExportError: a file cannot be read, or contradicts itself; row and remedy are named.
    """
    passages: dict[str, int] = {}
    read = _read(Path(path), passages, defaultdict(set))
    _add_corpus(corpus, passages)
    return Judged(tuple(passages), read.queries())


def has_queries(path: Path | str) -> bool:
    """Return whether a file is of pairs or triplets.

    Raises:
        ExportError: it cannot be read.
    """
    return read_rows(Path(path))[0][1].keys() >= _PAIR


def read_data(files: Files, seed: int) -> Data:
    """Read the files; without a validation file a fifth of the queries is held out, 500 at most.

    No query is in two of them. Of labelled texts, none that is
    held out is an answer in `train` either: it would be drawn to its label.

    Raises:
        ExportError: a file cannot be read, the data contradicts itself, or there are too few queries; row and remedy
            are named.
    """
    passages: dict[str, int] = {}
    members: dict[str, set[int]] = defaultdict(set)
    train = _read(Path(files.train), passages, members)
    # Before the other files are read, of which nothing is to be learnt.
    known = train.queries()
    validation, test = (
        None if path is None else _read(Path(path), passages, members) for path in (files.validation, files.test)
    )
    for one, other in ((validation, train), (test, train), (test, validation)):
        if one is not None and other is not None:
            _require_apart(one, other)
    corpus = _add_corpus(files.corpus, passages)
    tested = test.queries() if test is not None else None
    if validation is not None:
        return Data(tuple(passages), known, validation.queries(), tested, _minable(known, corpus))
    learnt, held_out = _split(known, Path(files.train), seed)
    return Data(tuple(passages), learnt, held_out, tested, _minable(learnt, corpus))


def _add_corpus(path: Path | str | None, passages: dict[str, int]) -> set[int]:
    """Add a corpus to the passages known, and return its indexes there."""
    if path is None:
        return set()
    return {_index(passages, _passage(Path(path), place, row)) for place, row in read_rows(Path(path))}


def _minable(learnt: Queries, corpus: set[int]) -> tuple[int, ...]:
    found = corpus.union(*learnt.relevant, *learnt.negatives, learnt.own) - {-1}
    return tuple(sorted(found))


@dataclass(frozen=True)
class _Read:
    """A file's queries, where each stands there first, and what gives them what answers them by all read so far."""

    path: Path
    places: dict[str, str]
    queries: Callable[[], Queries]


def _read(path: Path, passages: dict[str, int], members: dict[str, set[int]]) -> _Read:
    """Read a file of one of the forms, and add its passages and the members of its labels to those known."""
    rows = read_rows(path)
    columns = rows[0][1]
    if columns.keys() >= _PAIR:
        return _read_pairs(path, rows, passages)
    if "text" in columns and "label" in columns:
        return _read_labelled(path, rows, passages, members)
    raise ExportError(f"{path}, {rows[0][0]}: the columns are {', '.join(columns)}; they must be {_FORMS}")


def _read_pairs(path: Path, rows: Sequence[tuple[str, dict[str, Any]]], passages: dict[str, int]) -> _Read:
    """Read pairs or triplets; rows of one query come together."""
    triplets = "negative" in rows[0][1]
    places: dict[str, str] = {}
    relevant: dict[str, set[int]] = defaultdict(set)
    negatives: dict[str, dict[int, str]] = defaultdict(dict)
    for place, row in rows:
        query, passage = text_of(path, place, row, "query"), text_of(path, place, row, "passage")
        if query == passage:
            raise ExportError(f"{path}, {place}: query and passage are the same text; remove the row")
        places.setdefault(query, place)
        relevant[query].add(_index(passages, passage))
        if triplets:
            negatives[query].setdefault(_index(passages, text_of(path, place, row, "negative")), place)
    for query, stated in negatives.items():
        if both := relevant[query] & stated.keys():
            raise ExportError(
                f"{path}, {stated[min(both)]}: the negative is a passage of the same query elsewhere "
                f"({places[query]} or later); correct one of them"
            )
    queries = Queries(
        tuple(places),
        tuple(frozenset(relevant[query]) for query in places),
        tuple(frozenset(negatives[query]) for query in places),
        tuple(-1 for _ in places),
    )
    return _Read(path, places, lambda: queries)


def _read_labelled(
    path: Path, rows: Sequence[tuple[str, dict[str, Any]]], passages: dict[str, int], members: dict[str, set[int]]
) -> _Read:
    """Read texts with labels; each is a query, and the others of its label answer it, of whichever file."""
    places: dict[str, str] = {}
    labels: dict[str, set[str]] = defaultdict(set)
    for place, row in rows:
        text, label = text_of(path, place, row, "text"), label_of(path, place, row, "label")
        places.setdefault(text, place)
        labels[text].add(label)
        members[label].add(_index(passages, text))
    report_alike(path, members)

    def queries() -> Queries:
        for text, place in places.items():
            if alone := [label for label in sorted(labels[text]) if len(members[label]) < 2]:
                raise ExportError(
                    f"{path}, {place}: no other text has the label {alone[0]!r}, so nothing belongs to this one; "
                    "give the label more texts or remove the row"
                )
        own = tuple(passages[text] for text in places)
        relevant = tuple(
            frozenset(i for label in labels[text] for i in members[label]) - {passages[text]} for text in places
        )
        return Queries(tuple(places), relevant, tuple(frozenset() for _ in places), own)

    return _Read(path, places, queries)


def _passage(path: Path, place: str, row: dict[str, Any]) -> str:
    """Return a passage of a corpus: its title, if it has one, and its text."""
    text = text_of(path, place, row, "text")
    title = row.get("title")
    return f"{title} {text}" if isinstance(title, str) and title.strip() else text


def _index(passages: dict[str, int], text: str) -> int:
    return passages.setdefault(text, len(passages))


def _require_apart(one: _Read, other: _Read) -> None:
    """Refuse a query that is in two files: what is learnt from or chosen by cannot be measured on."""
    both = [query for query in one.places if query in other.places]
    if both:
        raise ExportError(
            f"{one.path}, {one.places[both[0]]}: the query is in {other.path}, too ({other.places[both[0]]}); "
            f"both files have {len(both)} of them; remove them from one"
        )


def _split(queries: Queries, path: Path, seed: int) -> tuple[Queries, Queries]:
    """Hold some queries out, at random."""
    if len(queries) < _FEWEST_QUERIES:
        raise ExportError(
            f"{path} has {len(queries)} queries; give at least {_FEWEST_QUERIES}, or a validation file beside it"
        )
    order = np.random.default_rng(seed).permutation(len(queries))
    unseen = np.sort(order[: min(_MOST_HELD_OUT, max(1, round(_HELD_OUT * len(queries))))])
    learnt = queries.take(np.setdiff1d(order, unseen).tolist())
    hidden = frozenset(queries.own[row] for row in unseen) - {-1}
    relevant = tuple(known - hidden for known in learnt.relevant)
    learnt = Queries(learnt.texts, relevant, learnt.negatives, learnt.own)
    # A text whose fellows are all held out has nothing left to be drawn to.
    return learnt.take(row for row in range(len(learnt)) if relevant[row]), queries.take(unseen.tolist())
