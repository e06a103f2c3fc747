"""Run `emberpc serve` as a child process, for examples, benchmarks and tests."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

_READY = re.compile(r"serving on (\S+:\d+)")
# Maximum seconds to wait for the start of a server. A start usually takes a few seconds. The limit is for a slow host
# with other programs on every core.
_START_SECONDS = 300
# Maximum seconds to wait for the end of a server, which usually takes a few seconds, too.
_STOP_SECONDS = 300


class ServerProcess:
    """A server in a child process. The constructor returns when the server logs that it serves.

    Used as a context manager, the object stops the server with SIGTERM at the end of the block. `address` is the
    address that the server listens on, as host:port. `process` is the child process.

    Args:
        models: folders of bundles by model name.
        data_dir: the server's data directory.
        flags: more flags of `emberpc serve`.
        listen: address to listen on, as host:port. With port 0 the server takes a free port.
        program: arguments of Python that run `emberpc`.

    Raises:
        RuntimeError: the server ended, or did not serve within 300 s and was killed; the message has its output.
    """

    def __init__(
        self,
        models: Mapping[str, Path],
        data_dir: Path,
        *flags: str,
        listen: str = "127.0.0.1:0",
        program: Sequence[str] = ("-m", "emberpc.cli.main"),
    ) -> None:
        self.arguments = ["serve", "--listen", listen, "--data-dir", str(data_dir), *flags]
        for name, folder in models.items():
            self.arguments += ["--model", f"{name}={folder}"]
        self.process = subprocess.Popen([sys.executable, *program, *self.arguments], stderr=subprocess.PIPE, text=True)
        self.address = ""
        self._log: list[str] = []
        self._ready = threading.Event()
        # A thread reads the server's log until the server ends: the server would block if the pipe were full.
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._ready.wait(_START_SECONDS)
        if not self.address:
            self.kill()
            raise RuntimeError(f"the server did not start: {self.output}")

    @property
    def output(self) -> str:
        """The lines that the server wrote to stderr, as far as they were read; all of them after `stop` or `kill`."""
        return "".join(self._log)

    def stop(self) -> int:
        """Stop the server with SIGTERM, as an operator would, and wait for its end; return its exit code.

        If the server has ended already, the method sends no signal. If a signal ended the server, the exit code is the
        negative number of the signal.

        Raises:
            TimeoutExpired: the server did not end within 300 s; it still runs.
        """
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(_STOP_SECONDS)
        return self._close()

    def kill(self) -> int:
        """Kill the server with SIGKILL, which is like a crash, and wait for its end; return its exit code.

        The exit code is -9, or that of a server that had ended already.
        """
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
