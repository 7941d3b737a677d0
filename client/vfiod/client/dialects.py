"""The two dialects behind one face: what a client says and hears, whatever the socket speaks."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeAlias

import msgspec
from msgspec import Raw, UnsetType

from vfiod.protocol.catalogue.monitor import VersionInfo
from vfiod.protocol.errors import RemoteError, WireError
from vfiod.protocol.wire import jsonrpc, qmp
from vfiod.protocol.wire.stream import JsonStream

__all__ = ["CODECS", "Announced", "Codec", "Dialect", "Failed", "Happened", "Heard", "Returned"]

MAX_REPLY_BYTES: Final = 64 * 1024 * 1024
"""Bytes of one reply. The server keeps its own under 10 MiB; QEMU's introspection is 240 kB."""


class Dialect(enum.StrEnum):
    """What a monitor socket speaks."""

    QMP = "qmp"
    JSONRPC = "jsonrpc"


@dataclass(frozen=True, slots=True)
class Announced:
    """The server's greeting (QMP)."""

    version: VersionInfo
    capabilities: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Returned:
    """A command was done; ``value`` is JSON."""

    id: int | None
    value: Raw


@dataclass(frozen=True, slots=True)
class Failed:
    """A command was refused, or failed."""

    id: int | None
    error_class: str
    desc: str
    errno: str | None

    def error(self, command: str) -> RemoteError:
        """As the caller of the command gets it."""
        return RemoteError(command, self.error_class, self.desc, self.errno)


@dataclass(frozen=True, slots=True)
class Happened:
    """An event; ``data`` is JSON, or absent."""

    name: str
    data: Raw | UnsetType
    seq: int | None
    timestamp: float


Heard: TypeAlias = Announced | Returned | Failed | Happened


class Codec(Protocol):
    """One session's dialect."""

    def request(self, command: str, arguments: Any, number: int, *, oob: bool) -> bytes:
        """A request. ``arguments``: a declaration, a mapping, or UNSET."""

    def receive(self, data: bytes) -> list[Heard | WireError]:
        """What is complete now, in order; what cannot be understood in its place."""

    def buffered(self) -> int:
        """Bytes of what is not complete yet."""


def _number(id: Raw | UnsetType) -> int | None:
    """Our ids are numbers. Anything else is nobody's."""
    if isinstance(id, UnsetType):
        return None
    try:
        return msgspec.json.decode(id, type=int | None)
    except msgspec.MsgspecError:
        return -1


def _happened(event: qmp.Event) -> Happened:
    stamp = event.seconds + event.microseconds / 1e6 if event.seconds >= 0 else -1.0
    return Happened(event.name, event.data, event.seq, stamp)


class QmpCodec:
    """QMP."""

    def __init__(self) -> None:
        self._stream = JsonStream(max_message_bytes=MAX_REPLY_BYTES)

    def request(self, command: str, arguments: Any, number: int, *, oob: bool) -> bytes:
        """See :meth:`Codec.request`."""
        return qmp.encode_request(command, arguments, number, oob=oob)

    def receive(self, data: bytes) -> list[Heard | WireError]:
        """See :meth:`Codec.receive`."""
        heard: list[Heard | WireError] = []
        for text in self._stream.receive_data(data):
            try:
                message = qmp.decode_message(text)
            except WireError as error:
                heard.append(error)
                break
            match message:
                case qmp.Return():
                    heard.append(Returned(_number(message.id), message.value))
                case qmp.Error():
                    heard.append(Failed(_number(message.id), message.error_class, message.desc, message.errno))
                case qmp.Event():
                    heard.append(_happened(message))
                case qmp.Greeting():
                    heard.append(Announced(message.version, message.capabilities))
        return heard

    def buffered(self) -> int:
        """See :meth:`Codec.buffered`."""
        return self._stream.buffered


class JsonRpcCodec:
    """JSON-RPC 2.0. It has no bands: ``oob`` says nothing here, and nothing here waits for another device's work."""

    def __init__(self) -> None:
        self._stream = JsonStream(max_message_bytes=MAX_REPLY_BYTES)

    def request(self, command: str, arguments: Any, number: int, *, oob: bool) -> bytes:
        """See :meth:`Codec.request`."""
        del oob
        return jsonrpc.encode_request(command, arguments, number)

    def receive(self, data: bytes) -> list[Heard | WireError]:
        """See :meth:`Codec.receive`."""
        heard: list[Heard | WireError] = []
        for text in self._stream.receive_data(data):
            try:
                messages = jsonrpc.decode_message(text)
            except WireError as error:
                heard.append(error)
                break
            for message in messages:
                match message:
                    case jsonrpc.Result():
                        heard.append(Returned(_number(message.id), message.value))
                    case jsonrpc.Error():
                        heard.append(Failed(_number(message.id), message.error_class, message.desc, message.errno))
                    case qmp.Event():
                        heard.append(_happened(message))
        return heard

    def buffered(self) -> int:
        """See :meth:`Codec.buffered`."""
        return self._stream.buffered


CODECS: Final[dict[Dialect, type[QmpCodec] | type[JsonRpcCodec]]] = {
    Dialect.QMP: QmpCodec,
    Dialect.JSONRPC: JsonRpcCodec,
}
"""How each dialect is spoken."""
