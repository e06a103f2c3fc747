"""A server that answers every RPC with a response in which every field is set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from api_fields import filled, methods
from emberpc.v1 import embedding_pb2
from emberpc.wire import vectors

_METHODS = {f"/{method.containing_service.full_name}/{method.name}": method for method in methods()}


class FilledServer(grpc.GenericRpcHandler):
    """The server, a context manager, over real gRPC on a real port.

    Attributes:
        target: HOST:PORT.
        without: name of a field that responses do not have set, such as `Model.labels`; empty: all are set.
        asked: each request that arrived, with its RPC.
    """

    def __init__(self) -> None:
        self.without = ""
        self.asked: list[tuple[MethodDescriptor, Message]] = []

    def __enter__(self) -> FilledServer:
        self._pool = ThreadPoolExecutor(4)
        self._server = grpc.server(self._pool, handlers=[self], options=[("grpc.so_reuseport", 0)])
        self.target = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.stop(0).wait()
        self._pool.shutdown()

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Return the handler of an RPC; None for an RPC that the server does not serve."""
        method = _METHODS.get(handler_call_details.method)
        if method is None:
            return None
        answer: Callable[[Any, Any], Any]
        if method.client_streaming and method.server_streaming:
            answer, make = self._stream(method), grpc.stream_stream_rpc_method_handler
        elif method.client_streaming:
            answer, make = self._upload(method), grpc.stream_unary_rpc_method_handler
        elif method.server_streaming:
            answer, make = self._steps(method), grpc.unary_stream_rpc_method_handler
        else:
            answer, make = self._unary(method), grpc.unary_unary_rpc_method_handler
        return make(
            answer,
            request_deserializer=GetMessageClass(method.input_type).FromString,
            response_serializer=lambda response: response.SerializeToString(),
        )

    def _answer(self, method: MethodDescriptor, request: Message) -> Any:
        self.asked.append((method, request))
        return filled(GetMessageClass(method.output_type), self.without)

    def _unary(self, method: MethodDescriptor) -> Callable[[Any, Any], Message]:
        def answer(request: Any, _: Any) -> Message:
            response: Message = self._answer(method, request)
            if getattr(request, "page_token", ""):
                response.ClearField("next_page_token")  # there are two pages
            return response

        return answer

    def _steps(self, method: MethodDescriptor) -> Callable[[Any, Any], Iterator[Message]]:
        return lambda request, _: iter([self._answer(method, request)])

    def _upload(self, method: MethodDescriptor) -> Callable[[Any, Any], Message]:
        return lambda requests, _: [self._answer(method, request) for request in requests][-1]

    def _stream(self, method: MethodDescriptor) -> Callable[[Any, Any], Iterator[Message]]:
        """Answer the first request without results, and each other one with a failure of its last item."""
        response_of = self._embedded if method.name == "EmbedStream" else self._written

        def answer(requests: Iterator[Any], _: Any) -> Iterator[Message]:
            first = True
            for request in requests:
                yield response_of(request, self._answer(method, request), first)
                if self.without == "EmbedStreamResponse.model":
                    return  # the client waits for the model before it sends texts
                first = False

        return answer

    def _embedded(self, request: Any, response: Any, first: bool) -> Message:
        if first:
            return embedding_pb2.EmbedStreamResponse(model=response.model if response.HasField("model") else None)
        response.ClearField("model")
        good = [item.id for item in request.items]
        if response.failures:
            # Without a name that it has from here, a failure would have the name of `filled`.
            if response.failures[0].id:
                response.failures[0].id = good[-1]
            good.pop()
        if response.ids:
            response.ids[:] = good
        if response.HasField("embeddings"):
            response.embeddings.CopyFrom(vectors.encode(vectors.decode(response.embeddings).repeat(len(good), axis=0)))
        if response.usages:
            del response.usages[1:]
            response.usages.extend([response.usages[0]] * (len(good) - 1))
        return response  # type: ignore[no-any-return]

    def _written(self, request: Any, response: Any, first: bool) -> Message:
        response.batch_number = request.batch_number
        if first:
            for name in ("receipt", "failures", "inserted_count", "updated_count"):
                response.ClearField(name)
        for failure in response.failures:
            failure.id = failure.id and request.records[-1].id
        return response  # type: ignore[no-any-return]
