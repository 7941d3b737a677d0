"""Where the state after a failure cannot be, or need not be, the one before: each with its reason."""

from __future__ import annotations

import errno as e
import re
from collections.abc import Sequence
from dataclasses import dataclass

from tests.fuzz.faults.injector import Fault

from vfiod.protocol.errors import CommandError

__all__ = ["EXCEPTIONS", "Reason", "excused"]


@dataclass(frozen=True)
class Reason:
    """One exception.

    Attributes:
        operations: the beginnings of their names.
        calls: names of calls that fail; empty: any, and a lack of fds.
        parts: regular expressions: which complaints are no complaints.
        why: in a sentence.
        refused: only when it was refused (True), only when it succeeded (False), or both (None).
        numbers: what the call says; empty: whatever it says.
        needs: a regular expression: a complaint that is there, or it is none of these runs.

    """

    operations: tuple[str, ...]
    calls: tuple[str, ...]
    parts: tuple[str, ...]
    why: str
    refused: bool | None = None
    numbers: tuple[int, ...] = ()
    needs: str = ""

    def covers(self, operation: str, fault: Fault | None, refusal: CommandError | None, found: Sequence[str]) -> bool:
        """Whether it is about this run."""
        if self.needs and not any(re.search(self.needs, one) for one in found):
            return False
        if not operation.startswith(self.operations) or (
            self.refused is not None and self.refused is not bool(refusal)
        ):
            return False
        if self.calls and (fault is None or fault.call.name not in self.calls):
            return False
        return not self.numbers or (fault is not None and fault.number in self.numbers)


_FAST_PATH = (r"/fast-path\b", r"/mapped: ", r"/note: ", r"^told .*RegionMmapChanged")
_IRQS = (
    r"/query-irqs\[",
    r"/query-machine/irqs\[",
    r"/irq-kind: ",
    r"/interrupts: ",
    r"/query-fds",
    r"anon_inode:\[eventfd\]",
)
_LINES = (r"/kernel/devices/p0.dev/lines",)
_CDEVS = ("device_add cdev", "device_add second cdev")
_PRESENT = (r".*",)

EXCEPTIONS: tuple[Reason, ...] = (
    Reason(
        ("device_add", "take-over"), ("VFIO_DEVICE_GET_IRQ_INFO",),
        (*_IRQS, r"/kernel/devices/.*/single", r"/parent 0//irqs\["),
        "EINVAL is how the kernel and its mediated drivers say that a device has no such interrupt",
        refused=False, numbers=(e.EINVAL,),
    ),
    Reason(
        ("device_add",), ("VFIO_GROUP_SET_CONTAINER", "VFIO_DEVICE_ATTACH_IOMMUFD_PT"), _PRESENT,
        "what does not fit into an address space that is there gets one of its own",
        refused=False,
    ),
    Reason(
        _CDEVS, ("real_path", "read_link", "read_text"), (r"/host: ", r"/label: "),
        "without sysfs a cdev is called by its own name",
        refused=False,
    ),
    Reason(
        _CDEVS, (),
        (r"/fds//memfd:fake-cdev", r"/kernel/devices/", r"/kernel/iommufds", r"/attributes/reason: .*has to close it"),
        "VFIO_DEVICE_BIND_IOMMUFD is undone only by closing the file, and its sender still holds; added again it works",
        refused=True,
    ),
    Reason(
        ("device_del",), ("VFIO_GROUP_UNSET_CONTAINER",), _PRESENT,
        "the kernel keeps the group in its container: released is false, it lingers, and is tried again",
        refused=False,
    ),
    Reason(
        ("device_del",), ("IOMMU_DESTROY", "IOMMU_IOAS_UNMAP", "VFIO_DEVICE_DETACH_IOMMUFD_PT"), (r"/kernel/iommufds",),
        "a removal always ends; what the kernel keeps of the IOAS is logged, and goes with the iommufd",
        refused=False,
    ),
    Reason(
        ("device_del first of two",), ("VFIO_DEVICE_SET_IRQS",), (r"/kernel/devices/0000:01:00.0",),
        "a removal always ends; what the kernel did not take back goes with the device's last fd",
        refused=False,
    ),
    Reason(
        ("irq-start platform", "irq-start machine"), ("VFIO_DEVICE_SET_IRQS",),
        (*_IRQS, *_LINES, r"^told \['IrqModeChanged'\]"),
        "what cannot be direct is relayed, and an event says so",
        refused=False,
    ),
    Reason(
        ("irq-start platform", "irq-start machine"), (), _LINES,
        "a line that nobody handles stays masked in the kernel; the next start unmasks it",
        refused=True,
    ),
    Reason(
        ("irq-stop platform",), ("VFIO_DEVICE_SET_IRQS",), (*_IRQS, *_LINES),
        "irq-stop of a device stops what it can and says which it could not: the others stay stopped",
        refused=True,
    ),
    Reason(
        ("device_add", "device-reset", "hot-reset", "system_reset", "config write", "take-over"), ("pread", "pwrite"),
        _FAST_PATH,
        "whether the device decodes memory could not be read: until it can, accesses go by read and write",
        refused=False,
    ),
    Reason(
        ("device-reset", "hot-reset", "system_reset", "client resets"), (),
        (
            *(*_IRQS, *_FAST_PATH, *_LINES, r"resets: ", r"/config: "),
            *(r"/kernel/devices/.*/(mode|triggers|masked|unmask)", r"^refused, but told"),
        ),
        "a reset that was made cannot be taken back; the error names what was not restored, and it stays off",
        refused=True, needs=r"left: .*resets: ",
    ),
    Reason(
        ("client maps", "client unmaps"), (), _PRESENT,
        "a hypervisor goes on as if its memory were mapped whatever it is told: it is hung up on, and an event says so",
        refused=True, needs=r"^refused, but told \['DeviceExportDetached'\]",
    ),
    Reason(
        ("dma-map", "device_add cdev"), ("IOMMU_IOAS_MAP_FILE",), (r"/kernel/iommufds", r"/mappings/", r"/fds//memfd:"),
        "a kernel or a file that cannot be mapped as a file is mapped by its address in this process",
        refused=False, numbers=(e.ENOTTY, e.EINVAL),
    ),
    Reason(
        ("config write enables MSI",), ("VFIO_DEVICE_SET_IRQS",), (*_IRQS, r"/triggers: "),
        "the host has fewer vectors than the guest allocated: it gets those there are, and an event says so",
        refused=False, numbers=(e.ENOSPC,),
    ),
    Reason(
        ("ccw-request",), (), (*_IRQS, r"/query-stats", r"/query-subchannel"),
        "what the kernel says of a channel program is its condition code: the request has a result",
        refused=False,
    ),
    Reason(
        ("client reads",), ("pread",), (*_FAST_PATH, r"/failed-reads: "),
        "a guest's load cannot fail: it reads all ones, as from a device that is not there, and that is counted",
        refused=False,
    ),
    Reason(
        ("device_add vfio-user",), (), (r"/parent 0/devices\[0\]/fast-path",),
        "the other server has given its regions' fds out, and cannot know who has them by now",
        refused=True,
    ),
    Reason(
        ("client goes",), ("VFIO_DEVICE_SET_IRQS",), (r"^told ",),
        "interrupts that the kernel does not disable at once are abandoned, and an event says so",
        refused=False,
    ),
    Reason(
        ("client goes",), ("pread", "pwrite"), (*_FAST_PATH, r"/config: "),
        "a device whose command register cannot be read is switched off; one that cannot be written is logged",
        refused=False,
    ),
    Reason(
        ("client goes",), ("VFIO_IOMMU_UNMAP_DMA", "IOMMU_IOAS_UNMAP"), (r"/kernel/containers", r"/kernel/iommufds"),
        "a client that is gone is gone: what the IOMMU does not give back is logged, and goes with the address space",
        refused=False,
    ),
)  # fmt: skip


def excused(operation: str, fault: Fault | None, refusal: CommandError | None, found: Sequence[str]) -> Reason | None:
    """The first exception for a run, if there is one."""
    return next((one for one in EXCEPTIONS if one.covers(operation, fault, refusal, found)), None)
