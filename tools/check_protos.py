"""Check the protos: generated code is current, `buf lint` passes, and old clients still work.

`buf breaking` compares with the state of main before this change: the merge base
with main or, on main itself, the parent commit.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


def git(*arguments: str) -> str:
    """Return the output of a git command; empty if it fails."""
    run = subprocess.run(["git", *arguments], check=False, cwd=ROOT, capture_output=True, text=True)
    return run.stdout.strip() if run.returncode == 0 else ""


def base() -> str:
    """Return the commit to compare with; empty if there is none (no git, first commit, shallow clone)."""
    head = git("rev-parse", "HEAD")
    for main in ("origin/main", "main"):
        found = git("merge-base", main, "HEAD")
        if found and found != head:
            return found
    return git("rev-parse", "HEAD~1")


def main() -> int:
    steps: list[list[str | Path]] = [
        [sys.executable, "tools/generate_protos.py", "--check"],
        [BIN / "buf", "lint"],
    ]
    commit = base()
    if commit and git("ls-tree", commit, "buf.yaml"):
        steps.append([BIN / "buf", "breaking", "--against", f".git#ref={commit}"])
    else:
        print("buf breaking: there is no earlier commit with protos to compare with")
    return max(subprocess.run(step, check=False, cwd=ROOT).returncode for step in steps)


if __name__ == "__main__":
    sys.exit(main())
