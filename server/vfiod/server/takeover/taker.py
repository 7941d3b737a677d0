"""The end that takes: connects, asks, takes what comes, and owns it when the other end says so, or is dead."""

from __future__ import annotations

import logging
import os
import select
import socket
import time
from typing import Final

from vfiod.protocol.fd import FileDescriptor
from vfiod.protocol.limits import TAKE_OVER_MS
from vfiod.server.notify import control_group
from vfiod.server.sockets.access import peer_of
from vfiod.server.state.format import VERSION
from vfiod.server.takeover.conversation import (
    PROTOCOL,
    BadHandOver,
    Begin,
    Commit,
    Hello,
    Owned,
    Ready,
    Refuse,
    Taker,
    TakerState,
    Welcome,
    Whole,
)
from vfiod.server.takeover.server import STORE
from vfiod.server.takeover.whole import program_version
from vfiod.server.takeover.wire import AGAIN_S, Ended, Wire

__all__ = ["Refused", "TakingOver"]

_log: Final = logging.getLogger(__name__)


class Refused(BadHandOver):
    """It does not come to a hand-over: everything is still the other process's."""


class TakingOver:
    """One take-over, from connecting to owning. Everything here blocks: this process has nothing else to do yet.

    Args:
        path: where the running process hands over (``--hand-over``).
        orphan: this process outlives its parent.

    Attributes:
        welcome: what there is.

    Raises Refused.

    """

    def __init__(self, path: str, *, orphan: bool = False) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._pidfd: FileDescriptor | None = None
        self._taker = Taker()
        try:
            self._socket.settimeout(TAKE_OVER_MS / 1000)
            try:
                self._socket.connect(path)
            except OSError as error:
                raise Refused(f"Nobody hands over at '{path}': {os.strerror(error.errno or 0)}") from error
            self._watch_giver()
            self._wire = Wire(self._socket)
            self.welcome = self._greet(orphan=orphan)
        except BaseException:
            self.close()
            raise

    def _watch_giver(self) -> None:
        try:
            pid = peer_of(self._socket).pid
        except OSError as error:
            raise Refused(f"Who hands over cannot be asked for: {os.strerror(error.errno or 0)}") from error
        try:
            self._pidfd = FileDescriptor(os.pidfd_open(pid))
        except OSError as error:  # another pid namespace, or a kernel before 5.3: its socket alone tells
            _log.debug("The other process cannot be watched: %s", error)

    def _greet(self, *, orphan: bool) -> Welcome:
        try:
            self._wire.send(Hello(PROTOCOL, VERSION, program_version(), unit=control_group(), orphan=orphan))
            answer = self._wire.receive()
            self._taker.hear(answer)
        except (OSError, BadHandOver) as error:
            raise Refused(f"The running server does not answer: {error}") from error
        if isinstance(answer, Refuse):
            raise Refused(f"The running server refuses: {answer.reason}")
        assert isinstance(answer, Welcome)  # noqa: S101 - the table lets nothing else through
        return answer

    def refuse(self, reason: str) -> None:
        """We cannot: nothing has moved, or all of it stays where it is. Never raises."""
        try:
            self._wire.send(Refuse(reason))
        except (OSError, BadHandOver) as error:
            _log.debug("The refusal did not arrive: %s", error)
        self.close()

    def receive(self) -> tuple[bytes, list[FileDescriptor]]:
        """Say that we can, and take everything; the caller owns the fds. Raises Refused."""
        self._say(Begin())
        try:
            answer = self._wire.receive()
            self._taker.hear(answer)
            if isinstance(answer, Whole):
                return self._wire.receive_whole(answer)
        except (OSError, BadHandOver) as error:
            raise Refused(f"The hand-over broke off: {error}") from error
        raise Refused(f"The running server keeps everything: {getattr(answer, 'reason', '')}")

    def own(self) -> None:
        """It is made: be the owner when the other end says so, or is dead. Raises Refused: it keeps everything.

        With a store of fds only its word counts: after its death whoever keeps them starts another server with them.
        """
        kept = STORE in self.welcome.needs
        self._say(Ready())
        self._socket.settimeout(None)
        try:
            answer = self._wire.receive()
            self._taker.hear(answer)
        except Ended as error:
            if kept or not self._is_dead() or not self._taker.giver_died():
                raise Refused(f"The hand-over broke off: {error}") from error
            _log.warning("The running server died when all was ready: everything is ours")
            return
        except (OSError, BadHandOver) as error:
            raise Refused(f"The hand-over broke off: {error}") from error
        if not isinstance(answer, Commit):
            raise Refused(f"The running server keeps everything: {getattr(answer, 'reason', '')}")
        if kept:
            return  # it has ended by now: whoever keeps the fds watches us
        try:
            self._wire.send(Owned())
        except BadHandOver:
            _log.warning("The running server died when all was handed over")

    def _say(self, message: Begin | Ready) -> None:
        self._taker.say(message)
        try:
            self._wire.send(message)
        except Ended as error:
            # Dead after everything came: what it can no longer say, its end says.
            if self._taker.state is not TakerState.READY:
                raise Refused("The running server is gone") from error
        except OSError as error:
            raise Refused(f"The hand-over broke off: {error}") from error

    def _is_dead(self) -> bool:
        """Whether the other process has ended. It closes the connection only by that, once all was sent."""
        if self._pidfd is None:
            return True
        waiting = select.poll()
        waiting.register(self._pidfd.number, select.POLLIN)
        end = time.monotonic() + TAKE_OVER_MS / 1000
        while (left := end - time.monotonic()) > 0:
            try:
                return bool(waiting.poll(left * 1000))
            except OSError as error:  # ENOMEM: no answer
                _log.debug("The other process cannot be waited for: %s", error)
                time.sleep(AGAIN_S)
        return False

    def wait_for_end(self) -> None:
        """Wait until the other process has ended, and with it its ports, locks and addresses are free; not for ever."""
        if self._pidfd is not None and not self._is_dead():
            _log.warning("The former server does not end; what it has locked or bound cannot be had")

    def close(self) -> None:
        """Close what the take-over itself needed. Later calls do nothing."""
        self._socket.close()
        if self._pidfd is not None:
            self._pidfd.close()
            self._pidfd = None
