"""The tree of errors, and the one table that names them on the wire.

::

    VfiodError
    ├── WireError                     the bytes cannot be understood
    │   ├── JsonSyntaxError             not JSON
    │   ├── InvalidRequest              JSON, but not a request of this dialect
    │   └── LimitExceeded               too long, too deep, too many
    ├── CommandError                  a request was understood and is refused, or failed
    │   ├── CommandNotFound
    │   ├── InvalidArgument             an argument: which, its value, what was expected
    │   ├── DeviceNotFound
    │   ├── DeviceNotActive             it exists, in a state that cannot do this
    │   ├── PermissionRefused
    │   ├── Busy                        somebody else is at it; EBUSY
    │   ├── TimedOut                    ETIMEDOUT
    │   ├── OperationFailed             the kernel, a parent or a peer said no: operation, object, errno
    │   └── InternalError               a defect of vfiod's own
    └── RemoteError                   raised by the client: the server answered with an error

A :class:`CommandError` always says three things: what was wrong, where, and what would be right. Its
``errno`` is the *name* (``"EBUSY"``), never a number: numbers differ between architectures.
"""

from __future__ import annotations

import enum
import errno as _errno
from typing import ClassVar, Final

from vfiod.protocol.limits import MAX_ERROR_TEXT

__all__ = [
    "ErrorClass",
    "VfiodError",
    "WireError",
    "JsonSyntaxError",
    "InvalidRequest",
    "LimitExceeded",
    "CommandError",
    "CommandNotFound",
    "InvalidArgument",
    "DeviceNotFound",
    "DeviceNotActive",
    "PermissionRefused",
    "Busy",
    "TimedOut",
    "OperationFailed",
    "InternalError",
    "RemoteError",
    "JSONRPC_PARSE_ERROR",
    "JSONRPC_INVALID_REQUEST",
    "errno_name",
]


class ErrorClass(enum.StrEnum):
    """QMP error classes (QEMU ``qapi/error.json``). Clients may branch on these; never on the text."""

    GENERIC = "GenericError"
    COMMAND_NOT_FOUND = "CommandNotFound"
    DEVICE_NOT_ACTIVE = "DeviceNotActive"
    DEVICE_NOT_FOUND = "DeviceNotFound"


# JSON-RPC 2.0, section 5.1. -32000 to -32099 are the server's own.
JSONRPC_PARSE_ERROR: Final = -32700
JSONRPC_INVALID_REQUEST: Final = -32600


def errno_name(number: int) -> str:
    """``EBUSY`` for 16. A number the platform has no name for comes back as ``errno 4242``."""
    # Two names of one number: the kernel's sources say EOPNOTSUPP, Python ENOTSUP.
    if number == _errno.EOPNOTSUPP:
        return "EOPNOTSUPP"
    return _errno.errorcode.get(number, f"errno {number}")


class VfiodError(Exception):
    """The root. ``str(error)`` is a whole sentence without a final full stop, fit to show to a person."""

    #: QMP's class for this error.
    error_class: ClassVar[ErrorClass] = ErrorClass.GENERIC
    #: JSON-RPC's code for this error.
    jsonrpc_code: ClassVar[int] = -32000

    def __init__(self, desc: str = "") -> None:
        super().__init__(_presentable(desc))


def _presentable(text: str) -> str:
    """A sentence that repeats what was sent may be megabytes long, and hold control characters of a terminal."""
    if len(text) > MAX_ERROR_TEXT:
        half = MAX_ERROR_TEXT // 2
        text = f"{text[:half]} [... {len(text) - 2 * half} characters ...] {text[-half:]}"
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() or one == "\n" else ascii(one)[1:-1] for one in text)


class WireError(VfiodError):
    """What arrived cannot be understood. The stream stays in step: the session goes on."""

    jsonrpc_code = JSONRPC_INVALID_REQUEST


class JsonSyntaxError(WireError):
    """Not JSON."""

    jsonrpc_code = JSONRPC_PARSE_ERROR


class InvalidRequest(WireError):
    """JSON, but not a request of this dialect."""


class LimitExceeded(WireError):
    """Longer, deeper or more than a constant of :mod:`vfiod.protocol.limits` allows."""


class CommandError(VfiodError):
    """A request that was understood, and is refused or failed. Nothing has changed.

    Args:
        desc: a sentence that names what was wrong, where, and what would be right.
        errno: the errno behind it, by name or number, when a system call or peer gave one.

    """

    def __init__(self, desc: str, *, errno: str | int | None = None) -> None:
        super().__init__(desc)
        self.errno: str | None = errno_name(errno) if isinstance(errno, int) else errno


class CommandNotFound(CommandError):
    """No such command, or not in this state of the session."""

    error_class = ErrorClass.COMMAND_NOT_FOUND
    jsonrpc_code = -32601


class InvalidArgument(CommandError):
    """An argument is missing, unexpected, of the wrong type or out of range."""

    jsonrpc_code = -32602


class DeviceNotFound(CommandError):
    """No device has this id."""

    error_class = ErrorClass.DEVICE_NOT_FOUND
    jsonrpc_code = -32001

    @classmethod
    def named(cls, device: str) -> DeviceNotFound:
        """QEMU's own words."""
        return cls(f"Device '{device}' not found")


class DeviceNotActive(CommandError):
    """The device exists, but its state cannot do this."""

    error_class = ErrorClass.DEVICE_NOT_ACTIVE
    jsonrpc_code = -32002


class PermissionRefused(CommandError):
    """The caller, or this server, may not do this."""

    jsonrpc_code = -32003


class Busy(CommandError):
    """Somebody else is at it. Try again, or use what the text names."""

    jsonrpc_code = -32004

    def __init__(self, desc: str, *, errno: str | int | None = "EBUSY") -> None:
        super().__init__(desc, errno=errno)


class TimedOut(CommandError):
    """It did not finish within the time asked for."""

    jsonrpc_code = -32005

    def __init__(self, desc: str, *, errno: str | int | None = "ETIMEDOUT") -> None:
        super().__init__(desc, errno=errno)


class OperationFailed(CommandError):
    """A system call, a parent or a peer said no.

    Args:
        operation: the kernel's name where there is one (``VFIO_GROUP_SET_CONTAINER``).
        what: the object it was done to (``group 7``, ``device 'nic0' region bar0``).
        errno: name or number.
        advice: what to do about it, when that is known.

    """

    jsonrpc_code = -32006

    def __init__(self, operation: str, what: str, *, errno: str | int, advice: str = "") -> None:
        name = errno_name(errno) if isinstance(errno, int) else errno
        super().__init__(f"{operation} on {what} failed with {name}" + (f": {advice}" if advice else ""), errno=name)
        self.operation = operation
        self.what = what
        self.advice = advice


class InternalError(CommandError):
    """A defect of vfiod's own. The traceback is in the log; the reply carries no internals."""

    jsonrpc_code = -32603


class RemoteError(VfiodError):
    """Raised by the client: the server answered with an error.

    Attributes:
        remote_class: the QMP class (:class:`ErrorClass` when known, else the text as it came).
        desc: the server's sentence.
        errno: the errno's name, when the server gave one.
        command: the command that was answered.

    """

    def __init__(self, command: str, remote_class: str, desc: str, errno: str | None = None) -> None:
        super().__init__(f"{command}: {desc}")
        self.command = command
        self.remote_class = remote_class
        self.desc = desc
        self.errno = errno
