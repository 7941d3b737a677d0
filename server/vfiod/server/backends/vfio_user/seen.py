"""What a device of another program has shown of itself, as far as a device model looks at it when it is made.

A process that takes another's place makes its models again from that: it must not ask the program, which answers
whoever reads the connection, until the connection is its own.
"""

from __future__ import annotations

from typing import Final

from vfiod.protocol import vfio
from vfiod.protocol.errors import OperationFailed

__all__ = ["Seen"]

_CONFIG: Final = int(vfio.PciRegion.CONFIG)
_ROM: Final = int(vfio.PciRegion.ROM)


class Seen:
    """Configuration space as it was last read, whether there is a ROM to read, and which features there are.

    Attributes:
        config: from the first byte to the last that was ever read.
        rom: the ROM can be read.
        features: by number, as far as they were asked for.

    """

    __slots__ = ("config", "features", "rom")

    def __init__(self, config: bytes = b"", features: dict[int, bool] | None = None, *, rom: bool = True) -> None:
        self.config: Final = bytearray(config)
        self.features: Final = {} if features is None else features
        self.rom = rom

    def note(self, index: int, offset: int, data: bytes) -> None:
        """This was read. Of other regions nothing is kept: they are registers."""
        if index == _CONFIG:
            if len(self.config) < offset:
                self.config.extend(bytes(offset - len(self.config)))
            self.config[offset : offset + len(data)] = data
        elif index == _ROM:
            self.rom = True

    def refused(self, index: int) -> None:
        """It could not be read."""
        if index == _ROM:
            self.rom = False

    def recall(self, index: int, offset: int, length: int, what: str) -> bytes:
        """What a read gave. OperationFailed: that could not be read, or was never looked at.

        Of the ROM it is known that it can be read, not what is in it: zeros.
        """
        if index == _ROM and self.rom:
            return bytes(length)
        if index == _CONFIG and offset + length <= len(self.config):
            return bytes(self.config[offset : offset + length])
        raise OperationFailed(
            "VFIO_USER_REGION_READ", what, errno="EIO", advice="it was not kept of the former process"
        )
