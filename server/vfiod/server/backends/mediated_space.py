"""The address space of a mediated device: the guest memory that its DMA can reach."""

from __future__ import annotations

from vfiod.server.backends.base import Mapping
from vfiod.server.kernel.syscalls import PAGE_SIZE
from vfiod.server.mdev.instance import Instance
from vfiod.server.mdev.parent import MediatedDevice
from vfiod.server.mdev.space import Piece, Translation

__all__ = ["MediatedSpace"]


class MediatedSpace:
    """The address space of one mediated device: what its DMA can reach (:class:`AddressSpace`)."""

    page_size = PAGE_SIZE
    by_messages = True
    """The device asks for memory by calls: a client can answer them."""

    def __init__(self, instance: Instance) -> None:
        self.name = f"mdev:{instance.uuid}"
        self._instance = instance
        self._translation = Translation()
        self._asking: set[int] = set()  # first addresses of mappings that another program is asked for
        # Most devices do not override them: then nothing has to be called, and 10,000 mappings cost nothing.
        kind = type(instance.device)
        self._listens = (
            kind.memory_mapped is not MediatedDevice.memory_mapped
            or kind.memory_unmapped is not MediatedDevice.memory_unmapped
        )
        instance.host.memory = self._translation

    @property
    def asks(self) -> bool:
        """Whether DMA may have to ask another program, and wait (``GuestFile.asks``)."""
        return bool(self._asking)

    @property
    def quick(self) -> bool:
        """Whether the device does not care what is mapped: then nothing is called, and nothing waits."""
        return not self._listens

    def iova_ranges(self) -> tuple[tuple[int, int], ...]:
        """Everything below 2**64: there is no IOMMU that could be narrower."""
        return ((0, (1 << 64) - 1),)

    def map(self, mapping: Mapping) -> None:
        """Make it reachable, unless the device refuses. Raises OperationFailed; then nothing has changed."""
        instance = self._instance
        device = instance.device
        if instance.gone is None and self._listens:
            instance.call(
                "memory_mapped",
                lambda: device.memory_mapped(mapping.iova, mapping.size, mapping.readonly),
                of=f"{instance.what} at 0x{mapping.iova:x} ({mapping.size} bytes)",
                late=lambda _: device.memory_unmapped(mapping.iova, mapping.size),
            )
        self._translation.add(
            Piece(mapping.iova, mapping.size, mapping.memory, mapping.offset, mapping.readonly),
        )
        if mapping.memory.asks:
            self._asking.add(mapping.iova)

    def unmap(self, iova: int, size: int) -> None:
        """Take pieces back, whole ones. When it returns, no DMA touches them."""
        instance = self._instance
        try:
            if instance.gone is None and self._listens:
                instance.calls.quietly(
                    "memory_unmapped", instance.what, lambda: instance.device.memory_unmapped(iova, size)
                )
        finally:
            # Whatever the device says, or does not say: the memory is no longer its own, pinned or not.
            self._translation.remove(iova, size)
            self._asking = {first for first in self._asking if not iova <= first < iova + size}

    def close(self) -> None:
        """Nothing is reachable any more, and nothing pinned."""
        self._instance.host.memory = None
        self._translation.clear()
