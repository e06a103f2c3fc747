"""Check the protos: the generated code is current, and `buf lint` and `buf breaking` pass.

`buf breaking` finds changes that break clients of earlier protos. It compares the protos of the working tree with those
of the first of these commits that exists and is not HEAD: the merge base of HEAD and origin/main, the merge base of
HEAD and main, the parent of HEAD. If there is none, or it has no buf.yaml, this check is left out.

All checks run even if one fails. The exit code is 0 if all pass, otherwise 1.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


def git(*arguments: str) -> str:
    """Run git in the checkout with these arguments; return its stripped stdout, or an empty string if git fails.

    Raises:
        FileNotFoundError: git is not installed.
    """
    run = subprocess.run(["git", *arguments], check=False, cwd=ROOT, capture_output=True, text=True)
    return run.stdout.strip() if run.returncode == 0 else ""


def base() -> str:
    """Return the hash of the commit that `buf breaking` compares the protos with: see the docstring of this module.

    It is empty if there is none: outside a git repository, at the first commit, or in a clone of one commit.

    Raises:
        FileNotFoundError: git is not installed.
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
    # A step that a signal ended has a negative code, so every code other than 0 counts as a failure.
    codes = [subprocess.run(step, check=False, cwd=ROOT).returncode for step in steps]
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())
