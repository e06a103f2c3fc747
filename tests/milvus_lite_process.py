"""Runs the gRPC server of the package milvus-lite as a child process."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

#: A script in place of the command of milvus-lite, which prints 0 as the port if it was given 0.
_SERVE = """
import sys
from milvus_lite.adapter.grpc.server import start_server_in_thread
server, database, port = start_server_in_thread(sys.argv[1], port=int(sys.argv[2]))
print(port, flush=True)
sys.stdin.read()
server.stop(grace=None).wait()
database.close()
"""


def need_milvus(*packages: str) -> None:
    """Skip the test where a package is not installed."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed; run: pip install 'emberpc[milvus-lite]'")


class MilvusLiteProcess:
    """A Milvus on a real port, ready when the constructor returns.

    Args:
        folder: the data directory of Milvus.
        port: the port of Milvus; 0 chooses a free one.
    """

    def __init__(self, folder: Path, port: int = 0) -> None:
        self._folder = folder
        self._log = (folder.parent / f"{folder.name}.log").open("ab")
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVE, str(folder), str(port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, Path(self._log.name).read_text()
        self.port = int(line)

    @property
    def uri(self) -> str:
        """The URI of this Milvus."""
        return f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        """Close its stdin, so that it ends, and wait until it has ended."""
        self._process.communicate(timeout=300)
        self._log.close()

    def kill(self) -> None:
        """Kill it, as a crash would."""
        self._process.kill()
        self.stop()
