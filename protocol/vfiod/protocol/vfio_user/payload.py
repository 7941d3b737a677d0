"""What every message's body offers, and what both sides must know to read one.

A *payload* is the body of a request or a reply as a value: ``pack`` gives the bytes that follow the header, ``unpack``
takes them back and trusts nothing: it raises :class:`~vfiod.protocol.vfio_user.header.BadMessage`. Fds are not in it:
they travel beside (:class:`~vfiod.protocol.vfio_user.framing.Message`).
"""

from __future__ import annotations

import enum
import struct
from typing import Protocol, Self

from msgspec import Struct

from vfiod.protocol.limits import VFIO_USER_MAX_TRANSFER
from vfiod.protocol.vfio_user.header import BadMessage

__all__ = ["CountWidth", "Nothing", "Payload", "SPECIFIED", "Wire", "fields_of", "sized_data"]


class CountWidth(enum.Enum):
    """How DMA_READ and DMA_WRITE count.

    The specification's count has 64 bits, and data starts 16 bytes into the body. QEMU (10.1 to 11.0,
    ``VFIOUserDMARW`` in ``hw/vfio-user/protocol.h``) has 32 bits and puts data right behind them, 12 bytes into the
    body; its structure is padded, so that a body is four bytes longer than its data needs.
    """

    U64 = 64
    U32 = 32


class Wire(Struct, frozen=True):
    """What two sides have agreed on, as far as it decides what bytes mean.

    Attributes:
        max_transfer: bytes of data in one message, at most.
        count: how DMA messages count.

    """

    max_transfer: int = VFIO_USER_MAX_TRANSFER
    count: CountWidth = CountWidth.U64


SPECIFIED = Wire()
"""As the specification has it when nothing else was agreed on."""


class Payload(Protocol):
    """The body of one kind of request or reply."""

    def pack(self, wire: Wire = SPECIFIED) -> bytes:
        """The bytes after the header."""
        ...

    @classmethod
    def unpack(cls, body: bytes, wire: Wire = SPECIFIED) -> Self:
        """From the bytes after the header. Raises BadMessage."""
        ...


class Nothing(Struct, frozen=True):
    """A request or reply that is a header alone: DEVICE_RESET, the reply to DMA_MAP, and others."""

    def pack(self, wire: Wire = SPECIFIED) -> bytes:
        """No bytes."""
        del wire
        return b""

    @classmethod
    def unpack(cls, body: bytes, wire: Wire = SPECIFIED) -> Self:
        """Whatever is there is passed over: some servers echo the request."""
        del body, wire
        return cls()


def fields_of(layout: struct.Struct, body: bytes, name: str) -> tuple[int, ...]:
    """The fixed part of a body. Raises BadMessage when it is cut short."""
    if len(body) < layout.size:
        raise BadMessage(f"{name} has {layout.size} bytes after its header, {len(body)} came")
    return layout.unpack_from(body)


def sized_data(body: bytes, start: int, count: int, name: str, wire: Wire) -> bytes:
    """The data of a message that says how many bytes it has. Raises BadMessage when it lies, or exceeds the limit."""
    if count > wire.max_transfer:
        raise BadMessage(f"{name} of {count} bytes: at most {wire.max_transfer} at once", "E2BIG")
    if len(body) - start < count:
        raise BadMessage(f"{name} says it has {count} bytes of data, {max(0, len(body) - start)} came")
    return body[start : start + count]
