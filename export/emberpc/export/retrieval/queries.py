"""Read queries and the passages that answer them from files, and hold out some of the queries."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from emberpc.export.data.datasets import label_of, read_rows, read_texts, report_alike, text_of
from emberpc.export.data.examples import evenly
from emberpc.export.errors import ExportError

#: Share of the training queries that are held out if there is no validation file.
_HELD_OUT = 0.2
#: Maximum number of training queries that are held out if there is no validation file.
_MAX_HELD_OUT = 500
#: Minimum number of training queries for holding out some of them; with fewer, a validation file is required.
_MIN_QUERIES = 10

_PAIR = {"query", "passage"}
_COLUMNS = "query, passage and optionally negative; or text, label"


@dataclass(frozen=True)
class Files:
    """Paths of the data files for a fine-tuning, as CSV, TSV, JSONL or Parquet.

    `train` has pairs (columns query, passage), triplets (also a column negative) or labelled texts (text, label). Texts
    with the same label count as answers to each other. `validation` and `test` have one of these three kinds, too; None
    as `validation`: some training queries are held out. `corpus` (text, and optionally title) has more passages, to
    search in and to mine negatives from.
    """

    train: Path | str
    validation: Path | str | None = None
    test: Path | str | None = None
    corpus: Path | str | None = None


@dataclass(frozen=True)
class Queries:
    """Queries with the indexes of the passages that are known to answer each (`relevant`) or not to (`negatives`).

    A passage in neither set may or may not answer the query. `texts` are without prompts. A labelled text is a query
    and a passage: `own` has the index of this passage, which a search for the query must leave out. The index is -1 if
    the query comes from pairs or triplets, or its passage is not among the passages.
    """

    texts: tuple[str, ...]
    relevant: tuple[frozenset[int], ...]
    negatives: tuple[frozenset[int], ...]
    own: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Iterable[int]) -> Queries:
        """Return the queries at the given indexes, in the order of the indexes."""
        rows = list(rows)
        return Queries(
            tuple(self.texts[row] for row in rows),
            tuple(self.relevant[row] for row in rows),
            tuple(self.negatives[row] for row in rows),
            tuple(self.own[row] for row in rows),
        )


@dataclass(frozen=True)
class RetrievalData:
    """Data for a fine-tuning: the distinct passages of all files, and queries to train on, to choose by and to test on.

    `held_out` are the queries that epochs and weights are chosen by. `test` is None if there is no test file.
    """

    passages: tuple[str, ...]
    train: Queries
    held_out: Queries
    test: Queries | None
    #: Ascending indexes of the passages that may become hard negatives: those of the training queries and of the
    #: corpus. Passages that only held-out or test queries have may not: a labelled text that is held out answers the
    #: training queries of its label, but is not among their relevant passages.
    minable: tuple[int, ...]


@dataclass(frozen=True)
class Judged:
    """Queries with their known answers, and the passages in which to search for the answers.

    The indexes in `queries` refer to `passages`.
    """

    passages: tuple[str, ...]
    queries: Queries

    def few(self, max_queries: int, max_passages: int) -> Judged:
        """Return a sample of the queries, and a sample of the passages to search.

        Queries are taken at equal distances. Passages are taken in this order: answers of these queries, then others at
        equal distances. Then queries without any answer among the passages taken are left out. The indexes in the
        result refer to its own passages.

        Args:
            max_queries: maximum number of queries to return, at least 1; there must be a query.
            max_passages: maximum number of passages to return.
        """
        rows = evenly(len(self.queries), max_queries)
        taken = self.queries.take(rows)
        answers = [sorted(known) for known in taken.relevant]
        # Take one answer of every query, then a second answer of every query and so on. Labelled texts may have so many
        # answers that those of the first queries alone would fill the sample.
        by_turn = [known[turn] for turn in range(max(map(len, answers))) for known in answers if len(known) > turn]
        chosen = list(dict.fromkeys(by_turn))[:max_passages]
        others = np.setdiff1d(np.arange(len(self.passages)), chosen)
        chosen += others[evenly(len(others), max_passages - len(chosen))].tolist()
        place = {passage: i for i, passage in enumerate(chosen)}

        def reindex(known: frozenset[int]) -> frozenset[int]:
            return frozenset(place[i] for i in known if i in place)

        queries = Queries(
            taken.texts,
            tuple(reindex(known) for known in taken.relevant),
            tuple(reindex(known) for known in taken.negatives),
            tuple(place.get(own, -1) for own in taken.own),
        )
        answered = (row for row in range(len(queries)) if queries.relevant[row])
        return Judged(tuple(self.passages[i] for i in chosen), queries.take(answered))


def read_judged(path: Path | str, corpus: Path | str | None = None) -> Judged:
    """Read queries and passages to measure retrieval with.

    Args:
        path: file of pairs (columns query, passage), triplets (also negative) or labelled texts (text, label).
        corpus: file with more passages to search in (columns text, and optionally title); None: no more.

    Raises:
        ExportError: a file cannot be read, lacks columns or contradicts itself, a cell is empty, or a label has a
            single text.
    """
    passages: dict[str, int] = {}
    read = _read(Path(path), passages, defaultdict(set))
    _add_corpus(corpus, passages)
    return Judged(tuple(passages), read.queries())


def _has_queries(path: Path | str) -> bool:
    """Return whether a file has pairs or triplets: whether its first row has the columns query and passage.

    Raises:
        ExportError: the file cannot be read, is malformed or has no rows.
    """
    return read_rows(Path(path))[0][1].keys() >= _PAIR


def read_validation(path: Path | str | None, corpus: Path | str | None) -> tuple[list[str], Judged | None]:
    """Read the data to measure variants on: texts, or queries with their passages.

    Returns:
        The texts and None; or an empty list, and the queries with the passages. Without a file, an empty list and None.

    Raises:
        ExportError: a file cannot be read or is invalid, or there is a corpus but no file with queries.
    """
    if path is not None and _has_queries(path):
        return [], read_judged(path, corpus)
    if corpus is not None:
        raise ExportError(
            f"{corpus} is a corpus to search, but there are no queries; give a validation file with the columns query "
            "and passage, or no corpus"
        )
    return (read_texts(path) if path is not None else []), None


def read_data(files: Files, seed: int) -> RetrievalData:
    """Read the data files. Without a validation file, a fifth of the training queries is held out, at most 500.

    A labelled text that is held out, or comes from the validation or test file, does not count as an answer of a
    training query, since the training would move the text's vector towards those of its label. A training query
    without any other answer is left out.

    Args:
        files: paths of the files.
        seed: seed of the draw of held-out queries.

    Raises:
        ExportError: a file cannot be read, lacks columns or contradicts itself, a cell is empty, a label has a single
            text, a query is in two files, or there are fewer than 10 training queries and no validation file.
    """
    passages: dict[str, int] = {}
    members: dict[str, set[int]] = defaultdict(set)
    train = _read(Path(files.train), passages, members)
    # Build the training queries before the validation and test files are read, which adds their texts to `members`:
    # these texts must not become answers of training queries.
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
        return RetrievalData(tuple(passages), known, validation.queries(), tested, _minable(known, corpus))
    learnt, held_out = _split(known, Path(files.train), seed)
    return RetrievalData(tuple(passages), learnt, held_out, tested, _minable(learnt, corpus))


def _add_corpus(path: Path | str | None, passages: dict[str, int]) -> set[int]:
    """Add the passages of a corpus to `passages`, which maps each passage to its index.

    Returns:
        The indexes of all passages of the corpus, those included that `passages` had before; empty without a corpus.

    Raises:
        ExportError: the file cannot be read, or a row has no text.
    """
    if path is None:
        return set()
    return {_index(passages, _passage(Path(path), place, row)) for place, row in read_rows(Path(path))}


def _minable(learnt: Queries, corpus: set[int]) -> tuple[int, ...]:
    found = corpus.union(*learnt.relevant, *learnt.negatives, learnt.own) - {-1}
    return tuple(sorted(found))


@dataclass(frozen=True)
class _Read:
    """A file that was read.

    `places` has the place of each query's first row, such as `line 17`, by the query's text. The function `queries`
    returns the file's queries. At the time of its call, it reads the argument `members` of `_read`: the answers of a
    labelled text are the other texts of its labels in this file and in all files read before the call. The function
    raises ExportError if there are none for one of these labels.
    """

    path: Path
    places: dict[str, str]
    queries: Callable[[], Queries]


def _read(path: Path, passages: dict[str, int], members: dict[str, set[int]]) -> _Read:
    """Read a training, validation or test file: pairs, triplets or labelled texts. Other columns are ignored.

    The columns of the first row decide which of the three the file has.

    Args:
        path: the file.
        passages: index of each passage by its text; passages of the file are added.
        members: indexes of the texts of each label; labelled texts of the file are added.

    Raises:
        ExportError: the file cannot be read, contradicts itself or lacks the columns (query and passage, or text and
            label), or a cell of its columns is empty or of a wrong type.
    """
    rows = read_rows(path)
    columns = rows[0][1]
    if columns.keys() >= _PAIR:
        return _read_pairs(path, rows, passages)
    if "text" in columns and "label" in columns:
        return _read_labelled(path, rows, passages, members)
    raise ExportError(f"{path}, {rows[0][0]}: the columns are {', '.join(columns)}; they must be {_COLUMNS}")


def _read_pairs(path: Path, rows: Sequence[tuple[str, dict[str, Any]]], passages: dict[str, int]) -> _Read:
    """Read pairs or triplets, and add their passages and negatives to `passages`.

    Rows with the same query become one query. The rows are triplets if the first row has the column negative.

    Raises:
        ExportError: a cell is missing, empty or no text, a query is its own passage, or a negative is also a passage of
            its query.
    """
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
                f"{path}, {stated[min(both)]}: the negative is also a passage of the same query "
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
    """Read labelled texts, and add them to `passages` and `members`.

    Each distinct text is a query, with the labels of all its rows. Its answers are determined when the function
    `queries` of the result is called; see `_Read`. Logs a warning for labels that hardly differ.

    Raises:
        ExportError: a cell is missing, empty or no text.
    """
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
                    f"{path}, {place}: no other text has the label {alone[0]!r}, so no passage answers this text; "
                    "give the label more texts or remove the row"
                )
        own = tuple(passages[text] for text in places)
        relevant = tuple(
            frozenset(i for label in labels[text] for i in members[label]) - {passages[text]} for text in places
        )
        return Queries(tuple(places), relevant, tuple(frozenset() for _ in places), own)

    return _Read(path, places, queries)


def _passage(path: Path, place: str, row: dict[str, Any]) -> str:
    """Return the passage in a row of a corpus: the title and a space, if there is a title, and then the text.

    Raises:
        ExportError: the text is missing, empty or no text.
    """
    text = text_of(path, place, row, "text")
    title = row.get("title")
    return f"{title} {text}" if isinstance(title, str) and title.strip() else text


def _index(passages: dict[str, int], text: str) -> int:
    return passages.setdefault(text, len(passages))


def _require_apart(one: _Read, other: _Read) -> None:
    """Raise ExportError if a query is in both files: training, validation and test files must not share queries."""
    both = [query for query in one.places if query in other.places]
    if both:
        raise ExportError(
            f"{one.path}, {one.places[both[0]]}: the query is also in {other.path} ({other.places[both[0]]}); "
            f"both files share {len(both)} queries; remove them from one"
        )


def _split(queries: Queries, path: Path, seed: int) -> tuple[Queries, Queries]:
    """Hold out a fifth of the queries at random, at most 500; return the training queries and the held-out queries.

    Held-out labelled texts are removed from the answers of training queries, and a training query without any other
    answer is left out. Both results keep the order of `queries`. Raises ExportError, which names `path`, if there are
    fewer than 10 queries.
    """
    if len(queries) < _MIN_QUERIES:
        raise ExportError(f"{path} has {len(queries)} queries; give at least {_MIN_QUERIES}, or add a validation file")
    order = np.random.default_rng(seed).permutation(len(queries))
    held_out = np.sort(order[: min(_MAX_HELD_OUT, max(1, round(_HELD_OUT * len(queries))))])
    training = queries.take(np.setdiff1d(order, held_out).tolist())
    hidden = frozenset(queries.own[row] for row in held_out) - {-1}
    relevant = tuple(known - hidden for known in training.relevant)
    training = Queries(training.texts, relevant, training.negatives, training.own)
    # A query whose answers are all held out cannot be trained on.
    return training.take(row for row in range(len(training)) if relevant[row]), queries.take(held_out.tolist())
