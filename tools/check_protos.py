"""Check the protos: the generated code is current, `buf lint` passes, and clients of earlier protos still work.

The last check is `buf breaking`. It compares the protos with those of main before this change: of the merge base with
main or, if HEAD is in main or there is no main, of the parent commit. It is left out if there is no such commit, or
the commit has no buf.yaml. The exit code is 0 if all
checks pass.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


def git(*arguments: str) -> str:
    """Run git in the checkout with these arguments; return its stripped stdout, or an empty string if git fails."""
    run = subprocess.run(["git", *arguments], check=False, cwd=ROOT, capture_output=True, text=True)
    return run.stdout.strip() if run.returncode == 0 else ""


def base() -> str:
    """Return the hash of the commit whose protos these protos are compared with: see the text of this module.

    It is empty if there is no such commit: without git, at the first commit, or in a clone of one commit.
    """
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
    # A step that a signal ended has a negative code.
    codes = [subprocess.run(step, check=False, cwd=ROOT).returncode for step in steps]
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())
