"""Call the training libraries silently, and turn their exceptions into ExportError, or OSError if a disk is full."""

from __future__ import annotations

import errno
import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from emberpc.export.errors import ExportError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

#: Values of `errno` after a write that failed for lack of space: the disk is full, the user's quota is used up, or the
#: file would exceed the greatest file size.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
#: Names of loggers whose messages below CRITICAL are silenced, since they log internal details during an export. ONNX
#: Runtime's quantizer logs to the root logger (the empty name). The level of the root logger also silences the loggers
#: below it that have no level of their own, such as emberpc's.
_SILENCED_LOGGERS = ("", "optimum", "sentence_transformers", "huggingface_hub", "torch", "nncf")
#: Message of a TypeError for a setting of a model that a library does not know.
_UNEXPECTED = re.compile(r"unexpected keyword argument '(\w+)'")
#: Message of transformers for a value of a configuration that has another type than its key needs.
_INVALID = re.compile(r"Validation error for field '(\w+)'")


@contextmanager
def calling_libraries(problem: str, remedy: str, *, hub_only: bool = False) -> Iterator[None]:
    """Run a block that calls torch, transformers, optimum or similar libraries; silence them, and convert exceptions.

    The silenced output is mostly about tracing, deprecations and missing poolers, on which users cannot act. The whole
    process is silenced, other threads included.

    Args:
        problem: the meaning of an exception for the user, such as "the model m cannot be loaded".
        remedy: what the user can do.
        hub_only: whether the block calls no other library than huggingface_hub. transformers is not silenced then,
            since its import takes 2 s of CPU time.

    Raises:
        ExportError: the block raised an exception. The message has `problem`, the module, key or attribute that the
            exception names (else its class) and `remedy`, and `__cause__` is the exception. An ExportError or
            KeyboardInterrupt of the block passes unchanged.
        OSError: the disk or the quota is full, or a file is too large. This is no ExportError, since it says nothing
            about the model.
    """
    try:
        with _silence(hub_only=hub_only):
            yield
    except ExportError:
        raise
    except Exception as error:  # these libraries raise all kinds, with no common base class
        # Errors of libraries in Rust or C++ may lack `errno`: then a full disk shows only in the message.
        for code in _FULL:
            if getattr(error, "errno", None) == code or os.strerror(code) in str(error):
                raise OSError(code, os.strerror(code)) from error
        raise ExportError(f"{problem} ({_subject(error)}); {remedy}") from error


def _subject(error: Exception) -> str:
    """Return the module, key or attribute that a library reports, or else the class of the exception."""
    if isinstance(error, ImportError) and error.name:
        return f"the module {error.name} is missing"
    if isinstance(error, KeyError) and error.args and isinstance(error.args[0], str):
        return f"the key {error.args[0][:100]!r} is unknown or missing"
    if isinstance(error, AttributeError) and error.name:
        return f"{type(error.obj).__name__} has no {error.name!r}"
    if isinstance(error, TypeError) and (found := _UNEXPECTED.search(str(error))):
        return f"the key {found[1]!r} is unknown"
    if found := _INVALID.search(str(error)):
        return f"the key {found[1]!r} of config.json has an invalid value"
    return type(error).__name__


def load_sentence_transformer(folder: Path) -> SentenceTransformer:
    """Load a model with sentence-transformers, in fp32 even if its weights are stored in half precision.

    Raises:
        ExportError: sentence-transformers cannot load the model.
    """
    with calling_libraries(f"{folder} cannot be run by sentence-transformers", "is it an encoder that it supports?"):
        import torch
        from sentence_transformers import SentenceTransformer

        # The option is for the encoder, whose constants must not be computed in half precision either; `float` is for
        # dense layers, to which the option does not apply.
        options = {"dtype": torch.float32}
        return SentenceTransformer(str(folder), device="cpu", local_files_only=True, model_kwargs=options).float()


@contextmanager
def _silence(*, hub_only: bool) -> Iterator[None]:
    """Switch off warnings, logs below CRITICAL and progress bars inside the block; restore the settings afterwards.

    The logs are those of `_SILENCED_LOGGERS` and transformers. With `hub_only`, transformers is neither imported nor
    silenced.
    """
    loggers = [logging.getLogger(name) for name in _SILENCED_LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    # If the root logger had no handler, a library's call of `logging.warning` would add one for good, which prints to
    # stderr.
    handler = logging.NullHandler()
    logging.getLogger().addHandler(handler)
    try:
        with ExitStack() as silent, warnings.catch_warnings():
            silent.enter_context(_silence_hub())
            if not hub_only:
                silent.enter_context(_silence_transformers())
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.getLogger().removeHandler(handler)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _silence_hub() -> Iterator[None]:
    """Switch off the progress bars of huggingface_hub inside the block; restore the setting afterwards."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    bars = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if bars:
            enable_progress_bars()


@contextmanager
def _silence_transformers() -> Iterator[None]:
    """Switch off logs below CRITICAL and progress bars of transformers inside the block; restore them afterwards."""
    from transformers.utils import logging as transformers_logging

    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
