"""A server under somebody's eyes: what it tells the service manager and the journal while it runs, and SIGHUP.

SIGHUP reads the configuration again. What can change in a running server is taken (:data:`RELOADED`); of the rest that
has changed, the log says that it waits for a restart. A file with an error changes nothing.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from vfiod.protocol.settings import SERVE
from vfiod.server import trace
from vfiod.server.events import Event, EventHub
from vfiod.server.logs import about
from vfiod.server.notify import Notifier, Watchdog, watchdog_seconds
from vfiod.server.options import Options

if TYPE_CHECKING:
    from vfiod.server.journal import Journal

__all__ = ["RELOADED", "Supervised"]

_log: Final = logging.getLogger("vfiod")

RELOADED: Final = ("log-level", "trace")
"""The keys that are taken from the file when it is read again, unless the command line has them."""

_COUNTED: Final = frozenset({"DEVICE_ADDED", "DEVICE_DELETED"})


class Supervised:
    """Made before the sandbox closes, with all that it needs open.

    Args:
        loop: the event loop.
        hub: whose events are noted and counted.
        options: of the program.
        devices: how many there are.
        journal: where events go as entries; None: nowhere, but with JSON lines to the log.

    Attributes:
        notifier: tells the service manager.

    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        hub: EventHub,
        options: Options,
        devices: Callable[[], int],
        journal: Journal | None,
    ) -> None:
        self._loop = loop
        self._hub = hub
        self._options = options
        self._devices = devices
        self._journal = journal
        self.notifier: Final = Notifier()
        self._watchdog: Watchdog | None = None
        self._watched: float | None = watchdog_seconds() if self.notifier.listening else None
        self._reloading: asyncio.Task[None] | None = None
        self._patterns = options.trace
        self._values = dict(options.file_values)
        if self.notifier.listening:
            hub.subscribe(self._count)
        if journal is not None or options.log_format == "json":
            hub.subscribe(self._note)

    def follow(self, notify: socket.socket, watchdog: float | None) -> None:
        """Another server's place was taken: tell whom it told, by its socket (owned), and answer its watchdog."""
        if not self.notifier.listening:
            self._hub.subscribe(self._count)
        self.notifier.follow(notify)
        self._watched = watchdog

    @property
    def watched(self) -> float | None:
        """After how many seconds of silence the manager takes us for stuck; None: it does not look."""
        return self._watched

    def ready(self) -> None:
        """The server serves: say so, listen to SIGHUP, and begin to answer the watchdog."""
        self._loop.add_signal_handler(signal.SIGHUP, self.reload)
        self.notifier.ready(self._status())
        if self._watched is not None:
            self._watchdog = Watchdog(self._loop, self.notifier, self._watched)

    def stopping(self) -> None:
        """The server closes its devices. The watchdog is answered still: that may take a while."""
        self._loop.remove_signal_handler(signal.SIGHUP)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        if self._reloading is not None:
            self._reloading.cancel()
        self.notifier.stopping()

    def close(self) -> None:
        """Say no more."""
        if self._watchdog is not None:
            self._watchdog.stop()
        self.notifier.close()

    def reload(self) -> None:
        """Read the configuration again; while that goes on, a further wish for it is the same one."""
        if self._reloading is None:
            self._reloading = self._loop.create_task(self._reload())

    async def _reload(self) -> None:
        self.notifier.reloading()
        try:
            problem = await self._read_again()
        finally:
            self._reloading = None
        self.notifier.ready(f"{self._status()}; {problem}" if problem else self._status())

    async def _read_again(self) -> str:
        """Take what has changed. Returns what was wrong, in short; empty: nothing."""
        path = self._options.config
        if path is None:
            _log.warning("SIGHUP: there is no configuration to read again: start with --config")
            return "no configuration to read again"
        from vfiod.server.configuration import ConfigurationError, read

        try:
            values, _ = await asyncio.to_thread(read, path)
        except ConfigurationError as error:
            _log.error("Nothing has changed: %s", error)
            return "the configuration was refused, see the log"
        changed = [one.name for one in SERVE if self._values.get(one.name) != values.get(one.name)]
        self._values = values
        self._take(values)
        late = [key for key in changed if key not in RELOADED and key not in self._options.said]
        if late:
            _log.warning("%s of '%s' will be taken by the next start", ", ".join(late), path)
        _log.info("Read '%s' again", path)
        return ""

    def _take(self, values: dict[str, Any]) -> None:
        if "log-level" not in self._options.said:
            logging.getLogger().setLevel(values.get("log-level", "warning").upper())
        if "trace" not in self._options.said:
            wanted = values.get("trace", ())
            patterns = (wanted,) if isinstance(wanted, str) else tuple(wanted)
            for pattern in self._patterns:
                if pattern not in patterns:
                    trace.switch(pattern, False)
            for pattern in patterns:
                if not trace.switch(pattern, True):
                    _log.warning("trace '%s' matches no trace point", pattern)
            self._patterns = patterns

    def _status(self) -> str:
        count = self._devices()
        return f"Serving {self._options.name}: {count} device{'' if count == 1 else 's'}"

    def _count(self, event: Event) -> None:
        if event.spec.name in _COUNTED:
            self._loop.call_soon(lambda: self.notifier.status(self._status()))  # when it is over

    def _note(self, event: Event) -> None:
        from vfiod.server.journal import event_level, in_words

        level = event_level(event.spec.name)
        if not _log.isEnabledFor(level):
            return
        if self._journal is not None:
            self._journal.event(event.seq, event.spec, event.data)
        else:
            words, fields = in_words(event.seq, event.spec, event.data)
            _log.log(level, "%s", words, extra=about(**fields))
