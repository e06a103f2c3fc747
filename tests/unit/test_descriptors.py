"""The limit of file descriptors is raised as far as the system allows, and a shortage is found."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = f"""
import os, resource, sys
sys.path[:0] = {sys.path!r}
from emberpc.server import descriptors
hard = min(300, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
assert descriptors.limit() == 100
assert descriptors.raise_limit() == (100, hard)
assert descriptors.limit() == hard
assert descriptors.raise_limit() == (hard, hard)
assert not descriptors.none_free()
taken = []
try:
    while True:
        taken.append(os.open(os.devnull, os.O_RDONLY))
except OSError as error:
    assert descriptors.is_shortage(error)
assert descriptors.none_free()
assert str(hard) in descriptors.shortage().message
os.close(taken.pop())
assert not descriptors.none_free()
assert descriptors.none_free(2)
assert not descriptors.none_free()
"""


def test_the_limit_of_descriptors_is_raised_and_a_shortage_is_found() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
