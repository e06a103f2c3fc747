"""Let Ctrl-C end a command, also if it arrives while an object is created or destroyed."""

from __future__ import annotations

import _thread
import gc
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

#: Time until KeyboardInterrupt is raised again.
_RETRY_SECONDS = 0.01


@contextmanager
def handle_interrupts() -> Iterator[None]:
    """Within the block, let Ctrl-C raise KeyboardInterrupt wherever it arrives, and print no error that it causes.

    Python can raise KeyboardInterrupt between any two instructions, but not out of a destructor, a callback of a weak
    reference or a callback of the garbage collector. It prints an error of these and goes on. Therefore:

    - If Ctrl-C arrives within one of them, KeyboardInterrupt is raised again after it. Else Ctrl-C would be lost.
    - If Ctrl-C arrives within a constructor, the destructor of the incomplete object may fail, as that of a call of
      gRPC does. After Ctrl-C, such errors are not printed.

    The block has no effect outside the main thread, and none if SIGINT has another handler than Python's default. For
    example, a job in the background ignores SIGINT.
    """
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield
        return
    interrupted = False
    in_hook = False
    print_unraisable = sys.unraisablehook

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True
        if in_hook:  # the hook cannot raise either
            interrupt_later()
        else:
            signal.default_int_handler(number, frame)

    def interrupt_later() -> None:
        timer = threading.Timer(_RETRY_SECONDS, _thread.interrupt_main)
        timer.daemon = True
        timer.start()

    def handle_unraisable(error: Any) -> None:
        nonlocal in_hook
        in_hook = True
        try:
            if isinstance(error.exc_value, KeyboardInterrupt):
                interrupt_later()
            elif not interrupted:
                print_unraisable(error)
        finally:
            in_hook = False

    signal.signal(signal.SIGINT, interrupt)
    sys.unraisablehook = handle_unraisable
    try:
        yield
    finally:
        if interrupted:
            gc.collect()  # destroys incomplete objects of reference cycles while errors are not printed
        # The command `serve` installs its own handler, which stays.
        if signal.getsignal(signal.SIGINT) is interrupt:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.unraisablehook = print_unraisable
