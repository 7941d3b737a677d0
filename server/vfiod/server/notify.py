"""What the service manager is told (``sd_notify(3)``), and that the loop still turns (``sd_watchdog_enabled(3)``)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import Mapping
from typing import Final

from vfiod.protocol.limits import MAX_STATUS, MIN_WATCHDOG_USEC

__all__ = ["Notifier", "Watchdog", "control_group", "watchdog_seconds"]

_log: Final = logging.getLogger("vfiod")


class Notifier:
    """Tells systemd, when it started us. What goes wrong here must not stop the server.

    Connected at once: the sandbox makes no datagram sockets later.
    """

    def __init__(self) -> None:
        self._socket: socket.socket | None = None

        address = os.environ.get("NOTIFY_SOCKET")
        if address:
            if address[0] == "@":
                address = "\0" + address[1:]
            made = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            try:
                made.connect(address)
            except OSError as error:
                made.close()
                self._warn(error)
            else:
                self._socket = made

    @property
    def listening(self) -> bool:
        """Whether there is somebody to tell."""
        return self._socket is not None

    @property
    def datagrams(self) -> socket.socket | None:
        """Connected to the manager, lent: for its store of fds. None: there is nobody."""
        return self._socket

    def follow(self, made: socket.socket) -> None:
        """Tell it by this socket from now on: that of the server whose place was taken. Owned."""
        self.close()
        self._socket = made

    def tell(self, state: str) -> None:
        """Send a state. A manager that does not read is not waited for."""
        if self._socket is not None:
            try:
                self._socket.send(state.encode(), socket.MSG_DONTWAIT)
            except OSError as error:
                self._warn(error)

    def ready(self, status: str) -> None:
        """Say that it serves, and in words what; after :meth:`reloading` too."""
        self.tell(f"READY=1\n{_status(status)}")

    def reloading(self) -> None:
        """Say that the configuration is read again; the manager waits for :meth:`ready`."""
        self.tell(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}\nSTATUS=Reading the configuration again")

    def status(self, status: str) -> None:
        """Say in one line what goes on; ``systemctl status`` shows it."""
        self.tell(_status(status))

    def stopping(self) -> None:
        """Say that it ends."""
        self.tell("STOPPING=1\nSTATUS=Closing devices")

    def _warn(self, error: OSError) -> None:
        # Who has taken another server's place has its socket, and need not know the address.
        _log.warning(
            "Cannot notify the service manager at %s: %s", os.environ.get("NOTIFY_SOCKET", "its socket"), error
        )

    def close(self) -> None:
        """End it."""
        if self._socket is not None:
            self._socket.close()


def _status(status: str) -> str:
    return f"STATUS={' '.join(status.split())[:MAX_STATUS]}"


def watchdog_seconds(environment: Mapping[str, str] = os.environ) -> float | None:
    """After how many seconds of silence the manager takes us for stuck; None: it does not look.

    What it says for another process (``WATCHDOG_PID``), or in no number, is not for us.
    """
    text = environment.get("WATCHDOG_USEC", "")
    if environment.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()) or not text:
        return None
    if not (text.isascii() and text.isdigit()) or not MIN_WATCHDOG_USEC <= int(text) < 1 << 63:
        _log.warning("WATCHDOG_USEC is '%s', expected microseconds from %d: no watchdog", text, MIN_WATCHDOG_USEC)
        return None
    return int(text) / 1e6


def control_group() -> str:
    """Our control group, by which systemd knows which unit is ours (``cgroups(7)``); empty: none can be seen."""
    found = {}
    with contextlib.suppress(OSError), open("/proc/self/cgroup", encoding="utf-8", errors="replace") as file:
        for line in file:
            _, hierarchy, path = line.rstrip("\n").split(":", 2)
            found[hierarchy] = path
    return found.get("name=systemd", found.get("", ""))  # systemd's own hierarchy, or the only one there is


class Watchdog:
    """Says ``WATCHDOG=1`` twice in the time the manager gives, from a timer of the loop: a stuck loop says nothing.

    Args:
        loop: the event loop.
        notifier: says it.
        seconds: what the manager gives.

    """

    def __init__(self, loop: asyncio.AbstractEventLoop, notifier: Notifier, seconds: float) -> None:
        self._loop = loop
        self._notifier = notifier
        self._seconds = seconds / 2
        self._timer: asyncio.TimerHandle | None = None
        self._beat()

    def _beat(self) -> None:
        self._notifier.tell("WATCHDOG=1")
        self._timer = self._loop.call_later(self._seconds, self._beat)

    def stop(self) -> None:
        """Say it no more."""
        if self._timer is not None:
            self._timer.cancel()
