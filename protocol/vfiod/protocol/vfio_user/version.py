"""The handshake: versions and capabilities.

The client proposes, the server answers with the same major version, a minor version not above the proposed one, and
no capability that was not proposed. What a capability says of a number is the *sender's* own limit.

Peers in the field (QEMU ``hw/vfio-user/proxy.c``, libvfio-user ``lib/tran.c``):

* QEMU reads the reply into the buffer of its request: a reply must not be longer. It refuses ``max_msg_fds`` above 16,
  ``max_dma_maps`` above 65,535, and page sizes that are no multiple of 4096.
* QEMU is known by ``migration.max_bitmap_size``, which left the specification, and counts DMA with 32 bits
  (:class:`~vfiod.protocol.vfio_user.payload.CountWidth`).
"""

from __future__ import annotations

import struct
from typing import Any, ClassVar, Final, Self

import msgspec
from msgspec import UNSET, Struct, UnsetType

from vfiod.protocol.limits import (
    VFIO_USER_MAX_DMA_MAPS,
    VFIO_USER_MAX_FDS,
    VFIO_USER_MAX_TRANSFER,
    VFIO_USER_MAX_VERSION,
)
from vfiod.protocol.vfio_user.header import BadMessage
from vfiod.protocol.vfio_user.payload import SPECIFIED, CountWidth, Wire, fields_of

__all__ = ["Agreement", "Capabilities", "MAJOR", "MINOR", "TwinSocket", "Version", "agree", "answer"]

MAJOR: Final = 0
MINOR: Final = 1

DEFAULT_MSG_FDS: Final = 1
DEFAULT_TRANSFER: Final = 1048576
DEFAULT_DMA_MAPS: Final = 65535
DEFAULT_PGSIZES: Final = 4096


class TwinSocket(Struct, frozen=True, omit_defaults=True):
    """The server's own requests on a socket of their own.

    Attributes:
        supported: the sender can, or, in the reply, does.
        fd_index: in the reply: which of its fds is the client's end.

    """

    supported: bool = False
    fd_index: int | UnsetType = UNSET


class Capabilities(Struct, frozen=True, omit_defaults=True):
    """What one side can take. Absent in JSON: not said, and the default holds.

    Attributes:
        max_msg_fds: fds in one message; by default 1.
        max_data_xfer_size: bytes of data in one message; by default 1 MiB.
        max_dma_maps: mappings at once; by default 65,535.
        pgsizes: page sizes of mappings, or'ed, in bytes; by default 4096.
        twin_socket: see :class:`TwinSocket`.
        write_multiple: REGION_WRITE_MULTI is understood.
        migration: of older peers; kept as it came.

    """

    max_msg_fds: int | UnsetType = UNSET
    max_data_xfer_size: int | UnsetType = UNSET
    max_dma_maps: int | UnsetType = UNSET
    pgsizes: int | UnsetType = UNSET
    twin_socket: TwinSocket | UnsetType = UNSET
    write_multiple: bool | UnsetType = UNSET
    migration: dict[str, Any] | UnsetType = UNSET

    @property
    def fds(self) -> int:
        """``max_msg_fds``, or its default."""
        return DEFAULT_MSG_FDS if self.max_msg_fds is UNSET else self.max_msg_fds

    @property
    def transfer(self) -> int:
        """``max_data_xfer_size``, or its default, in bytes."""
        return DEFAULT_TRANSFER if self.max_data_xfer_size is UNSET else self.max_data_xfer_size

    @property
    def dma_maps(self) -> int:
        """``max_dma_maps``, or its default."""
        return DEFAULT_DMA_MAPS if self.max_dma_maps is UNSET else self.max_dma_maps

    @property
    def page_sizes(self) -> int:
        """``pgsizes``, or its default."""
        return DEFAULT_PGSIZES if self.pgsizes is UNSET else self.pgsizes

    @property
    def twin(self) -> bool:
        """Whether the sender can do, or does, with a second socket."""
        return self.twin_socket is not UNSET and self.twin_socket.supported

    @property
    def multi(self) -> bool:
        """Whether REGION_WRITE_MULTI is understood."""
        return self.write_multiple is True


class _Data(Struct, frozen=True, omit_defaults=True):
    capabilities: Capabilities | UnsetType = UNSET


OURS: Final = Capabilities(
    max_msg_fds=VFIO_USER_MAX_FDS,
    max_data_xfer_size=VFIO_USER_MAX_TRANSFER,
    max_dma_maps=VFIO_USER_MAX_DMA_MAPS,
    pgsizes=4096,
    write_multiple=True,
)
"""What vfiod can take, as a server. A client adds ``twin_socket``."""

_decoder: Final = msgspec.json.Decoder(_Data)


class Version(Struct, frozen=True):
    """VERSION, request and reply.

    Attributes:
        major: 0.
        minor: 0 or 1 today.
        capabilities: None: no version data at all; every default holds.

    """

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("=HH")

    major: int = MAJOR
    minor: int = MINOR
    capabilities: Capabilities | None = None

    def pack(self, wire: Wire = SPECIFIED) -> bytes:
        """4 bytes, and JSON with a NUL at its end."""
        del wire
        head = self.LAYOUT.pack(self.major, self.minor)
        if self.capabilities is None:
            return head
        return head + msgspec.json.encode(_Data(self.capabilities)) + b"\0"

    @classmethod
    def unpack(cls, body: bytes, wire: Wire = SPECIFIED) -> Self:
        """Raises BadMessage: cut short, no NUL, too long, not JSON, or numbers that cannot be."""
        del wire
        major, minor = fields_of(cls.LAYOUT, body, "VERSION")
        text = body[cls.LAYOUT.size :]
        if not text:
            return cls(major, minor)
        if len(text) > VFIO_USER_MAX_VERSION:
            raise BadMessage(
                f"VERSION has {len(text)} bytes of JSON, at most {VFIO_USER_MAX_VERSION} are taken", "E2BIG"
            )
        if text[-1]:
            raise BadMessage("The JSON of VERSION does not end with a NUL")
        try:
            data = _decoder.decode(text.rstrip(b"\0"))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise BadMessage(f"The JSON of VERSION cannot be read: {error}") from None
        capabilities = Capabilities() if data.capabilities is UNSET else data.capabilities
        _check(capabilities)
        return cls(major, minor, capabilities)

    @property
    def told(self) -> Capabilities:
        """The capabilities, or all defaults."""
        return Capabilities() if self.capabilities is None else self.capabilities


def _check(told: Capabilities) -> None:
    numbers = {
        "max_msg_fds": told.fds,
        "max_data_xfer_size": told.transfer,
        "max_dma_maps": told.dma_maps,
        "pgsizes": told.page_sizes,
    }
    for name, number in numbers.items():
        if not 0 <= number < 1 << 63:
            raise BadMessage(f"VERSION has {name} {number}")
    for name in ("max_data_xfer_size", "pgsizes"):
        if not numbers[name]:
            raise BadMessage(f"VERSION has {name} 0: nothing could be done")


class Agreement(Struct, frozen=True):
    """What holds for a connection after the handshake, as one side sees it.

    Attributes:
        minor: the minor version both use.
        wire: what decides what bytes mean: the smaller of both transfer limits, and the width of DMA counts.
        send_fds: fds the peer takes in one message.
        dma_maps: mappings that may be valid at once.
        page_size: the smallest page both can map, in bytes.
        multi: REGION_WRITE_MULTI may be sent.
        twin: the server's requests have a socket of their own.
        twin_fd_index: which fd of the VERSION reply it is.

    """

    minor: int
    wire: Wire
    send_fds: int
    dma_maps: int
    page_size: int
    multi: bool
    twin: bool
    twin_fd_index: int | None = None


def answer(
    proposed: Version, ours: Capabilities = OURS, *, room: int, twin_fd: bool = False
) -> tuple[Version, Agreement]:
    """The server's reply to a proposal, and what then holds.

    Args:
        proposed: the client's VERSION.
        ours: what this server can take.
        room: bytes of the client's own message after its header: the reply's body has no more.
        twin_fd: a socket is sent with the reply as its first fd. Only when ``proposed.told.twin``.

    Raises:
        BadMessage: another major version, or no page size in common.

    """
    if proposed.major != MAJOR:
        raise BadMessage(f"VERSION proposes {proposed.major}.{proposed.minor}, this side speaks {MAJOR}.{MINOR}")
    theirs = proposed.told
    pages = theirs.page_sizes & ours.page_sizes
    if not pages:
        raise BadMessage(f"No page size in common: 0x{theirs.page_sizes:x} is proposed, 0x{ours.page_sizes:x} is there")
    if twin_fd and not theirs.twin:
        raise ValueError("A twin socket is for a client that can do with one")
    fds = min(ours.fds, VFIO_USER_MAX_FDS)
    transfer, maps = min(ours.transfer, theirs.transfer), min(ours.dma_maps, theirs.dma_maps)
    reply: Capabilities | None = None
    if proposed.capabilities is not None:
        # Only what was proposed; a number we take more of than was proposed is lowered, which no client minds.
        reply = Capabilities(
            max_msg_fds=UNSET if theirs.max_msg_fds is UNSET else fds,
            max_data_xfer_size=UNSET if theirs.max_data_xfer_size is UNSET else transfer,
            max_dma_maps=UNSET if theirs.max_dma_maps is UNSET else maps,
            pgsizes=UNSET if theirs.pgsizes is UNSET else pages,
            twin_socket=TwinSocket(True, 0) if twin_fd else UNSET,
            write_multiple=True if theirs.multi and ours.multi else UNSET,
        )
    version = _fitting(Version(MAJOR, min(proposed.minor, MINOR), reply), room)
    agreement = Agreement(
        minor=version.minor,
        wire=Wire(transfer, _count_width(theirs)),
        send_fds=theirs.fds,
        dma_maps=maps,
        page_size=pages & -pages,
        multi=version.told.multi,
        twin=twin_fd,
    )
    return version, agreement


def _fitting(version: Version, room: int) -> Version:
    """Leave out what the default says just as well, until the reply is no longer than the request."""
    told = version.capabilities
    if told is None or len(version.pack()) <= room:
        return version
    lean = msgspec.structs.replace(
        told,
        max_data_xfer_size=UNSET if told.transfer == DEFAULT_TRANSFER else told.max_data_xfer_size,
        max_dma_maps=UNSET if told.dma_maps == DEFAULT_DMA_MAPS else told.max_dma_maps,
        pgsizes=UNSET if told.page_sizes == DEFAULT_PGSIZES else told.pgsizes,
    )
    return msgspec.structs.replace(version, capabilities=lean)


def _count_width(client: Capabilities) -> CountWidth:
    migration = client.migration
    qemu = migration is not UNSET and "max_bitmap_size" in migration
    return CountWidth.U32 if qemu else CountWidth.U64


def agree(proposed: Version, reply: Version, *, fds: int = 0) -> Agreement:
    """What holds after the server's reply, as the client sees it.

    Args:
        proposed: what was sent.
        reply: what came.
        fds: how many fds came with it.

    Raises:
        BadMessage: the reply breaks the rules of the handshake.

    """
    if reply.major != proposed.major:
        raise BadMessage(f"The server answers with version {reply.major}.{reply.minor}, {proposed.major} was proposed")
    if reply.minor > proposed.minor:
        raise BadMessage(f"The server answers with minor version {reply.minor}, above the proposed {proposed.minor}")
    ours, theirs = proposed.told, reply.told
    pages = theirs.page_sizes & ours.page_sizes
    if not pages:
        raise BadMessage(f"The server maps pages of 0x{theirs.page_sizes:x} bytes, none of 0x{ours.page_sizes:x}")
    if theirs.multi and not ours.multi:
        raise BadMessage("The server answers with write_multiple, which was not proposed")
    twin: int | None = None
    if theirs.twin:
        index = theirs.twin_socket.fd_index if theirs.twin_socket is not UNSET else UNSET
        if not ours.twin:
            raise BadMessage("The server answers with twin_socket, which was not proposed")
        if index is UNSET or not 0 <= index < fds:
            raise BadMessage(f"The server's twin_socket is fd {'none' if index is UNSET else index} of {fds}")
        twin = index
    elif fds:
        raise BadMessage(f"The reply to VERSION came with {fds} fds and no twin_socket")
    return Agreement(
        minor=reply.minor,
        wire=Wire(min(ours.transfer, theirs.transfer)),
        send_fds=theirs.fds,
        dma_maps=min(ours.dma_maps, theirs.dma_maps),
        page_size=pages & -pages,
        multi=theirs.multi,
        twin=twin is not None,
        twin_fd_index=twin,
    )
