"""The same server on each index backend: each test of this folder must pass on all of them.

Milvus is milvus-lite, started from its package; this tests the contract of the backend and not a Milvus cluster.
With EMBERPC_TEST_MILVUS=http://host:19530 (and EMBERPC_MILVUS_TOKEN) the tests use that Milvus instead.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from emberpc.client import Client
from emberpc.v1 import index_pb2_grpc
from examples.server_process import ServerProcess
from milvus_lite_process import MilvusLiteProcess, need_milvus

BACKENDS = ("embedded", "milvus")


@pytest.fixture(scope="session", params=BACKENDS)
def backend(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server without models, on one index backend."""
    flags: list[str] = []
    with ExitStack() as stack:
        if request.param == "milvus":
            flags = ["--index-backend", "milvus", "--milvus-uri", milvus_uri(stack, tmp_path_factory)]
        process = ServerProcess({}, tmp_path_factory.mktemp("data"), *flags)
        yield process
        assert process.stop() == 0, process.output


def milvus_uri(stack: ExitStack, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the URI of Milvus: that of the environment, or of a milvus-lite that runs until the stack ends."""
    need_milvus("pymilvus")
    if uri := os.environ.get("EMBERPC_TEST_MILVUS"):
        return uri
    need_milvus("milvus_lite")
    milvus = MilvusLiteProcess(tmp_path_factory.mktemp("milvus") / "data")
    stack.callback(milvus.stop)
    return milvus.uri


@pytest.fixture
def client(backend: ServerProcess) -> Iterator[Client]:
    with Client(backend.address) as connected:
        yield connected


@pytest.fixture
def stub(backend: ServerProcess) -> Iterator[index_pb2_grpc.IndexServiceStub]:
    """A stub of the RPCs, for requests that the client would refuse to send."""
    import grpc

    with grpc.insecure_channel(backend.address) as channel:
        yield index_pb2_grpc.IndexServiceStub(channel)


MakeCollection = Callable[..., str]


@pytest.fixture
def make_collection(client: Client) -> Iterator[MakeCollection]:
    """Return a function that creates collections with new names; they are deleted at the end."""
    made: list[str] = []

    def make(dimensions: int, distance: str = "cosine") -> str:
        name = f"conformance-{uuid.uuid4().hex}"
        client.create_collection(name, dimensions=dimensions, distance=distance)  # type: ignore[arg-type]
        made.append(name)
        return name

    yield make
    for name in made:
        client.delete_collection(name)
