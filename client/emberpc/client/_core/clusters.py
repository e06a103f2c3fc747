"""Duplicates and clusters of a collection: build requests, decode responses."""

from __future__ import annotations

from emberpc.client._core import checks
from emberpc.client._core.record_messages import read_record
from emberpc.client._core.rpc_call import Call, Method, Page
from emberpc.client.types import Cluster, DuplicatePair
from emberpc.v1 import index_pb2 as pb

_SERVICE = "/emberpc.v1.IndexService/"
FIND_DUPLICATES = Method(_SERVICE + "FindDuplicates", pb.FindDuplicatesResponse)
CLUSTER_RECORDS = Method(_SERVICE + "ClusterRecords", pb.ClusterRecordsResponse)


def find_duplicates(
    collection: str, page_token: str, *, min_score: float, page_size: int
) -> Call[pb.FindDuplicatesResponse, Page[DuplicatePair]]:
    """Return the call for one page of `Client.duplicates`; the token of the first page is empty.

    An argument of the wrong type raises InputTypeError. One that cannot be sent, or a `page_size` below 0, raises
    InputError. The server checks the limits, also of `min_score`.
    """
    request = pb.FindDuplicatesRequest(
        collection=checks.text(collection, "collection"),
        min_score=checks.number(min_score, "min_score"),
        page_size=checks.count(page_size, "page_size"),
        page_token=page_token,
    )
    return Call(
        FIND_DUPLICATES,
        request,
        lambda response: Page(
            [DuplicatePair(pair.first_id, pair.second_id, pair.score) for pair in response.pairs],
            response.next_page_token,
        ),
    )


def cluster_records(collection: str, count: int, *, examples: int) -> Call[pb.ClusterRecordsResponse, list[Cluster]]:
    """Return the call of `Client.clusters`; `count` is the number of clusters.

    An argument of the wrong type raises InputTypeError. One that cannot be sent, or an integer below 0, raises
    InputError. The server checks the limits.
    """
    request = pb.ClusterRecordsRequest(
        collection=checks.text(collection, "collection"),
        cluster_count=checks.count(count, "count"),
        examples_per_cluster=checks.count(examples, "examples"),
    )
    return Call(
        CLUSTER_RECORDS,
        request,
        lambda response: [
            Cluster(cluster.record_count, tuple(read_record(record, None) for record in cluster.examples))
            for cluster in response.clusters
        ],
    )
