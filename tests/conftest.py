"""Fixtures of real things: bundles exported once, and a server that serves them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from emberpc.client import Client
from server_process import ServerProcess

pytest_plugins = ["fixtures_bundles"]


@pytest.fixture(scope="session")
def server(
    minilm_bundle: Path, classifier_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """A server with an embedding model `minilm` and a classifier `modules`."""
    process = ServerProcess({"minilm": minilm_bundle, "modules": classifier_bundle}, tmp_path_factory.mktemp("data"))
    yield process
    assert process.stop() == 0, process.output


@pytest.fixture
def client(server: ServerProcess) -> Iterator[Client]:
    """A client of that server."""
    with Client(server.address) as connected:
        yield connected
