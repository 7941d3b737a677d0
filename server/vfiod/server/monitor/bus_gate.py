"""How many may be connected to one socket of the bus.

ZeroMQ has no bound of its own, and ends the process when it runs out of open files in accepting (``ipc_listener.cpp``:
EMFILE is none of the errors it expects). But it reports each connection it has accepted, on a socket between its thread
and ours (``zmq_socket_monitor(3)``). A thread of the gate reads that, and shuts down what is too many. When
:data:`~vfiod.protocol.limits.BUS_SURGE` reports wait to be read, ZeroMQ's thread waits, too: it is never further ahead
than that, however many come at once, and so many files are kept free for it (:mod:`vfiod.server.kernel.open_files`).

A thread and not the loop: a flood must not be the loop's business, and reports must be read while ZeroMQ is told to
make no more of them (``zmq_socket_monitor`` with no address waits for its thread, which waits for us).
"""

from __future__ import annotations

import logging
import socket
import struct
import threading
from typing import Any, Final

import zmq

from vfiod.protocol.limits import BUS_SURGE, MAX_BUS_CLIENTS
from vfiod.server.kernel import open_files

__all__ = ["Gate"]

_log: Final = logging.getLogger(__name__)

_REPORTS: Final = zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_MONITOR_STOPPED
_REPORT: Final = struct.Struct("=HI")
"""A report's first frame: what happened, and to which fd."""


class Gate:
    """Counts the connections of one socket, and keeps them few. Make it before the socket is bound.

    Args:
        watched: the socket.
        context: its context.
        name: what it listens on, for messages.

    Attributes:
        place: what the socket is bound to: the name of a Unix socket, or a port of TCP; None before that.
        connections: how many there are.
        refused: how many were too many.

    """

    def __init__(self, watched: zmq.Socket[bytes], context: zmq.Context[Any], name: str) -> None:
        self.place: str | bytes | int | None = None
        self.connections = 0
        self.refused = 0
        self._watched = watched
        self._name = name
        self._reports: zmq.Socket[bytes] = context.socket(zmq.PAIR)
        self._reports.setsockopt(zmq.LINGER, 0)
        self._reports.setsockopt(zmq.RCVHWM, 1)  # the fewest: what waits here are connections
        watched.monitor("inproc://gate", _REPORTS)
        self._reports.connect("inproc://gate")
        self._thread = threading.Thread(target=self._watch, name="vfiod-bus-gate", daemon=True)
        self._thread.start()
        open_files.reserve(MAX_BUS_CLIENTS + BUS_SURGE)

    def close(self) -> None:
        """Count no more. Before the socket is closed."""
        self._watched.disable_monitor()
        self._thread.join()
        open_files.reserve(-(MAX_BUS_CLIENTS + BUS_SURGE))

    # --- in the thread ----------------------------------------------------------------------------------------

    def _watch(self) -> None:
        inside: set[int] = set()
        going: set[int] = set()
        with self._reports:
            while True:
                frames = self._reports.recv_multipart()
                what, number = _REPORT.unpack_from(frames[0])
                if what == zmq.EVENT_MONITOR_STOPPED:
                    return
                if what == zmq.EVENT_DISCONNECTED:
                    inside.discard(number)
                    going.discard(number)
                elif len(inside) < MAX_BUS_CLIENTS:
                    inside.add(number)
                else:
                    going.add(number)
                if going and not self._reports.poll(0):
                    # What was reported to be gone meanwhile is not among them: its number may be another's by now.
                    for one in going:
                        self._refuse(one)
                    going.clear()
                self.connections = len(inside)

    def _refuse(self, number: int) -> None:
        """Shut one down; ZeroMQ sees its end, and closes it."""
        try:
            connection = socket.socket(fileno=number)
        except OSError:
            return  # it is gone already
        try:
            if self._is_ours(connection):
                connection.shutdown(socket.SHUT_RDWR)
                self.refused += 1
                if self.refused.bit_count() == 1:  # of a flood few lines: the 1st, 2nd, 4th, 8th, ...
                    _log.warning(
                        "%d connections to %s were refused: it has %d, no more are allowed",
                        self.refused,
                        self._name,
                        MAX_BUS_CLIENTS,
                    )
        except OSError as error:
            _log.debug("A connection was gone before it was refused: %s", error)
        finally:
            connection.detach()

    def _is_ours(self, connection: socket.socket) -> bool:
        """Whether what has this number now was accepted by the bus: it bears the address of what it came by."""
        name = connection.getsockname()
        if connection.family == socket.AF_UNIX:
            return bool(name == self.place)
        return isinstance(self.place, int) and isinstance(name, tuple) and name[1] == self.place
