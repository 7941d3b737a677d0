"""The sixteen bytes every vfio-user message begins with, and what can stand in them.

Source: QEMU ``docs/interop/vfio-user.rst``, "Header" and "Commands". Numbers are in the host's byte order: both
sides run on one host, and the specification says so.
"""

from __future__ import annotations

import enum
import struct
from typing import ClassVar, Final, Self

from msgspec import Struct

from vfiod.protocol.vfio import BadStructure

__all__ = ["BadMessage", "Command", "Direction", "Flags", "HEADER_SIZE", "Header", "MessageType"]


class BadMessage(BadStructure):
    """A message that came whole and cannot be what its command takes. The stream is still in step.

    Attributes:
        errno: the name of the errno to answer with.

    """

    def __init__(self, desc: str, errno: str = "EINVAL") -> None:
        super().__init__(desc)
        self.errno = errno


class Command(enum.IntEnum):
    """What a message asks for. 14 was DIRTY_PAGES, which is gone."""

    VERSION = 1
    DMA_MAP = 2
    DMA_UNMAP = 3
    DEVICE_GET_INFO = 4
    DEVICE_GET_REGION_INFO = 5
    DEVICE_GET_REGION_IO_FDS = 6
    DEVICE_GET_IRQ_INFO = 7
    DEVICE_SET_IRQS = 8
    REGION_READ = 9
    REGION_WRITE = 10
    DMA_READ = 11
    DMA_WRITE = 12
    DEVICE_RESET = 13
    REGION_WRITE_MULTI = 15
    DEVICE_FEATURE = 16
    MIG_DATA_READ = 17
    MIG_DATA_WRITE = 18


class Direction(enum.Enum):
    """Who sends a request."""

    TO_SERVER = "to-server"
    TO_CLIENT = "to-client"


class MessageType(enum.IntEnum):
    """Bits 0 to 3 of the flags."""

    COMMAND = 0
    REPLY = 1


class Flags(enum.IntFlag):
    """The flags above the type."""

    NO_REPLY = 0x10
    ERROR = 0x20


# As integers, because every message is asked: a flag's own "&" takes Python 3.11 some microseconds.
_REPLY: Final = int(MessageType.REPLY)
_NO_REPLY: Final = int(Flags.NO_REPLY)
_ERROR: Final = int(Flags.ERROR)


class Header(Struct, frozen=True):
    """A header. ``command`` and ``flags`` are kept as they came: a peer may send what no name stands for.

    Attributes:
        id: chosen by the sender of a request, echoed in its reply; 0 to 65535.
        command: a :class:`Command`, or an unknown number.
        size: bytes of the whole message, these sixteen included.
        flags: type, NO_REPLY, ERROR.
        error: an errno's number, in a reply with ERROR; may be 0 even then.

    """

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("=HHIII")

    id: int
    command: int
    size: int
    flags: int = 0
    error: int = 0

    def pack(self) -> bytes:
        """Sixteen bytes."""
        return self.LAYOUT.pack(self.id, self.command, self.size, self.flags, self.error)

    @classmethod
    def unpack(cls, buffer: bytes | bytearray | memoryview) -> Self:
        """From the first sixteen bytes. Raises BadStructure when there are fewer."""
        if len(buffer) < cls.LAYOUT.size:
            raise BadStructure(f"A vfio-user header has {cls.LAYOUT.size} bytes, {len(buffer)} came")
        return cls(*cls.LAYOUT.unpack_from(buffer))

    @property
    def is_request(self) -> bool:
        """Type 0."""
        return not self.flags & 0x0F

    @property
    def is_reply(self) -> bool:
        """Type 1."""
        return self.flags & 0x0F == _REPLY

    @property
    def no_reply(self) -> bool:
        """The sender of this request wants no reply, not even an error."""
        return self.flags & _NO_REPLY != 0

    @property
    def is_error(self) -> bool:
        """The reply says that the request failed."""
        return self.flags & _ERROR != 0

    @property
    def known(self) -> Command | None:
        """The command, when it has a name."""
        return _COMMANDS.get(self.command)

    @property
    def title(self) -> str:
        """For messages: ``DMA_MAP 17``."""
        known = self.known
        return f"{f'command {self.command}' if known is None else known.name} {self.id}"


_COMMANDS: Final = {int(command): command for command in Command}
HEADER_SIZE: Final = Header.LAYOUT.size
"""Bytes of a header."""
