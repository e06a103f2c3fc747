"""Run the fast tests, and print their coverage of server and client, also that by child processes.

Arguments are passed to pytest. The exit code is 0 only if the tests pass and the total coverage, rounded to a whole
number, is at least 90 %.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MINIMUM = 90


def main() -> int:
    # The package coverage installs a .pth file. It starts coverage in each Python process that has this variable, with
    # the configuration in the named file.
    env = dict(os.environ, COVERAGE_PROCESS_START=str(ROOT / "pyproject.toml"))
    coverage = [sys.executable, "-m", "coverage"]
    subprocess.run([*coverage, "erase"], check=True, cwd=ROOT)
    tests = [*coverage, "run", "-m", "pytest", "-m", "not slow", *sys.argv[1:]]
    result = subprocess.run(tests, check=False, cwd=ROOT, env=env).returncode
    subprocess.run([*coverage, "combine", "--quiet"], check=True, cwd=ROOT)
    report = subprocess.run([*coverage, "report", f"--fail-under={MINIMUM}", "--skip-covered"], check=False, cwd=ROOT)
    return result or report.returncode


if __name__ == "__main__":
    sys.exit(main())
