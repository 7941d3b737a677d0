"""What is done to the server, in an order that a seed decides: hotplugs, interrupts, mappings; and what goes wrong."""

from __future__ import annotations

import os
import select
from pathlib import Path
from random import Random
from typing import Any, Final, Literal

from msgspec import Struct

from vfiod.client.sync import Client
from vfiod.protocol.catalogue.devices import DeviceDeleted
from vfiod.protocol.errors import RemoteError
from vfiod.protocol.fd import FileDescriptor

__all__ = ["KINDS", "Mix"]

PATIENCE: Final = 120.0
MOST_DEVICES: Final = 8
MOST_MAPPINGS: Final = 64
MEMORY: Final = 1 << 22
"""Bytes of guest memory, mapped in pieces."""

PIECE: Final = MEMORY // MOST_MAPPINGS

# Registers of the built-in PCI device (vfiod.server.mdev.samples.pci).
IRQ_RAISE, IRQ_ACK = 0x14, 0x18
COMMAND, BUS_MASTER, MEMORY_SPACE = 4, 4, 2

WEIGHTS: Final = {"hotplug": 30, "interrupt": 32, "mapping": 30, "session": 2, "reset": 2, "refusal": 4}
KINDS: Final = tuple(WEIGHTS)


class Device(Struct):
    """One that is there.

    Attributes:
        id: its id.
        uuid: of its mediated device.
        index: the interrupts that are started.
        triggers: the eventfd of each vector.
        mapped: the fd of BAR2, when we have it.

    """

    id: str
    uuid: str
    index: str
    triggers: list[FileDescriptor]
    mapped: FileDescriptor | None = None


class Mix:
    """Random operations on a server, one after another; what each leaves is known, and can be taken away.

    Args:
        client: a session.
        path: of the monitor, for more sessions.
        seed: of everything.

    """

    def __init__(self, client: Client, path: Path, seed: int) -> None:
        self._client = client
        self._path = path
        self._random = Random(seed)
        self._devices: list[Device] = []
        self._mappings: set[int] = set()
        self._made = 0
        self._memory = FileDescriptor(os.memfd_create("guest"))
        os.ftruncate(self._memory.number, MEMORY)
        self._deleted = client.events(DeviceDeleted)

    def step(self) -> str:
        """Do something; its kind."""
        [kind] = self._random.choices(KINDS, list(WEIGHTS.values()))
        if kind in ("interrupt", "reset") and not self._devices:
            kind = "hotplug"
        getattr(self, f"_{kind}")()
        return kind

    def calm(self) -> None:
        """Take away everything there is."""
        while self._devices:
            self._remove(self._devices[-1])
        for piece in sorted(self._mappings):
            self._client.dma_unmap(iova=piece * PIECE, size=PIECE)
        self._mappings.clear()

    def close(self) -> None:
        """What is ours; the session stays."""
        for device in self._devices:
            self._let_go(device)
        self._deleted.close()
        self._memory.close()

    # --- hotplugs ---

    def _hotplug(self) -> None:
        few = len(self._devices) < MOST_DEVICES
        if not self._devices or (few and self._random.random() < 0.5):
            self._add()
        else:
            self._remove(self._random.choice(self._devices))

    def _add(self) -> None:
        self._made += 1
        client, id = self._client, f"d{self._made}"
        uuid = client.mdev_create(parent="primer", type="primer-pci", parameters={"memory": 1 << 16}).uuid
        more: dict[str, Any] = {}
        if self._random.random() < 0.2:
            more["export"] = f"{self._path.parent}/{id}"
        client.device_add(driver="vfio-pci", id=id, mdev=uuid, **more)
        client.region_write(device=id, region="config", offset=COMMAND, size=2, value=BUS_MASTER | MEMORY_SPACE)
        index = self._random.choice(("intx", "msi", "msix"))
        vectors = [0] if index == "intx" else [0, 1, 2, 3]
        mode: Literal["direct", "relayed"] = "direct" if self._random.random() < 0.5 else "relayed"
        started = client.irq_start(device=id, index=index, vectors=vectors, mode=mode)
        triggers = []
        for irq in started.irqs:
            assert isinstance(irq.trigger_fd, FileDescriptor)
            triggers.append(irq.trigger_fd)
            if isinstance(irq.resample_fd, FileDescriptor):
                irq.resample_fd.close()
        self._devices.append(Device(id, uuid, index, triggers))

    def _remove(self, device: Device) -> None:
        if device.mapped is not None:
            self._map_region(device)  # who has it holds the device
        self._devices.remove(device)
        self._let_go(device)
        self._client.device_del(id=device.id)
        while self._deleted.get(PATIENCE).data.device != device.id:  # type: ignore[union-attr]
            pass
        self._client.mdev_destroy(uuid=device.uuid)

    @staticmethod
    def _let_go(device: Device) -> None:
        for trigger in device.triggers:
            trigger.close()
        if device.mapped is not None:
            device.mapped.close()

    # --- interrupts ---

    def _interrupt(self) -> None:
        device = self._random.choice(self._devices)
        vector = self._random.randrange(len(device.triggers))
        trigger = device.triggers[vector]
        self._write(device, IRQ_RAISE, 1 << vector)
        if not select.select([trigger.number], [], [], PATIENCE)[0]:
            raise AssertionError(f"{device.id}: {device.index} {vector} was never signalled")
        os.eventfd_read(trigger.number)
        self._write(device, IRQ_ACK, 1 << vector)
        if device.index == "intx":
            self._client.irq_eoi(device=device.id, index="intx")

    def _write(self, device: Device, offset: int, value: int) -> None:
        self._client.region_write(device=device.id, region="bar0", offset=offset, size=4, value=value)

    # --- mappings ---

    def _mapping(self) -> None:
        if self._devices and self._random.random() < 0.2:
            self._map_region(self._random.choice(self._devices))
            return
        piece = self._random.randrange(MOST_MAPPINGS)
        if piece in self._mappings:
            self._client.dma_unmap(iova=piece * PIECE, size=PIECE)
            self._mappings.remove(piece)
        else:
            self._client.dma_map(iova=piece * PIECE, size=PIECE, fd=self._memory, offset=piece * PIECE)
            self._mappings.add(piece)

    def _map_region(self, device: Device) -> None:
        if device.mapped is None:
            device.mapped = self._client.region_map(device=device.id, region="bar2").map_fd
        else:
            device.mapped.close()
            device.mapped = None
            self._client.region_unmap(device=device.id, region="bar2")

    # --- the rest ---

    def _session(self) -> None:
        """Another session, which leaves without a word, with a name that it was given for an fd."""
        with Client.connect(self._path, timeout=PATIENCE) as other:
            other.getfd(fdname="left", fd=self._memory)
            other.query_devices()

    def _reset(self) -> None:
        self._client.device_reset(id=self._random.choice(self._devices).id)

    def _refusal(self) -> None:
        """A command that fails, with an fd or half a device to be taken back."""
        refused = self._random.choice((self._overlap, self._no_device, self._twice))
        try:
            refused()
        except RemoteError:
            return
        raise AssertionError(f"{refused.__name__} was not refused")

    def _overlap(self) -> None:
        self._client.dma_map(iova=MEMORY, size=PIECE, fd=self._memory, offset=1)

    def _no_device(self) -> None:
        self._client.device_add(driver="vfio-pci", id="x", mdev="5c4a1e3e-0000-4000-8000-000000000bad")

    def _twice(self) -> None:
        self._client.mdev_create(parent="primer", type="primer-pci", parameters={"memory": 12345})
