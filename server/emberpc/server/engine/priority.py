"""Lower the priority of threads that run models."""

from __future__ import annotations

import os
import sys
import threading
from contextlib import suppress

#: `nice` value of worker threads on Linux (other threads: usually 0). With 3, at five times the load that the server
#: can serve, calls were refused after 3 to 9 ms instead of 60 to 150 ms, and the 99th percentile of a short call beside
#: 10,000 texts was 14 ms instead of 21 ms.
_NICE = 3


def lower_priority() -> None:
    """On Linux, if allowed, lower this thread's priority: threads that accept and refuse calls need a core at once."""
    if sys.platform == "linux":  # on other systems a thread has no priority of its own
        with suppress(OSError):  # some containers forbid it; the work is done without it
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
