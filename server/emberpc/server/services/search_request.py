"""Convert the message SearchRequest to the request of the search pipeline, and check its fields."""

from __future__ import annotations

from collections.abc import Sequence

from emberpc.server.collections import MAX_EF, MAX_TOP_K, Fusion
from emberpc.server.collections.filters import Filter
from emberpc.server.engine import Truncation
from emberpc.server.errors import ServiceError, invalid
from emberpc.server.pipelines.limits import MAX_HITS, MAX_QUERIES
from emberpc.server.pipelines.search import Query, SearchMode, SearchRequest
from emberpc.server.services import requests
from emberpc.server.services.filter_messages import FilterReader
from emberpc.server.services.index_messages import RequestedParts, caller_vectors
from emberpc.v1 import index_pb2 as pb

_DEFAULT_TOP_K = 10
#: Default weights of the dense ranking. That of BOUNDS lost at most 0.2 points of nDCG@10 to the better of dense and
#: lexical search on nine data sets (docs/decisions/0028-hybrid-search.md).
_DEFAULT_DENSE_WEIGHTS = {Fusion.BOUNDS: 0.7, Fusion.SCORES: 0.5, Fusion.RANKS: 0.5}

_MODES = {
    pb.SEARCH_MODE_UNSPECIFIED: SearchMode.DENSE,
    pb.SEARCH_MODE_DENSE: SearchMode.DENSE,
    pb.SEARCH_MODE_LEXICAL: SearchMode.LEXICAL,
    pb.SEARCH_MODE_HYBRID: SearchMode.HYBRID,
}
_FUSIONS = {
    pb.SEARCH_FUSION_UNSPECIFIED: Fusion.BOUNDS,
    pb.SEARCH_FUSION_BOUNDS: Fusion.BOUNDS,
    pb.SEARCH_FUSION_SCORES: Fusion.SCORES,
    pb.SEARCH_FUSION_RANKS: Fusion.RANKS,
}


def read_search_request(request: pb.SearchRequest, parts: RequestedParts) -> SearchRequest:
    """Convert a SearchRequest message, and fill in the defaults; that of `truncation` is END, not REFUSE.

    Not checked here but later: the content of texts, the dimensions and values of vectors, the greatest `ef`, the range
    of `min_recall`, and whether both `ef` and `min_recall` are set.

    Args:
        request: the message.
        parts: the parts of records that the request names.

    Raises:
        ServiceError: INVALID_ARGUMENT, naming the field, for a value that is missing, malformed, unknown or out of
            range, or for a field that is set though the mode does not use it.
    """
    sizes = _check(request)
    mode = _check_mode(request)
    fusion = _FUSIONS[request.fusion]
    return SearchRequest(
        queries=_queries(request, mode, sizes),
        mode=mode,
        conditions=_conditions(request),
        truncation=requests.optional_truncation(request.truncation) or Truncation.END,
        min_recall=request.min_recall,
        dense_weight=request.dense_weight if request.HasField("dense_weight") else _DEFAULT_DENSE_WEIGHTS[fusion],
        fusion=fusion,
        with_vectors=parts.vector,
        parts=parts.record_parts,
    )


def _check(request: pb.SearchRequest) -> list[int]:
    """Check the number of queries, and `top_k` and `ef` of the request and of each query.

    Returns:
        The `top_k` of each query: its own, else that of the request, else 10.

    Raises:
        ServiceError: INVALID_ARGUMENT if a number is out of range, or all queries together ask for too many hits. Of
            `ef` of the request, only the minimum is checked. Or a query has an `ef`, and there is a `min_recall`.
    """
    queries = request.queries
    if not 1 <= len(queries) <= MAX_QUERIES:
        raise invalid("queries", f"has {len(queries)} queries; it must have 1 to {MAX_QUERIES}")
    common, own = request.top_k, [query.top_k for query in queries]
    if not (0 <= common <= MAX_TOP_K and min(own) >= 0 and max(own) <= MAX_TOP_K):
        raise _wrong_top_k(common, own)
    sizes = [each or common or _DEFAULT_TOP_K for each in own]
    if sum(sizes) > MAX_HITS:
        raise invalid("queries", f"ask for {sum(sizes)} hits together; a call returns at most {MAX_HITS}, split it")
    efs = [request.ef, *(query.ef for query in queries)]
    if min(efs) < 0:
        place = next(i for i, ef in enumerate(efs) if ef < 0)
        name = f"queries[{place - 1}].ef" if place else "ef"
        raise invalid(name, f"is {efs[place]}; it must be 0 (the server chooses) or more")
    for i, query in enumerate(queries):
        # The index would name the field `ef` of the request, which is not wrong.
        if query.ef > MAX_EF:
            raise invalid(f"queries[{i}].ef", f"is {query.ef}; it must be 0 (the server chooses) to {MAX_EF}")
        if query.ef and request.min_recall:
            raise invalid(f"queries[{i}].ef", "is given beside min_recall; give one of the two")
    return sizes


def _wrong_top_k(common: int, own: Sequence[int]) -> ServiceError:
    sizes = {"top_k": common, **{f"queries[{i}].top_k": each for i, each in enumerate(own)}}
    field, top_k = next(each for each in sizes.items() if not 0 <= each[1] <= MAX_TOP_K)
    return invalid(field, f"is {top_k}; it must be 1 to {MAX_TOP_K}")


def _check_mode(request: pb.SearchRequest) -> SearchMode:
    """Return the mode of a request, and check the fields that depend on the mode.

    Raises:
        ServiceError: INVALID_ARGUMENT for an unknown mode or fusion, a `dense_weight` outside [0, 1], or a field that
            is set though the mode does not use it.
    """
    mode = _MODES.get(request.mode)
    if mode is None:
        raise invalid("mode", f"is {request.mode}, which is not a SearchMode; use DENSE, LEXICAL or HYBRID")
    if request.HasField("dense_weight"):
        if mode is not SearchMode.HYBRID:
            raise invalid("dense_weight", "is set, but only HYBRID search uses it; leave it out, or set mode to HYBRID")
        if not 0 <= request.dense_weight <= 1:
            raise invalid("dense_weight", f"is {request.dense_weight}; it must be 0 to 1")
    if request.fusion not in _FUSIONS:
        raise invalid("fusion", f"is {request.fusion}, which is not a SearchFusion; use BOUNDS, SCORES or RANKS")
    if request.fusion and mode is not SearchMode.HYBRID:
        raise invalid("fusion", "is set, but only HYBRID search uses it; leave it out, or set mode to HYBRID")
    if mode is SearchMode.LEXICAL:
        efs = {"ef": request.ef, **{f"queries[{i}].ef": query.ef for i, query in enumerate(request.queries)}}
        if field := next((field for field, ef in efs.items() if ef), ""):
            raise invalid(field, "is set, but LEXICAL search uses no graph; leave it out")
        if request.min_recall:
            raise invalid("min_recall", "is set, but LEXICAL search uses no graph; leave it out")
    return mode


def _queries(request: pb.SearchRequest, mode: SearchMode, sizes: Sequence[int]) -> list[Query]:
    """Convert the queries of a request.

    Args:
        request: the message.
        mode: mode of the search.
        sizes: `top_k` of each query, as `_check` returns them.

    Raises:
        ServiceError: INVALID_ARGUMENT if a query has neither text nor vector nor record id, is no text though the mode
            is LEXICAL or HYBRID, or has a block of vectors that is not a single FLOAT32 or FLOAT16 vector.
    """
    queries = []
    for i, (query, top_k) in enumerate(zip(request.queries, sizes, strict=True)):
        kind, ef = query.WhichOneof("query"), query.ef or request.ef
        if kind == "text":
            queries.append(Query(query.text, None, None, top_k, ef))
        elif mode is not SearchMode.DENSE:
            raise invalid(
                f"queries[{i}]", f"has no text, which {mode.name} search needs; give a text, or use mode DENSE"
            )
        elif kind == "vector":
            vector = caller_vectors(query.vector, 1, f"queries[{i}].vector")
            queries.append(Query(None, vector, None, top_k, ef))
        elif kind == "record_id":
            queries.append(Query(None, None, query.record_id, top_k, ef))
        else:
            raise invalid(f"queries[{i}]", "has no query; set text, vector or record_id")
    return queries


def _conditions(request: pb.SearchRequest) -> list[Filter | None]:
    """Return the filter of each query: its own, else that of the request, else None. Empty if no query has a filter.

    Raises:
        ServiceError: INVALID_ARGUMENT for a wrong filter, or too many conditions or values in all filters together.
    """
    reader = FilterReader()
    common = reader.read(request.filter, "filter") if request.HasField("filter") else None
    own = [query.HasField("filter") for query in request.queries]
    if common is None and not any(own):
        return []
    return [
        reader.read(query.filter, f"queries[{i}].filter") if has else common
        for i, (query, has) in enumerate(zip(request.queries, own, strict=True))
    ]
