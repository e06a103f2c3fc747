"""The README's example is run as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from emberpc.client import Client
from examples.server_process import ServerProcess

README = Path(__file__).resolve().parent.parent.parent / "README.md"


def test_the_fifteen_lines_do_what_they_say(server: ServerProcess, client: Client) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    try:
        run = subprocess.run(
            [sys.executable, "-c", code.replace("localhost:50051", server.address)],
            check=False,
            capture_output=True,
            text=True,
        )
    finally:
        client.delete_collection("notes")
    assert run.stderr == ""
    shape, hit, label = run.stdout.splitlines()
    assert shape == "(2, 384) float32"
    assert re.fullmatch(r"0\.\d\d n1 \{'room': 'living'\}", hit)
    assert label == "logging"
