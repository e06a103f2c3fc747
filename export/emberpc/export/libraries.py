"""The training libraries kept in hand: no chatter, and no exceptions of theirs past this room."""

from __future__ import annotations

import errno
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers.utils import logging as transformers_logging

from emberpc.export.errors import ExportError

#: What a write fails with where there is no room: the disk, the user's share of it, or the largest file allowed.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
#: Loggers that tell of their inner workings on every export; ONNX Runtime's quantiser uses the root ("") itself.
_CHATTERERS = ("", "optimum", "sentence_transformers", "huggingface_hub", "torch.onnx")


@contextmanager
def calling_libraries(problem: str, remedy: str) -> Iterator[None]:
    """Call torch, transformers, optimum and their like: in silence, and turning what they raise into ExportError.

    They write of tracing, deprecations and missing poolers, none of which is
    the user's to act upon.

    Args:
        problem: what it means for the user if they raise, such as "the model m cannot be loaded".
        remedy: what to do then.

    Raises:
        ExportError: they raised something; its class is named, and it is the error's `__cause__`.
        OSError: the disk is full, which is no fault of what they were given.
    """
    try:
        with _silence():
            yield
    except ExportError:
        raise
    except Exception as error:  # they raise all kinds, with no base class in common
        # Those that write from Rust or C++ say so in words alone.
        for code in _FULL:
            if getattr(error, "errno", None) == code or os.strerror(code) in str(error):
                raise OSError(code, os.strerror(code)) from error
        raise ExportError(f"{problem} ({type(error).__name__}); {remedy}") from error


@contextmanager
def _silence() -> Iterator[None]:
    """Switch warnings, logs and progress bars off, and afterwards back to what they were."""
    loggers = [logging.getLogger(name) for name in _CHATTERERS]
    levels = [logger.level for logger in loggers]
    verbosity = transformers_logging.get_verbosity()
    bars, hub_bars = transformers_logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    # Without a handler, `logging.warning` would put one there for good that prints to stderr.
    handler = logging.NullHandler()
    logging.getLogger().addHandler(handler)
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.getLogger().removeHandler(handler)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
        if hub_bars:
            enable_progress_bars()
