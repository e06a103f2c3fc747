"""A model's hub that is away, or does not have the model: an error in words and in finite time."""

from __future__ import annotations

import http.server
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

pytestmark = pytest.mark.export

Emberpc = Any


class NotFound(http.server.BaseHTTPRequestHandler):
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_error(404)

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of a hub that refuses connections, takes them and never answers, or does not have the model."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        if request.param == "silent":
            yield f"http://127.0.0.1:{port}"
            return
    if request.param == "closed":
        yield f"http://127.0.0.1:{port}"
        return
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), NotFound) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()
        assert any("nobody/nothing" in path for path in NotFound.asked)


# Only the silent hub makes a test wait for the timeout. The others have time to answer on a busy host.
@pytest.mark.parametrize(("hub", "timeout"), [("closed", 300), ("silent", 1), ("without it", 300)], indirect=["hub"])
def test_a_hub_that_does_not_give_the_model(
    emberpc: Emberpc, hub: str, timeout: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    for name in [name for name in os.environ if "proxy" in name.lower()]:
        monkeypatch.delenv(name)
    # The library reads its environment when it is imported, which another test may have done.
    monkeypatch.setattr(constants, "ENDPOINT", hub)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", timeout)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    outcome = emberpc("export", "embedding", "nobody/nothing", "-o", tmp_path / "bundle")
    assert outcome.code == 2, outcome.err
    assert "'nobody/nothing' is no folder here" in outcome.err.splitlines()[-1]
    assert "check the spelling and the network, or download the model and give its folder" in outcome.err
    assert "Traceback" not in outcome.err
    assert [path.name for path in tmp_path.iterdir() if path.name != "hf"] == []
