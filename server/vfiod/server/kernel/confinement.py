"""Whether this process has confined itself (``--sandbox``), for whoever has to explain an error."""

from __future__ import annotations

import errno

__all__ = ["advice", "enter", "is_confined"]

_confined = False


def enter() -> None:
    """From now on. There is no way back, in the kernel either."""
    global _confined
    _confined = True


def is_confined() -> bool:
    """Whether the sandbox is closed."""
    return _confined


def advice(code: int | None, option: str = "--allow-path") -> str:
    """What else an error may mean in a sandbox, and the option that would help; empty when it can mean nothing else."""
    if not _confined or code not in (errno.EACCES, errno.EPERM):
        return ""
    return f"; the sandbox may be what refuses this: start the server with {option}, or pass an open fd"
