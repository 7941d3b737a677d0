"""The audit log: every command that may change something, who asked for it, and what became of it.

One JSON object per line, appended with one ``write`` each, so that lines of several servers never mix. Secrets are
left out, long values are cut. A line for a person is no entry: the command it means is (``commands/human.py``). What
cannot be written is said once on the ordinary log, and counted: a full disk must not stop a VM.
"""

from __future__ import annotations

import logging
import os
import time
from typing import TYPE_CHECKING, Any, Final

import msgspec
from msgspec import UNSET, Struct

from vfiod.protocol.catalogue import Arguments
from vfiod.protocol.catalogue.devices import SECRET
from vfiod.protocol.errors import VfiodError

if TYPE_CHECKING:
    from vfiod.server.journal import Journal

__all__ = ["Audit", "AuditError", "Asker"]

_log: Final = logging.getLogger(__name__)

NOTICE, WARNING = 5, 4
"""Priorities of entries of the journal."""

MAX_VALUE: Final = 128
"""Characters of one value that are written."""


class AuditError(VfiodError):
    """The log cannot be opened."""


class Asker(Struct, frozen=True):
    """Who asked.

    Attributes:
        session: its number; None: the bus.
        dialect: ``qmp``, ``jsonrpc`` or ``bus``.
        uid: the user, as the kernel gave it; None: not known (the bus).
        pid: the process.
        role: of the socket it came in by.

    """

    session: int | None
    dialect: str
    uid: int | None
    pid: int | None
    role: str


class Audit:
    """The log, open for appending.

    Args:
        path: of the file, made with mode 0600 where it is not there; ``-`` for standard error.
        journal: takes what would go to standard error, as entries with fields.

    Raises:
        AuditError: it cannot be opened.

    """

    def __init__(self, path: str, journal: Journal | None = None) -> None:
        self.path: Final = path
        self.written = 0
        self.failed = 0
        self._journal = journal if path == "-" else None
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NOCTTY
        try:
            self._number = os.dup(2) if path == "-" else os.open(path, flags, 0o600)
        except OSError as error:
            raise AuditError(f"Cannot open the audit log '{path}': {error.strerror}") from error

    def note(self, asker: Asker, command: str, arguments: Arguments[Any] | None, error: VfiodError | None) -> None:
        """Write one line: a command has ended, well or with an error."""
        line: dict[str, Any] = {"time": round(time.time(), 6), "command": command, "ok": error is None}
        line.update({name: value for name in asker.__struct_fields__ if (value := getattr(asker, name)) is not None})
        if arguments is not None:
            line["arguments"] = _shown(msgspec.to_builtins(arguments))
        if error is not None:
            line["error"] = str(error)[: MAX_VALUE * 4]
        if self._journal is not None:
            self._enter(self._journal, line)
            return
        try:
            os.write(self._number, msgspec.json.encode(line) + b"\n")
        except OSError as problem:
            if not self.failed:
                _log.error("The audit log '%s' cannot be written: %s", self.path, problem.strerror)
            self.failed += 1
        else:
            self.written += 1

    def _enter(self, journal: Journal, line: dict[str, Any]) -> None:
        from vfiod.server.journal import message_id

        del line["time"]
        words = f"{line['command']} by uid {line.get('uid', '?')} ({line['dialect']}): {line.get('error', 'done')}"
        journal.send(words, NOTICE if line["ok"] else WARNING, {**line, "message_id": message_id("AUDIT")})
        self.written += 1

    def close(self) -> None:
        """Write no more."""
        os.close(self._number)


def _shown(value: Any) -> Any:
    """A value as it may be written: no secret, nothing long."""
    if isinstance(value, dict):
        return {
            name: "(not shown)" if name in SECRET and member is not UNSET else _shown(member)
            for name, member in value.items()
        }
    if isinstance(value, list):
        return [_shown(one) for one in value[:MAX_VALUE]]
    if isinstance(value, str) and len(value) > MAX_VALUE:
        return f"{value[:MAX_VALUE]}... ({len(value)} characters)"
    return value
