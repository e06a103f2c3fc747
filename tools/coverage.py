"""Run the fast tests with coverage of server and client, including servers in child processes.

Arguments are passed to pytest. The exit code is not 0 if a test fails, or if the coverage is below 90 %.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MINIMUM = 90


def main() -> int:
    # The package coverage installs a .pth file, which starts coverage in each child process that has this variable.
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
