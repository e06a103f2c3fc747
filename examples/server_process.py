"""Runs `emberpc serve` as a child process, for the examples and the tests."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

_READY = re.compile(r"serving on (\S+:\d+)")
# Bounds for a host ten times slower, with other programs on every core.
_START_SECONDS = 300
_STOP_SECONDS = 300


class ServerProcess:
    """A real server on a real port, ready when the constructor returns.

    As a context manager it is stopped at the end, with SIGTERM, as an operator would.

    Args:
        models: the bundles' folders by name.
        data_dir: where the collections are.
        flags: more flags of `emberpc serve`.
        listen: its address; port 0 takes a free one, and `address` says which.

    Raises:
        RuntimeError: it ended before it served; the message is what it said.
    """

    def __init__(self, models: Mapping[str, Path], data_dir: Path, *flags: str, listen: str = "127.0.0.1:0") -> None:
        self.arguments = ["serve", "--listen", listen, "--data-dir", str(data_dir), *flags]
        for name, folder in models.items():
            self.arguments += ["--model", f"{name}={folder}"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "emberpc.cli.main", *self.arguments], stderr=subprocess.PIPE, text=True
        )
        self.address = ""
        self._log: list[str] = []
        self._ready = threading.Event()
        # What it logs must be read throughout, or it would block once the pipe is full.
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._ready.wait(_START_SECONDS)
        if not self.address:
            self.kill()
            raise RuntimeError(f"the server did not start: {self.output}")

    @property
    def output(self) -> str:
        """All that it wrote to stderr so far."""
        return "".join(self._log)

    def stop(self) -> int:
        """Stop it as an operator would; return its exit code."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(_STOP_SECONDS)
        return self._close()

    def kill(self) -> int:
        """End it as a crash would; return its exit code."""
        self.process.kill()
        self.process.wait(_STOP_SECONDS)
        return self._close()

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _close(self) -> int:
        self._reader.join(_STOP_SECONDS)
        assert self.process.stderr is not None
        self.process.stderr.close()
        return self.process.returncode

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._log.append(line)
            if found := _READY.search(line):
                self.address = found[1]
                self._ready.set()
        self._ready.set()
