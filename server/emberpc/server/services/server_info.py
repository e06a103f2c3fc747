"""ServerService: return the server's version, limits and features."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version

from emberpc.server.collections import MAX_ID_BYTES, MAX_LABEL_BYTES, MAX_METADATA_BYTES, MAX_TOP_K, filters
from emberpc.server.element_counts import MAX_ELEMENTS
from emberpc.server.paging import MAX_PAGE_SIZE
from emberpc.server.pipelines.limits import (
    MAX_HITS,
    MAX_IDS,
    MAX_QUERIES,
    MAX_REQUEST_CONDITIONS,
    MAX_REQUEST_VALUES,
    Limits,
)
from emberpc.server.services import requests
from emberpc.v1 import server_pb2 as pb
from emberpc.v1 import server_pb2_grpc


class ServerService(server_pb2_grpc.ServerServiceServicer):
    """Implements the ServerService of server.proto.

    Args:
        limits: limits of a call.
        features: what the response lists as features, such as `model_admin` or `index_backend:embedded`.
    """

    def __init__(self, limits: Limits, features: Sequence[str]) -> None:
        self._response = pb.GetServerInfoResponse(
            version=version("emberpc"),
            limits=pb.ServerLimits(
                max_message_bytes=limits.max_message_bytes,
                max_response_bytes=limits.max_response_bytes,
                max_texts=limits.max_texts,
                max_text_bytes=limits.max_text_bytes,
                max_queue_tokens=limits.max_queue_tokens,
                max_id_bytes=MAX_ID_BYTES,
                max_label_bytes=MAX_LABEL_BYTES,
                max_metadata_bytes=MAX_METADATA_BYTES,
                max_queries=MAX_QUERIES,
                max_top_k=MAX_TOP_K,
                max_hits=MAX_HITS,
                max_ids=MAX_IDS,
                max_page_size=MAX_PAGE_SIZE,
                max_filter_conditions=filters.MAX_CONDITIONS,
                max_request_conditions=MAX_REQUEST_CONDITIONS,
                max_filter_values=MAX_REQUEST_VALUES,
                max_collections=limits.max_collections,
                max_elements=MAX_ELEMENTS,
            ),
            features=features,
        )

    async def GetServerInfo(
        self, request: pb.GetServerInfoRequest, context: requests.Context
    ) -> pb.GetServerInfoResponse:
        """Return the server's version, limits and features: the same message for each call."""
        return self._response
