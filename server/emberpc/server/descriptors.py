"""File descriptors of the process: raise and read their limit, and report that no descriptor is free."""

from __future__ import annotations

import errno
import os
import resource

from emberpc.server.errors import Code, ServiceError

#: `reason` of the error for a call that needs a file descriptor when none is free. Programs compare it.
SHORTAGE = "FILES_EXHAUSTED"


def raise_limit() -> tuple[int, int]:
    """Raise the soft limit of open files to the hard limit, if the system allows that.

    Returns:
        The soft limit before and after; both are equal if the limit was not raised. `resource.RLIM_INFINITY`: no limit.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):  # macOS refuses values above a system limit that is less than the hard limit
        return soft, soft
    return soft, hard


def limit() -> int:
    """Return the soft limit of the number of descriptors that this process may open; 2,147,483,647: no limit."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 2**31 - 1 if soft == resource.RLIM_INFINITY else soft


def is_shortage(error: OSError) -> bool:
    """Return whether an error means that no descriptor is free in this process (EMFILE) or on this host (ENFILE)."""
    return error.errno in (errno.EMFILE, errno.ENFILE)


def none_free(needed: int = 1) -> bool:
    """Return whether fewer than `needed` descriptors are free now: try to open that many, and close them again.

    Called after an error of a library that does not state the cause, which may be a lack of descriptors.

    Args:
        needed: maximum number of descriptors that the library opens at a time. The library must have closed them before
            this call.
    """
    opened: list[int] = []
    try:
        for _ in range(needed):
            opened.append(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        return is_shortage(error)
    finally:
        for descriptor in opened:
            os.close(descriptor)
    return False


def shortage_at_start() -> str:
    """Return the end of the message, with problem and remedy, for a server start that finds no free descriptor."""
    return (
        f"no file descriptor is free (this process may have {limit()} open files); start the server with a higher "
        "limit (ulimit -n, LimitNOFILE of systemd)"
    )


def shortage() -> ServiceError:
    """Return the RESOURCE_EXHAUSTED error of a call that needs a file descriptor when none is free; retry after 1 s."""
    return ServiceError(
        Code.RESOURCE_EXHAUSTED,
        f"the server has no free file descriptor (its limit is {limit()}); try again, close connections, lower "
        "--max-open-collections, or start the server with a higher limit (ulimit -n, LimitNOFILE of systemd)",
        reason=SHORTAGE,
        metadata={"limit": str(limit())},
        retry_after=1.0,
    )
