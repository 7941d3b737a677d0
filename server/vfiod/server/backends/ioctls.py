"""Making ioctls, with errors that name the request, the object and what to do."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from vfiod.protocol import vfio
from vfiod.protocol.errors import OperationFailed
from vfiod.server.kernel.syscalls import Syscalls

__all__ = ["Advice", "call", "call_info", "failed"]

Advice = Mapping[int, str]
"""What to do about an errno, by number."""

NO_ADVICE: Final[Advice] = MappingProxyType({})

_MAX_INFO: Final = 1 << 20
"""Bytes of an INFO structure: the largest known has some 2,000 vectors; an answer that wants more is broken."""

_MAX_ATTEMPTS: Final = 8
"""An answer may grow between two calls; one that always grows is broken."""


def failed(operation: str, what: str, error: OSError, advice: Advice = NO_ADVICE) -> OperationFailed:
    """Turn what the kernel said into an error that says what was done, and to what."""
    number = error.errno or 0
    return OperationFailed(operation, what, errno=number, advice=advice.get(number, ""))


def call(
    calls: Syscalls,
    fd: int,
    request: vfio.Ioctl,
    argument: int | bytearray,
    what: str,
    advice: Advice = NO_ADVICE,
) -> int:
    """One ioctl on the object ``what``. Returns what the kernel returned. Raises OperationFailed."""
    try:
        return calls.ioctl(fd, request, argument)
    except OSError as error:
        raise failed(request.name, what, error, advice) from error


def call_info(calls: Syscalls, fd: int, request: vfio.Ioctl, question: bytes, what: str) -> bytes:
    """One INFO ioctl, asked again with a larger buffer until the whole answer fits.

    Args:
        calls: the system calls.
        fd: the object's fd.
        request: which INFO.
        question: the packed fixed part, with ``argsz`` and what is asked for.
        what: the object, for messages.

    Raises:
        OperationFailed: the kernel's errno; EPROTO when the answer never fits.

    """
    size = len(question)
    for _ in range(_MAX_ATTEMPTS):
        buffer = bytearray(question) + bytes(size - len(question))
        buffer[:4] = size.to_bytes(4, sys.byteorder)
        call(calls, fd, request, buffer, what)
        need = vfio.argsz_of(buffer)
        if need <= size:
            return bytes(buffer)
        if need > _MAX_INFO:
            break
        size = need
    raise OperationFailed(request.name, what, errno="EPROTO", advice=f"the answer does not fit into {_MAX_INFO} bytes")
