"""Search a collection: build requests, decode responses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from emberpc.client._core import checks
from emberpc.client._core.details import report
from emberpc.client._core.enums import FUSIONS, PRIORITIES, SEARCH_MODES, STRATEGIES, TRUNCATIONS, value_of, word_of
from emberpc.client._core.filter_warnings import warn
from emberpc.client._core.joined_calls import JoinedCalls, ListCollector
from emberpc.client._core.record_messages import parts_of, read_records
from emberpc.client._core.request_chunks import chunks, divisible
from emberpc.client._core.rpc_call import Call, Method, check_count
from emberpc.client.details import Details
from emberpc.client.exceptions import InputTypeError
from emberpc.client.filters import Where, filter_of
from emberpc.client.types import (
    Fusion,
    Hit,
    Priority,
    Query,
    RecordId,
    SearchMode,
    SearchPlan,
    SearchQuery,
    SearchResult,
    Truncation,
)
from emberpc.v1 import index_pb2 as pb
from emberpc.wire import vectors

SEARCH = Method("/emberpc.v1.IndexService/Search", pb.SearchResponse)

#: Maximum number of queries in one request. The API accepts 1000, but smaller requests have smaller responses.
_QUERIES = 100
#: Maximum number of hits of all queries of one request together, as the API limits them.
_HITS = 100_000


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """The options that `search` and `search_batch` share, as the caller gave them; `request` validates them.

    `Client.search` documents their meanings.
    """

    top_k: int
    ef: int
    min_recall: float
    where: Where | None
    mode: SearchMode
    dense_weight: float | None
    fusion: Fusion | None
    truncation: Truncation
    with_vectors: bool
    priority: Priority

    def request(self, collection: str) -> pb.SearchRequest:
        """Validate the options and return a request with them, for a collection, but without queries.

        Raises:
            InputTypeError: an option has the wrong type.
            InputError: `top_k` is below 1, `ef` is negative, one of them is not below 2**31, an option is not a known
                word or not a valid filter, or a str has a lone surrogate. The server checks the other ranges.
        """
        return pb.SearchRequest(
            collection=checks.text(collection, "collection"),
            top_k=checks.count(self.top_k, "top_k", 1),
            ef=checks.count(self.ef, "ef"),
            min_recall=checks.number(self.min_recall, "min_recall"),
            filter=filter_of(self.where),
            mode=value_of("mode", self.mode, SEARCH_MODES),
            dense_weight=None if self.dense_weight is None else checks.number(self.dense_weight, "dense_weight"),
            fusion=pb.SEARCH_FUSION_UNSPECIFIED if self.fusion is None else value_of("fusion", self.fusion, FUSIONS),
            truncation=value_of("truncation", self.truncation, TRUNCATIONS),
            parts=parts_of(self.with_vectors),
            priority=value_of("priority", self.priority, PRIORITIES),
        )


def search(
    collection: str,
    queries: Iterable[Query | SearchQuery],
    options: SearchOptions,
    *,
    details: Details | None,
    name: str = "queries[{}]",
) -> JoinedCalls[list[SearchResult], list[SearchResult]]:
    """Return the calls of `Client.search` and `Client.search_batch`; none if there are no queries.

    Each call has at most 100 queries, 8 MiB of queries and 100,000 hits, or a single query with more.

    Args:
        collection: name of the collection.
        queries: the queries.
        options: the options of all queries.
        details: called with the details of each response; None: no calls.
        name: name of a query in error messages; `{}` is replaced by the index of the query.

    Raises:
        InputTypeError: an argument or a query has the wrong type.
        InputError: an argument or a query is wrong.
    """
    checks.function(details, "details")
    one = isinstance(queries, (*checks.SINGLE, RecordId, SearchQuery))
    if one or not isinstance(queries, Iterable):
        raise InputTypeError(
            f"queries is of type {type(queries).__name__}; it must be a list of queries, or use `search` for one query"
        )
    messages = [_query(query, name.format(i)) for i, query in enumerate(queries)]
    template = options.request(collection)

    def call(first: int, part: list[pb.SearchQuery]) -> Call[pb.SearchResponse, list[SearchResult]]:
        def decode(response: pb.SearchResponse) -> list[SearchResult]:
            check_count(len(response.results), len(part), "results")
            warn(response.warnings)
            report(details, response, first, len(part))
            return [_result(message) for message in response.results]

        request = pb.SearchRequest(queries=part)
        request.MergeFrom(template)
        return Call(SEARCH, request, decode, "queries", first, len(part), divisible(call, first, part))

    max_hits = max((message.top_k for message in messages), default=0)
    queries_at_once = max(1, min(_QUERIES, _HITS // max(1, template.top_k, max_hits)))
    parts = chunks(messages, queries_at_once, lambda message: message.ByteSize())
    return JoinedCalls((call(*part) for part in parts), ListCollector[SearchResult]())


def _query(query: Query | SearchQuery, name: str) -> pb.SearchQuery:
    if not isinstance(query, SearchQuery):
        return _plain_query(query, name)
    message = _plain_query(query.query, f"{name}.query")
    options = pb.SearchQuery(
        filter=filter_of(query.where, f"{name}.where"),
        top_k=0 if query.top_k is None else checks.count(query.top_k, f"{name}.top_k", 1),
        ef=checks.count(query.ef, f"{name}.ef"),
    )
    message.MergeFrom(options)
    return message


def _plain_query(query: Query, name: str) -> pb.SearchQuery:
    """Return the message of a query without options of its own; errors call the query `name`.

    Raises:
        InputTypeError: the query is no text, vector or RecordId, or it is a list of texts or vectors.
        InputError: the text or id has a lone surrogate, or the vector is empty or has a number beyond float32.
    """
    if isinstance(query, str):
        return pb.SearchQuery(text=checks.text(query, name))
    if isinstance(query, RecordId):
        return pb.SearchQuery(record_id=checks.text(query.id, f"{name}.id"))
    if not checks.is_array(query):
        raise InputTypeError(
            f"{name} is of type {type(query).__name__}; it must be a text (str), a vector (a list of numbers or a "
            "one-dimensional numpy array) or a RecordId; `search_batch` also takes a list of SearchQuery, which have "
            "options of their own"
        )
    if isinstance(query, Sequence) and any(isinstance(item, str) for item in query):
        raise InputTypeError(f"{name} is a list of texts; it must be one text, or use `search_batch` for several")
    array = checks.numbers_of(query, name)
    if array.ndim > 1:
        raise InputTypeError(
            f"{name} is of type {type(query).__name__} and has shape {array.shape}; it must be one vector, "
            "(dimensions,), or use `search_batch` for several"
        )
    return pb.SearchQuery(vector=vectors.encode(checks.vector(array, name)[None]))


def _result(message: pb.SearchResult) -> SearchResult:
    records = read_records([hit.record for hit in message.hits], message.vectors)
    return SearchResult(
        hits=tuple(Hit(record, hit.score) for record, hit in zip(records, message.hits, strict=True)),
        plan=SearchPlan(
            strategy=word_of(message.plan.strategy, STRATEGIES),
            ef=message.plan.ef,
            compared_count=message.plan.compared_count,
            shortfall_reason=message.plan.shortfall_reason,
            lexical_count=message.plan.lexical_count,
        ),
        truncated=message.usage.truncated,
        tokens=message.usage.tokens,
    )
