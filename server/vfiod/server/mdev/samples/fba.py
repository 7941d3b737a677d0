"""``fba``: a fixed-block disk on a file, behind a subchannel: SENSE ID 6310/80, 9336/10, blocks of 512 bytes.

Commands (Linux ``drivers/s390/block/dasd_fba.c`` uses the same)::

    02  READ IPL                     block 0
    03  NOP    04  SENSE    E4  SENSE ID
    41  WRITE                        the blocks that LOCATE named
    42  READ                         the blocks that LOCATE named
    43  LOCATE           8 bytes     operation (low half byte: 5 write, 6 read), 0, blocks (2), first of the extent (4)
    63  DEFINE EXTENT   16 bytes     mask, 0, block size (2), offset (4), first block (4), last block (4)
    64  READ DEVICE CHARACTERISTICS  32 bytes

A program is DEFINE EXTENT, LOCATE, then READ or WRITE of so many blocks. What is out of order, out of the extent or
beyond the disk is a unit check: command reject, or "file protected" in byte 1 of the sense data.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Mapping, Sequence
from typing import Any, Final

from vfiod.protocol.catalogue.mediated import DeviceApi
from vfiod.protocol.channel import Command, Dstat, SenseByte0, SenseId
from vfiod.protocol.fd import FileDescriptor
from vfiod.server.kernel import confinement
from vfiod.server.mdev.channel import Transfer, Unit, UnitCheck
from vfiod.server.mdev.channel_device import ChannelDevice
from vfiod.server.mdev.parent import Host, MdevType, MediatedDevice, Parent, Saved

__all__ = ["BLOCK", "Fba", "FbaDisk"]

BLOCK: Final = 512
"""Bytes of a block."""

MAX_BLOCKS: Final = 0xFFFF_FFFF // BLOCK
"""2 GiB less one block: the addresses of some guests end there."""

READ_IPL, WRITE, READ, LOCATE, DEFINE_EXTENT = 0x02, 0x41, 0x42, 0x43, 0x63
OP_WRITE, OP_READ, OP_READ_REPLICATED = 0x5, 0x6, 0x8
INHIBIT_WRITE: Final = 0x40
PERMISSION: Final = 0xC0

_EXTENT: Final = struct.Struct(">BBHIII")
_LOCATE: Final = struct.Struct(">BBHI")
_CHARACTERISTICS: Final = struct.Struct(">BBBBHIIIIHHIH")

COMMAND_REJECT: Final = bytes([SenseByte0.COMMAND_REJECT])
FILE_PROTECTED: Final = bytes([0, 0x04])
EQUIPMENT_CHECK: Final = bytes([SenseByte0.EQUIPMENT_CHECK])
NO_MEDIUM: Final = bytes([SenseByte0.INTERVENTION_REQUIRED])


class FbaDisk(Unit):
    """The disk.

    Args:
        fd: its file; owned.
        readonly: whether it refuses to be written.
        blocks: how many it has: known, when another process had it. None: the file says so.

    Raises OSError: EINVAL when the file is no file, empty, or not of whole blocks; not when the blocks are known: what
    somebody cut off since is an equipment check, as it was to the other process.

    """

    sense_id = SenseId(0x6310, 0x80, 0x9336, 0x10)

    def __init__(self, fd: FileDescriptor, *, readonly: bool, blocks: int | None = None) -> None:
        self._fd = fd
        self.blocks = _blocks_of(fd) if blocks is None else blocks
        self._readonly = readonly
        self.begin()

    def close(self) -> None:
        """Let the file go. Later commands find no medium."""
        self._fd.close()

    @property
    def fd(self) -> FileDescriptor:
        """Its file, lent."""
        return self._fd

    def is_prompt(self, command: int) -> bool:
        """What touches no file."""
        return command in (DEFINE_EXTENT, LOCATE, Command.READ_DEVICE_CHARACTERISTICS)

    def begin(self) -> None:
        """A new program: no extent, no place."""
        self._extent: tuple[int, int] | None = None
        self._may_write = False
        self._place: tuple[int, int, int] | None = None  # operation, first block, how many

    def execute(self, command: int, transfer: Transfer) -> Dstat:
        """See the module."""
        if self._fd.closed:
            raise UnitCheck(NO_MEDIUM)
        match command:
            case 0x63:
                self._define_extent(transfer.take(_EXTENT.size))
            case 0x43:
                self._locate(transfer.take(_LOCATE.size))
            case 0x42:
                self._read(transfer)
            case 0x41:
                self._write(transfer)
            case 0x02:
                transfer.give(self._load(0, BLOCK))
            case Command.READ_DEVICE_CHARACTERISTICS:
                transfer.give(_CHARACTERISTICS.pack(0x30, 0x08, 0x21, 0, BLOCK, 100, 400, self.blocks, 0, 0, 0, 0, 0))
            case _:
                raise UnitCheck(COMMAND_REJECT)
        return Dstat(0)

    def _define_extent(self, data: bytes) -> None:
        if len(data) != _EXTENT.size or self._extent is not None:
            raise UnitCheck(COMMAND_REJECT)  # too short, or the second of one program
        mask, _, size, start, first, last = _EXTENT.unpack(data)
        if size not in (0, BLOCK) or first > last:
            raise UnitCheck(COMMAND_REJECT)
        end = start + last - first
        if end >= self.blocks:
            raise UnitCheck(FILE_PROTECTED)
        self._extent = (start, end)
        self._may_write = mask & PERMISSION != INHIBIT_WRITE and not self._readonly

    def _locate(self, data: bytes) -> None:
        if len(data) != _LOCATE.size or self._extent is None:
            raise UnitCheck(COMMAND_REJECT)
        operation, _, count, displacement = _LOCATE.unpack(data)
        first = self._extent[0] + displacement
        if operation & 0xF not in (OP_WRITE, OP_READ) or not count:
            raise UnitCheck(COMMAND_REJECT)
        if first + count - 1 > self._extent[1]:
            raise UnitCheck(FILE_PROTECTED)
        self._place = (operation & 0xF, first, count)

    def _take_place(self, operation: int) -> tuple[int, int]:
        """Where LOCATE went, in bytes of the file; it holds for one command."""
        place, self._place = self._place, None
        if place is None or place[0] != operation:
            raise UnitCheck(COMMAND_REJECT)
        return place[1] * BLOCK, place[2] * BLOCK

    def _read(self, transfer: Transfer) -> None:
        at, length = self._take_place(OP_READ)
        end = at + length
        while at < end:  # a piece at a time: 32 MiB need not be in memory at once
            piece = self._load(at, min(end - at, 64 * BLOCK))
            if transfer.give(piece) < len(piece):
                return
            at += len(piece)

    def _write(self, transfer: Transfer) -> None:
        at, length = self._take_place(OP_WRITE)
        if not self._may_write:
            raise UnitCheck(FILE_PROTECTED)
        end = at + length
        while at < end:
            data = transfer.take(min(end - at, 64 * BLOCK))
            # A block that was begun is written whole, the rest of it zeros.
            self._store(at, data.ljust(-(-len(data) // BLOCK) * BLOCK, b"\0"))
            if transfer.short:
                return
            at += len(data)

    def _load(self, at: int, length: int) -> bytes:
        try:
            data = os.pread(self._fd.number, length, at)
        except OSError:
            raise UnitCheck(EQUIPMENT_CHECK) from None
        if len(data) != length:  # somebody cut the file
            raise UnitCheck(EQUIPMENT_CHECK)
        return data

    def _store(self, at: int, data: bytes) -> None:
        try:
            written = os.pwrite(self._fd.number, data, at)
        except OSError:
            raise UnitCheck(EQUIPMENT_CHECK) from None
        if written != len(data):
            raise UnitCheck(EQUIPMENT_CHECK)


def _blocks_of(fd: FileDescriptor) -> int:
    status = os.fstat(fd.number)
    if not stat.S_ISREG(status.st_mode) or not status.st_size or status.st_size % BLOCK:
        raise OSError(errno.EINVAL, f"a disk is a regular file of whole blocks of {BLOCK} bytes")
    return min(status.st_size // BLOCK, MAX_BLOCKS)


class FbaDevice(ChannelDevice):
    """The disk behind its subchannel."""

    def __init__(self, host: Host, disk: FbaDisk, number: int) -> None:
        super().__init__(host, disk, number=number)
        self.disk = disk

    def save(self) -> Saved:
        """The subchannel and the disk's file. An extent and a place are a program's, and there is none."""
        subchannel = super().save()
        return Saved({**subchannel.values, "blocks": self.disk.blocks}, {**subchannel.fds, "disk": self.disk.fd})

    def attributes(self) -> Mapping[str, str]:
        """For ``query-mdev-types``."""
        return {"blocks": str(self.disk.blocks), "block-size": str(BLOCK)}


class Fba(Parent):
    """Makes one disk. A subchannel has one device, and a parent of subchannels one instance."""

    TYPE: Final = MdevType(
        id="fba-ccw",
        name="FBA disk",
        description="A fixed-block disk (9336) on a file, behind a subchannel",
        device_api=DeviceApi.VFIO_CCW,
        max_instances=1,
        parameters={
            "file": f"path of a file of whole blocks of {BLOCK} bytes; needed",
            "readonly": "whether it refuses to be written; default false",
            "device-number": "of the subchannel's device, 0 to 65535; default 0",
        },
    )

    name = "fba"
    types: Sequence[MdevType] = (TYPE,)

    def create(self, host: Host, uuid: str, mdev_type: MdevType, parameters: Mapping[str, Any]) -> FbaDevice:
        """Make it; EINVAL names the parameter that cannot be."""
        path = parameters.get("file")
        if not isinstance(path, str) or not path.startswith("/") or "\0" in path:
            raise OSError(errno.EINVAL, f"'file' is the absolute path of the disk's file, got {path!r:.200}")
        readonly = parameters.get("readonly", False)
        if type(readonly) is not bool:
            raise OSError(errno.EINVAL, f"'readonly' is true or false, got {readonly!r:.200}")
        number = device_number(parameters)
        try:
            fd = FileDescriptor(os.open(path, (os.O_RDONLY if readonly else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK))
        except OSError as error:
            why = f"{error.strerror}{confinement.advice(error.errno)}"
            raise OSError(error.errno or errno.EIO, f"'file': {path}: {why}") from error
        try:
            return FbaDevice(host, FbaDisk(fd, readonly=readonly), number)
        except OSError as error:
            fd.close()
            raise OSError(error.errno or errno.EIO, f"'file': {path}: {error.strerror}") from error

    def restore(
        self, host: Host, uuid: str, mdev_type: MdevType, parameters: Mapping[str, Any], saved: Saved
    ) -> FbaDevice:
        """Make it on the file that is open."""
        disk = FbaDisk(saved.fds["disk"], readonly=parameters.get("readonly", False), blocks=saved.values["blocks"])
        device = FbaDevice(host, disk, device_number(parameters))
        device.restore(saved)
        return device

    def destroy(self, uuid: str, device: MediatedDevice, *, forced: bool) -> None:
        """Always agrees; the file is closed."""
        if isinstance(device, FbaDevice):
            device.disk.close()


def device_number(parameters: Mapping[str, Any]) -> int:
    """The parameter ``device-number``. Raises EINVAL."""
    number = parameters.get("device-number", 0)
    if type(number) is not int or not 0 <= number <= 0xFFFF:
        raise OSError(errno.EINVAL, f"'device-number' is a number from 0 to 65535, got {number!r:.200}")
    return number
