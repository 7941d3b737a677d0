"""Structured logs: entries of the journal with fields of ours, or lines of JSON.

The journal's protocol is that of systemd's "Native Journal Protocol": one datagram per entry, ``KEY=value`` and a
newline per field, or the key, a newline, 64 bits of length, the value, a newline where the value has newlines itself.
Nothing here waits: when the journal does not keep up, entries are dropped, and the next one that leaves says how many
(``VFIOD_LOST``). Imported only when it is used.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import socket
import traceback
from typing import Any, Final

import msgspec

from vfiod.protocol.catalogue import EventData, EventSpec
from vfiod.protocol.limits import MAX_LOG_FIELD

__all__ = [
    "SOCKET",
    "Journal",
    "JsonLines",
    "PrefixedLines",
    "StructuredHandler",
    "event_level",
    "in_words",
    "message_id",
]

SOCKET: Final = "/run/systemd/journal/socket"

PRIORITIES: Final = {
    logging.CRITICAL: 2, logging.ERROR: 3, logging.WARNING: 4, logging.INFO: 6, logging.DEBUG: 7,
}  # fmt: skip
"""syslog(3)'s, by :mod:`logging`'s levels."""

NAMESPACE: Final = bytes.fromhex("5f1f7a6c2d0b4c57a1f0d6a9c3e85b42")
"""Ids of messages are name-based UUIDs within this one (RFC 9562, version 5): the same in every version of vfiod."""

LOUD: Final = {
    "DEVICE_ERROR": logging.ERROR,
    "DEVICE_REQUESTED": logging.WARNING,
    "DEVICE_UNPLUG_ERROR": logging.WARNING,
    "IRQ_STORM": logging.WARNING,
}
"""Events somebody has to do something about."""

QUIET: Final = frozenset({"CCW_CRW", "CCW_IO", "IRQ", "IRQ_MODE_CHANGED", "REGION_MMAP_CHANGED"})
"""Events of a device at work."""


def event_level(name: str) -> int:
    """The level an event is logged at; it is ``info`` unless more or less depends on it."""
    return LOUD.get(name, logging.DEBUG if name in QUIET else logging.INFO)


def message_id(name: str) -> str:
    """The MESSAGE_ID of an event, or of ``AUDIT``: 32 digits."""
    made = bytearray(hashlib.sha1(NAMESPACE + name.encode(), usedforsecurity=False).digest()[:16])
    made[6] = made[6] & 0x0F | 0x50
    made[8] = made[8] & 0x3F | 0x80
    return made.hex()


def _field(key: str) -> str:
    return re.sub("[^A-Z0-9_]", "_", key.upper())


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return str(value)
    return msgspec.json.encode(value, enc_hook=str).decode()


def _written(key: str, value: str) -> bytes:
    data = value.encode(errors="replace")[:MAX_LOG_FIELD]
    if b"\n" in data:
        return key.encode() + b"\n" + len(data).to_bytes(8, "little") + data + b"\n"
    return key.encode() + b"=" + data + b"\n"


class Journal:
    """The journal, connected.

    Args:
        vm: the name of the VM, in every entry.
        path: of journald's socket.

    Attributes:
        lost: entries it did not take since the last that left.

    Raises OSError: there is none.

    """

    def __init__(self, vm: str, path: str = SOCKET) -> None:
        self.lost = 0
        self._always: Final = _written("SYSLOG_IDENTIFIER", "vfiod") + _written("VFIOD_VM", vm)
        self._socket: Final = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        try:
            self._socket.setblocking(False)
            self._socket.connect(path)
        except OSError:
            self._socket.close()
            raise

    def send(self, message: str, priority: int, fields: dict[str, Any]) -> None:
        """Send an entry: ``fields`` become ``VFIOD_...``, but for MESSAGE_ID, LOGGER and those of systemd."""
        pieces = [self._always, _written("MESSAGE", message), _written("PRIORITY", str(priority))]
        for key, value in fields.items():
            name = _field(key)
            known = name in ("MESSAGE_ID", "LOGGER", "CODE_FILE", "CODE_LINE", "CODE_FUNC")
            pieces.append(_written(name if known else f"VFIOD_{name}", _text(value)))
        if self.lost:
            pieces.append(_written("VFIOD_LOST", str(self.lost)))
        try:
            self._socket.send(b"".join(pieces))
        except OSError:  # full, gone, or too large: there is nobody else to tell
            self.lost += 1
        else:
            self.lost = 0

    def event(self, seq: int, spec: EventSpec, data: EventData) -> None:
        """Send an event."""
        shown, fields = in_words(seq, spec, data)
        self.send(shown, PRIORITIES[event_level(spec.name)], fields)

    def close(self) -> None:
        """Send no more."""
        self._socket.close()


def in_words(seq: int, spec: EventSpec, data: EventData) -> tuple[str, dict[str, Any]]:
    """An event as a sentence, and the fields of its entry."""
    members = msgspec.to_builtins(data)
    said = " ".join(f"{name}={_text(value)}" for name, value in members.items())
    fields = {"event": spec.name, "message_id": message_id(spec.name), "seq": seq, **members}
    return f"{spec.name} {said}".rstrip(), fields


class StructuredHandler(logging.Handler):
    """Gives the log to the journal."""

    def __init__(self, journal: Journal) -> None:
        super().__init__()
        self._journal = journal

    def emit(self, record: logging.LogRecord) -> None:
        """Send one."""
        fields: dict[str, Any] = {"logger": record.name, **getattr(record, "about", {})}
        if record.levelno >= logging.ERROR:
            fields.update(code_file=record.pathname, code_line=record.lineno, code_func=record.funcName)
        if record.exc_info and record.exc_info[1] is not None:
            fields["traceback"] = "".join(traceback.format_exception(record.exc_info[1]))
        self._journal.send(record.getMessage(), PRIORITIES.get(record.levelno, 5), fields)


class JsonLines(logging.Handler):
    """Writes one JSON object per entry to standard error, each by one write(2)."""

    def __init__(self, vm: str, number: int = 2) -> None:
        super().__init__()
        self._vm = vm
        self._number = number

    def emit(self, record: logging.LogRecord) -> None:
        """Write one."""
        line: dict[str, Any] = {
            "time": round(record.created, 6), "level": record.levelname.lower(), "logger": record.name, "vm": self._vm,
            "message": record.getMessage(), **getattr(record, "about", {}),
        }  # fmt: skip
        if record.exc_info and record.exc_info[1] is not None:
            line["traceback"] = "".join(traceback.format_exception(record.exc_info[1]))
        data = msgspec.json.encode(line, enc_hook=str)
        try:
            os.write(self._number, data + b"\n")
        except OSError:
            self.handleError(record)


class PrefixedLines(logging.StreamHandler[Any]):
    """Lines on standard error that the journal splits into priority and text: ``<4>vfiod ...`` (sd-daemon(3))."""

    def format(self, record: logging.LogRecord) -> str:
        """Each line has its priority."""
        prefix = f"<{PRIORITIES.get(record.levelno, 5)}>"
        text = f"{record.name} {super().format(record)}"
        return "\n".join(prefix + line for line in text.splitlines())
