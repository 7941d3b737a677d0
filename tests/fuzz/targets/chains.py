"""What a lying kernel, parent or vfio-user server may say by the INFO structures and their capability chains.

The first byte selects the structure, the rest are its bytes.
"""

from __future__ import annotations

from typing import Any

from tests.fuzz.target import Target, lines

from vfiod.protocol import vfio
from vfiod.protocol.vfio import iommufd, structs
from vfiod.protocol.vfio.capabilities import MAX_CAPABILITIES, BadStructure

__all__ = ["TARGETS"]

STRUCTURES: tuple[Any, ...] = (
    structs.DeviceInfo,
    structs.RegionInfo,
    structs.IrqInfo,
    structs.Type1Info,
    structs.HotResetInfo,
    structs.HotReset,
    structs.DeviceFeature,
    structs.GroupStatus,
    structs.DmaUnmap,
    structs.DmaMap,
    vfio.SetIrqs,
    iommufd.IoasIovaRanges,
    iommufd.IoasMap,
    iommufd.IoasMapFile,
    iommufd.IoasUnmap,
    iommufd.IoasAlloc,
    iommufd.HwInfo,
    iommufd.BindIommufd,
    iommufd.AttachPt,
)

_PROPERTIES = ("sparse_areas", "areas", "msix_mappable", "type", "messages", "page_size", "iova_ranges", "can_reset")


def _info(data: bytes) -> None:
    if not data:
        return
    kind, body = STRUCTURES[data[0] % len(STRUCTURES)], data[1:]
    try:
        found = kind.unpack(body)
    except BadStructure as error:
        assert str(error)
        return
    chain = getattr(found, "capabilities", ())
    assert len(chain) <= MAX_CAPABILITIES
    # Bodies end where others begin: all together they are no longer than what came.
    assert sum(len(one.pack()) for one in chain) <= len(body) + 4 * len(chain)
    for name in _PROPERTIES:
        getattr(found, name, None)
    said = found.pack()
    assert kind.unpack(said).pack() == said, "it says something else when it is said again"


TARGETS = (
    Target(
        "info-chains",
        _info,
        lambda: lines("info-chains"),
        ("vfiod.protocol.vfio",),
        "a structure, or BadStructure; chains end; what was taken says the same when it is said again",
        1500,
    ),
)
