"""Memory of a device that its user may map: a file of its own, which nobody can cut."""

from __future__ import annotations

import fcntl
import os

from vfiod.protocol.fd import FileDescriptor

__all__ = ["sealed_memory"]


def sealed_memory(name: str, size: int) -> FileDescriptor:
    """Fresh memory, zeroes. OSError.

    Args:
        name: what ``/proc/PID/maps`` calls it.
        size: bytes.

    """
    # MFD_NOEXEC_SEAL would be right as well, and needs Linux 6.3.
    memory = FileDescriptor(os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    try:
        os.ftruncate(memory.number, size)
        # Whoever gets the file can never cut it: that would be SIGBUS for all others.
        fcntl.fcntl(memory.number, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except BaseException:
        memory.close()
        raise
    return memory
