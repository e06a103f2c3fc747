"""Kills a process at every line of the code that writes a file, and shows what is there after each kill."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

#: Forks a child for each line of the module that the writing runs. The child is killed with SIGKILL at that line.
_SCRIPT = """
import json, os, signal, sys
from pathlib import Path
{imports}
path, old, new = Path(sys.argv[1]), "old" * 100_000, "new" * 100_000

def write_until(line):
    lines = 0
    def trace(frame, event, argument):
        nonlocal lines
        if frame.f_code.co_filename != module.__file__:
            return None
        if event == "line":
            lines += 1
            if lines == line:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace
    sys.settrace(trace)
    {write}

line = status = 1
while status:
    path.write_text(old)
    if not (child := os.fork()):
        write_until(line)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL)
    found = {{old: "old", new: "new"}}.get(path.read_text(), "damaged")
    print(json.dumps([found, sorted(each.name for each in path.parent.iterdir() if each != path)]), flush=True)
    line += 1
"""


@dataclass(frozen=True)
class Kills:
    """The state after each kill, and last after a writing that was not killed.

    Attributes:
        contents: "old", "new" or "damaged", for the whole file.
        left: names of the other files in its folder.
    """

    contents: list[str]
    left: list[list[str]]


def kills(imports: str, write: str, path: Path) -> Kills:
    """Run `write`, which writes `new` to `path`, until each line of `module`, which `imports` imports."""
    script = _SCRIPT.format(imports=imports, write=write)
    ended = subprocess.run([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, check=True, timeout=300)
    found = [json.loads(line) for line in ended.stdout.splitlines()]
    return Kills([content for content, _ in found], [left for _, left in found])
