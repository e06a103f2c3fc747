"""Let Ctrl-C end a command wherever it arrives, and print no error that it causes.

Python can raise KeyboardInterrupt between any two instructions. A destructor, a callback of a weak reference and a
callback of the garbage collector cannot raise: Python prints their exceptions and continues. So KeyboardInterrupt would
be lost there. And if KeyboardInterrupt ends a constructor, the destructor of the incomplete object may fail, as that of
a call of gRPC does.
"""

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

#: Seconds until KeyboardInterrupt is raised again after a destructor or callback.
_RETRY_SECONDS = 0.01


@contextmanager
def handle_interrupts() -> Iterator[None]:
    """Within the block, let Ctrl-C raise KeyboardInterrupt at any time.

    KeyboardInterrupt in a destructor or callback is raised again 10 ms later, or at the end of the block. After Ctrl-C,
    no exceptions of destructors and callbacks are printed, of any thread.

    The block has no effect outside the main thread, and none if SIGINT has another handler than Python's default. For
    example, a job in the background ignores SIGINT. A handler that is installed within the block stays.

    Raises:
        KeyboardInterrupt: the user pressed Ctrl-C.
    """
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield
        return
    interrupts = _Interrupts()
    try:
        interrupts.begin()
        yield
        interrupts.raise_pending()
    finally:
        interrupts.end()


class _Interrupts:
    """The handler of SIGINT and the hook for exceptions that cannot be raised, during a command."""

    def __init__(self) -> None:
        self._print_unraisable = sys.unraisablehook
        #: Whether Ctrl-C was pressed.
        self._interrupted = False
        #: Number of calls of the hook that run in the main thread.
        self._hooks = 0
        #: Raises KeyboardInterrupt again; None if none is to be raised.
        self._retry: threading.Timer | None = None

    def begin(self) -> None:
        sys.unraisablehook = self._hook
        signal.signal(signal.SIGINT, self._handle)

    def raise_pending(self) -> None:
        """Raise KeyboardInterrupt if it is to be raised again."""
        if self._retry is not None:
            raise KeyboardInterrupt

    def end(self) -> None:
        """Restore handler and hook. SIGINT is ignored meanwhile."""
        ours = signal.getsignal(signal.SIGINT) == self._handle
        if ours:
            signal.signal(signal.SIGINT, lambda _number, _frame: None)
        try:
            if self._retry is not None:
                self._retry.cancel()
                self._retry.join()
            if self._interrupted:
                gc.collect()  # destroys incomplete objects of reference cycles while exceptions are not printed
        finally:
            if ours:
                signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.unraisablehook = self._print_unraisable

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._interrupted = True
        if self._hooks:  # the hook cannot raise either
            self._raise_later()
        else:
            self._retry = None
            signal.default_int_handler(number, frame)

    def _hook(self, error: Any) -> None:
        if threading.current_thread() is not threading.main_thread():  # only the main thread handles signals
            self._print(error)
            return
        self._hooks += 1
        try:
            if isinstance(error.exc_value, KeyboardInterrupt):
                self._raise_later()
            else:
                self._print(error)
        finally:
            self._hooks -= 1

    def _print(self, error: Any) -> None:
        if not self._interrupted:
            self._print_unraisable(error)

    def _raise_later(self) -> None:
        self._retry = threading.Timer(_RETRY_SECONDS, _thread.interrupt_main)
        self._retry.daemon = True
        self._retry.start()
