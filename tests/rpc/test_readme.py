"""The example in the README runs unchanged, and prints the lines that its comments show."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from emberpc.client import Client
from examples.server_process import ServerProcess

README = Path(__file__).resolve().parent.parent.parent / "README.md"


def test_the_example_of_the_readme_runs_and_has_at_most_15_lines(server: ServerProcess, client: Client) -> None:
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
    # The comment after a print has the line that it prints; what follows a semicolon is an explanation.
    shown = [comment.partition(";")[0] for comment in re.findall(r"print\(.*\) +# (.*)", code)]
    assert run.stdout.splitlines() == shown
