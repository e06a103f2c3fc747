"""Check the generated asynchronous client, style, format, types and imports, without changing files.

All checks run even if one fails. The exit code is the number of failed checks.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
CHECKS = (
    ("python", "tools/generate_async_client.py", "--check"),
    ("ruff", "check"),
    ("ruff", "format", "--check"),
    ("mypy",),
    ("lint-imports", "--no-cache"),
)


def main() -> int:
    failed = [
        " ".join(check)
        for check in CHECKS
        if subprocess.run([BIN / check[0], *check[1:]], check=False, cwd=ROOT).returncode
    ]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
