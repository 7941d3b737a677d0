"""Devices that are not PCI's and can be VFIO's: platform devices, s390x subchannels (CCW) and crypto queues (AP)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vfiod.client.host.attributes import read_link, read_text_or_empty
from vfiod.client.host.sysfs import Sysfs, vfio_driver

__all__ = ["OtherDevice", "other_devices"]


@dataclass(frozen=True, slots=True)
class OtherDevice:
    """One device.

    Attributes:
        bus: ``platform``, ``css`` (subchannels: what vfio-ccw binds) or ``ap`` (queues: what vfio-ap binds).
        address: its name there: ``fff51000.ethernet``, ``0.0.0313``, ``04.0042``.
        kind: what it is, as far as sysfs says: ``compatible`` of the device tree, the subchannel's type, the card's.
        driver: what it is bound to; None: nothing.
        group: IOMMU group; None: none. Subchannels and queues get theirs with their mediated device.
        vfio_device: the name under ``/dev/vfio/devices``, once bound to VFIO.
        verdict: ``yes``, ``bind`` or ``no``, as for PCI (:mod:`~vfiod.client.host.assess`).
        reasons: why not, or what has to be done.

    """

    bus: str
    address: str
    kind: str
    driver: str | None
    group: int | None
    vfio_device: str | None
    verdict: str
    reasons: tuple[str, ...]


WANTED: Final = {"platform": "vfio-platform", "css": "vfio_ccw", "ap": "vfio_ap"}


def other_devices(sysfs: Sysfs, *, everything: bool = False) -> Iterator[OtherDevice]:
    """Every such device, by bus and name. Platform devices outside any IOMMU group only with ``everything``."""
    for bus in WANTED:
        try:
            paths = sorted((sysfs.root / "bus" / bus / "devices").iterdir())
        except OSError:
            continue
        for path in paths:
            device = _device(bus, path)
            if device is not None and (everything or bus != "platform" or device.group is not None):
                yield device


def _device(bus: str, path: Path) -> OtherDevice | None:
    if bus == "ap" and "." not in path.name:
        return None  # a card: its queues are what is assigned
    driver, group = read_link(path / "driver"), read_link(path / "iommu_group")
    cdevs = sorted(one.name for one in (path / "vfio-dev").glob("*"))
    number = int(group) if group is not None and group.isdigit() else None
    bound = vfio_driver(driver or "")
    reasons = [] if bound else [f"bound to {driver or 'no driver'}; {WANTED[bus]} has to have it"]
    if bus == "platform" and number is None:
        reasons.insert(0, "no IOMMU stands before it")
    verdict = "no" if bus == "platform" and number is None else "yes" if bound else "bind"
    return OtherDevice(
        bus, path.name, _kind(bus, path), driver, number, cdevs[0] if cdevs else None, verdict, tuple(reasons)
    )


def _kind(bus: str, path: Path) -> str:
    if bus == "platform":
        return (read_text_or_empty(path / "of_node/compatible").replace("\0", " ").strip()) or "platform device"
    if bus == "css":
        kinds = {"0": "I/O subchannel", "1": "CHSC subchannel", "2": "message subchannel", "3": "ADM subchannel"}
        return kinds.get(read_text_or_empty(path / "type"), "subchannel")
    return read_text_or_empty(path.resolve().parent / "type") or "AP queue"
