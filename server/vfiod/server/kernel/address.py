"""Where a mapping starts in this process, which ``mmap`` does not tell."""

from __future__ import annotations

import ctypes
import mmap

__all__ = ["address_of"]


class _PyBuffer(ctypes.Structure):
    """``Py_buffer`` (CPython's C interface, part of the stable ABI since 3.11)."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


def address_of(mapped: mmap.mmap) -> int:
    """Where a mapping starts. ``ctypes``'s ``from_buffer`` cannot say it of a read-only one."""
    buffer = _PyBuffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(mapped), ctypes.byref(buffer), 0)
    try:
        return int(buffer.buf)
    finally:
        ctypes.pythonapi.PyBuffer_Release(ctypes.byref(buffer))
