"""What the process was given: locked memory and open files, looked at before it begins."""

from __future__ import annotations

import logging
import resource
from typing import Final

from vfiod.server.kernel.syscalls import Syscalls

__all__ = ["MEMORY_LOCK", "OPEN_FILES", "check", "keep_memory_lock"]

_log: Final = logging.getLogger("vfiod")

OPEN_FILES: Final = 4096
"""Open files that are enough for a VM with eight devices of 256 vectors each, an eventfd counted once."""

MEMORY_LOCK: Final = 64 << 20
"""Bytes of locked memory below which no VM fits: the kernel's usual limit is 8 MiB."""


def keep_memory_lock() -> bool:
    """Turn what CAP_IPC_LOCK allows into a limit of the same size, before the capability goes. False: it cannot."""
    infinite = resource.RLIM_INFINITY
    try:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (infinite, infinite))
    except (OSError, ValueError):
        return False
    return True


def check(*, host_devices: bool) -> None:
    """Say what is too little, with its value, and what would be right.

    Args:
        host_devices: that devices of the host will come is certain, and locked memory needed.

    """
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY and files < OPEN_FILES:
        _log.warning(
            "At most %d files can be open (RLIMIT_NOFILE): devices with many vectors need %d "
            "(systemd: LimitNOFILE=, else ulimit -n)",
            files,
            OPEN_FILES,
        )
    locked = Syscalls().memory_lock_limit()
    if locked is not None and locked < MEMORY_LOCK and not Syscalls().may_lock_any_memory():
        _log.log(
            logging.WARNING if host_devices else logging.INFO,
            "At most %d bytes can be locked (RLIMIT_MEMLOCK): a device of the host needs the guest's memory and "
            "a little more (systemd: LimitMEMLOCK=infinity, else ulimit -l unlimited)",
            locked,
        )
