"""System calls that Python has no name for, as cheaply as possible.

This is done in every server, at its start, so ``ctypes`` (a few milliseconds, half a MiB) is left alone: the extension
behind it does what is needed here. That extension is CPython's own business, but these parts of it have been as they
are since 2.5.
"""

from __future__ import annotations

import _ctypes
import os

__all__ = ["address_of", "syscall"]


class _Long(_ctypes._SimpleCData):  # type: ignore[type-arg]
    _type_ = "l"


class _Byte(_ctypes._SimpleCData):  # type: ignore[type-arg]
    _type_ = "c"


class _Function(_ctypes.CFuncPtr):
    _flags_ = _ctypes.FUNCFLAG_CDECL | _ctypes.FUNCFLAG_USE_ERRNO
    _argtypes_ = (_Long,) * 6
    _restype_ = _Long


_program = _ctypes.dlopen(None, 0)  # type: ignore[arg-type]  # None: what is loaded already
_syscall = _Function(_ctypes.dlsym(_program, "syscall"))


def syscall(number: int, *arguments: int) -> int:
    """Make a system call with at most five arguments. Raises OSError."""
    result: int = _syscall(number, *arguments, *(0,) * (5 - len(arguments)))
    if result < 0:
        code = _ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def address_of(data: bytearray) -> int:
    """Where the bytes are; they stay there as long as the object is neither resized nor forgotten."""
    return _ctypes.addressof(_Byte.from_buffer(data))
