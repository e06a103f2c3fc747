"""Hubs that do not answer or do not have the model: the export fails in finite time and states the reason."""

from __future__ import annotations

import http.server
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.export


class NotFound(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(404)

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, *_: object) -> None:
        """Do not log requests."""


@pytest.fixture
def hub(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of a hub that refuses connections, accepts them and never answers, or does not have the model."""
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


@pytest.mark.parametrize(
    "hub", [pytest.param("closed", marks=pytest.mark.slow), "silent", "without the model"], indirect=True
)
def test_an_export_from_a_hub_without_an_answer_or_the_model_fails(hub: str, tmp_path: Path) -> None:
    environment = {
        **{name: value for name, value in os.environ.items() if "proxy" not in name.lower()},
        "HF_ENDPOINT": hub,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_ETAG_TIMEOUT": "5",
    }
    environment.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-m", "emberpc.cli.main", "export", "embedding", "nobody/nothing", "-o", "bundle"]
    run = subprocess.run(
        command, check=False, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300, input=""
    )
    assert run.returncode == 2, run.stderr
    assert "no folder and no installed package has the name 'nobody/nothing'" in run.stderr.splitlines()[-1]
    assert "check the spelling and the network, or give the name of a folder with a model" in run.stderr
    assert "Traceback" not in run.stderr
    assert [path.name for path in tmp_path.iterdir() if path.name != "hf"] == []
