"""What can be given to a guest, what has to happen first, and why not."""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vfiod.client.host.attributes import read_entries, read_text_or_empty
from vfiod.client.host.sysfs import HostDevice, HostGroup, Sysfs, vfio_driver

__all__ = ["Assessment", "HostFacts", "Verdict", "assess", "host_facts"]


class Verdict(enum.StrEnum):
    """Whether VFIO can have a device: now; once it is bound (with its whole group); not as this host is."""

    YES = "yes"
    BIND = "bind"
    NO = "no"


@dataclass(frozen=True, slots=True)
class Assessment:
    """The verdict, what stands in the way or has to be done, and what else a manager wants to know."""

    verdict: Verdict
    reasons: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class HostFacts:
    """What holds for every device.

    Attributes:
        iommus: the IOMMUs' names (``dmar0``); empty: none, or off.
        remapping: whether interrupts are remapped; None: the kernel does not say (architectures that always do).
        unsafe_interrupts: ``allow_unsafe_interrupts`` of vfio_iommu_type1.
        unsafe_noiommu: ``enable_unsafe_noiommu_mode`` of vfio.

    """

    iommus: tuple[str, ...]
    remapping: bool | None
    unsafe_interrupts: bool
    unsafe_noiommu: bool

    def sentences(self) -> list[str]:
        """For people."""
        told = [
            f"IOMMU: {', '.join(self.iommus) or 'none (intel_iommu=on, or a setting of the firmware)'}",
            f"interrupt remapping: {'unknown' if self.remapping is None else 'on' if self.remapping else 'off'}",
        ]
        told += ["unsafe interrupts are allowed (vfio_iommu_type1)"] if self.unsafe_interrupts else []
        told += ["no-IOMMU mode is enabled (vfio): such a device reaches all memory"] if self.unsafe_noiommu else []
        return told


def host_facts(sysfs: Sysfs) -> HostFacts:
    """What this host's kernel says."""
    # x86 names its interrupt chips IR-... when they remap (Documentation/ABI/testing/sysfs-kernel-irq: chip_name).
    chips = {read_text_or_empty(one / "chip_name") for one in read_entries(sysfs.root / "kernel/irq")}
    messages = {chip for chip in chips if re.match(r"(IR-)?(PCI-MSI|IO-APIC)", chip)}
    modules = sysfs.root / "module"
    return HostFacts(
        iommus=tuple(one.name for one in read_entries(sysfs.root / "class/iommu")),
        remapping=any(chip.startswith("IR-") for chip in messages) if messages else None,
        unsafe_interrupts=read_text_or_empty(modules / "vfio_iommu_type1/parameters/allow_unsafe_interrupts")
        in ("Y", "1"),
        unsafe_noiommu=read_text_or_empty(modules / "vfio/parameters/enable_unsafe_noiommu_mode") in ("Y", "1"),
    )


def assess(device: HostDevice, group: HostGroup | None, mates: Sequence[HostDevice], facts: HostFacts) -> Assessment:
    """Judge one PCI function.

    Args:
        device: the function.
        group: its group; None: it has none.
        mates: the other functions of the group.
        facts: the host's.

    """
    against, first = list(_against(device, group, facts)), []
    if not vfio_driver(device.driver or ""):
        first.append(f"bound to {device.driver}" if device.driver else "bound to no driver")
        first += device.used_by
    for mate in mates:
        if mate.blocks_group:
            first.append(f"{mate.address} of its group is bound to {mate.driver}")
            first += [f"{mate.address}: {one}" for one in mate.used_by]
    verdict = Verdict.NO if against else Verdict.BIND if first else Verdict.YES
    return Assessment(verdict, (*against, *first), tuple(_notes(device)))


def _against(device: HostDevice, group: HostGroup | None, facts: HostFacts) -> Iterable[str]:
    if device.bridge:
        yield "a bridge: VFIO takes the devices behind it"
    elif group is None:
        yield "no IOMMU stands before it" + (
            "; bound to vfio-pci it gets a no-IOMMU group (x-noiommu)" if facts.unsafe_noiommu else ""
        )
    elif group.noiommu:
        yield "a no-IOMMU group: only with x-noiommu, and it reaches all memory"
    elif facts.remapping is False and not facts.unsafe_interrupts:
        yield "interrupts are not remapped: VFIO refuses, unless vfio_iommu_type1 has allow_unsafe_interrupts=1"


def _notes(device: HostDevice) -> Iterable[str]:
    if device.bridge:
        return
    if not device.reset_methods:
        yield "cannot be reset alone"
    if device.physical_function is not None:
        yield f"a virtual function of {device.physical_function}"
    if device.max_virtual_functions:
        yield f"{device.virtual_functions or 0} of {device.max_virtual_functions} virtual functions"
    if device.vf_token:
        yield "needs a VF token (vf-token)"
