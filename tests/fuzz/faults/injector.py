"""Fails the n-th call at the one module of system calls, whoever makes it: the machine's kernel, or the real one.

Every public method of :class:`~vfiod.server.kernel.syscalls.Syscalls` and of its model
(:class:`~tests.unit.server.fake_kernel.FakeKernel`) is wrapped while :func:`installed` is. A call that the model makes
itself inside of another is not counted. Nothing happens unless a :class:`Injector` is armed.
"""

from __future__ import annotations

import errno
import gc
import os
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.unit.server.fake_kernel import FakeKernel

from vfiod.protocol import vfio
from vfiod.server.kernel.syscalls import Syscalls

__all__ = ["SHORT", "Call", "Fault", "Injector", "installed"]

SHORT = -1
"""Instead of an errno: a read or write of fewer bytes, a text that is empty, an answer of no."""

EMPTY = -2
"""Instead of an errno: a read of nothing."""

NOT_A_CALL = frozenset({"close", "fstat", "link_of", "memory_lock_limit", "open_file_limit"})
"""What is asked of open fds we own does not fail, of memory and devices; nor do the limits."""


@dataclass(frozen=True)
class Call:
    """One call of an operation: which, and the how-manyth of its name."""

    name: str
    nth: int

    def __str__(self) -> str:
        return f"{self.name}#{self.nth}"


@dataclass(frozen=True)
class Fault:
    """What befalls a call."""

    call: Call
    number: int
    """An errno, :data:`SHORT` or :data:`EMPTY`."""

    def __str__(self) -> str:
        word = {SHORT: "short", EMPTY: "empty"}.get(self.number) or errno.errorcode[self.number]
        return f"{self.call}={word}"


@dataclass
class Injector:
    """Counts calls, and fails one.

    Attributes:
        fault: which call fails, and how; None: none does.
        calls: those that were made while it was armed.
        met: whether the fault has happened.

    """

    fault: Fault | None = None
    calls: list[Call] = field(default_factory=list)
    met: bool = False
    _counts: dict[str, int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def meet(self, name: str) -> int:
        """One call: 0, or what befalls it."""
        with self._lock:
            nth = self._counts[name] = self._counts.get(name, 0) + 1
            call = Call(name, nth)
            self.calls.append(call)
            if self.fault is not None and self.fault.call == call:
                self.met = True
                return self.fault.number
        return 0

    @contextmanager
    def armed(self) -> Iterator[None]:
        """Count and fail what is called within."""
        global _armed
        assert _armed is None
        _armed = self
        try:
            yield
        finally:
            _armed = None


_armed: Injector | None = None
_inside = threading.local()


@contextmanager
def unlimited() -> Iterator[None]:
    """What the model of the kernel opens for itself is not the server's."""
    if not _short_of_fds:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


_short_of_fds = False


@contextmanager
def short_of_fds(left: int) -> Iterator[None]:
    """This process can open so many more fds (RLIMIT_NOFILE), and no more: every call that makes one says EMFILE."""
    global _short_of_fds
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = {int(name) for name in os.listdir("/proc/self/fd")}
    used = {number for number in used if _is_open(number)}
    limit, free = 0, left
    while free or limit in used:
        free -= limit not in used
        limit += 1
    _short_of_fds = True
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        _short_of_fds = False


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _name(method: str, arguments: tuple[Any, ...]) -> str:
    if method == "ioctl":
        request = arguments[1]
        return request.name if isinstance(request, vfio.Ioctl) else f"ioctl-{request:#x}"
    return method


def _befall(method: str, number: int, arguments: tuple[Any, ...]) -> Any:
    """What a call that fails gives, or raises."""
    if number > 0:
        if method in ("exists", "same_file"):
            return {"exists": False, "same_file": None}[method]
        raise OSError(number, os.strerror(number))
    match method:
        case "pwrite":
            return len(arguments[1]) // 2 if number == SHORT else 0
        case "read_text":
            return ""
        case "list_directory":
            return ()
    raise AssertionError(method)


def _wrapped(method: str, real: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        if getattr(_inside, "depth", 0):
            return real(self, *arguments, **named)
        number = 0 if _armed is None else _armed.meet(_name(method, arguments))
        _inside.depth = 1
        try:
            if number == SHORT and method == "pread":
                return real(self, *arguments, **named)[: -(-arguments[1] // 2)]
            if number == EMPTY and method == "pread":
                return b""
            if number:
                return _befall(method, number, arguments)
            if _short_of_fds and method in ("open", "eventfd"):
                os.close(os.dup(0))  # EMFILE when there is none left
            with unlimited():
                return real(self, *arguments, **named)
        finally:
            _inside.depth = 0

    return call


@contextmanager
def installed() -> Iterator[None]:
    """Wrap the module and its model; both are put back as they were."""
    saved: list[tuple[type, str, Any]] = []
    names = [name for name in vars(Syscalls) if not name.startswith("_") and name not in NOT_A_CALL]
    try:
        owners: tuple[type[Syscalls], ...] = (Syscalls, FakeKernel)
        for owner in owners:
            for name in names:
                if name in vars(owner):
                    saved.append((owner, name, vars(owner)[name]))
                    setattr(owner, name, _wrapped(name, vars(owner)[name]))
        gc.collect()
        gc.freeze()  # what is there already need not be looked at after every run
        yield
    finally:
        gc.unfreeze()
        for wrapped, name, real in saved:
            setattr(wrapped, name, real)
