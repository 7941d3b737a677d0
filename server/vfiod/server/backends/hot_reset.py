"""Whether a hot reset would be done: the kernel's rules and the machine's own, before anything is touched.

A hot reset resets a bus or a slot, so it reaches functions that nobody asked about. The rules are those of
``vfio_pci_dev_set_hot_reset`` (``drivers/vfio/pci/vfio_pci_core.c``, ``include/uapi/linux/vfio.h``) and of section 6
of the reference on device behaviour:

* Each affected function must be bound to a vfio driver, whoever holds it.
* Asked by a device of a group: each function's group is held here, or lent for the call and in no container.
* Asked by a cdev: each function is bound to the same iommufd, by a device here, or owned through its group.
* The two do not mix.
* No function is a virtual one: the kernel has each VF in a set of its own, finds it on the bus, and says EINVAL
  (``vfio_pci_dev_set_resettable``), whoever holds it.

:func:`judge` is pure; :func:`look_at_lent` asks the kernel about the fds of a call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from types import MappingProxyType

from vfiod.protocol import vfio
from vfiod.protocol.catalogue.reset import AffectedFunction, HotResetReport
from vfiod.protocol.catalogue.words import UNSET
from vfiod.protocol.errors import InvalidArgument
from vfiod.protocol.fd import FileDescriptor
from vfiod.server.backends.origin import group_status
from vfiod.server.kernel.kinds import group_of_fd
from vfiod.server.kernel.syscalls import Syscalls

__all__ = ["Held", "Lent", "Surroundings", "Verdict", "judge", "look_at_lent"]

_NOT_OWNED = -1
"""``VFIO_PCI_DEVID_NOT_OWNED``. (0 is ``VFIO_PCI_DEVID_OWNED``: no device of ours, but its group is.)"""


@dataclass(frozen=True, slots=True)
class Held:
    """A kernel device of this machine.

    Attributes:
        device: its id, or its path.
        address: its host address.
        group: of a device of a group.
        iommufd: of a cdev: the id of the object it is bound to.
        devid: of a cdev: its id in there.

    """

    device: str
    address: str
    group: int | None = None
    iommufd: str | None = None
    devid: int | None = None


@dataclass(frozen=True, slots=True)
class Lent:
    """A group whose fd was lent for the call.

    Attributes:
        fd: the group's, the lender's.
        attached: whether it is in a container: then somebody uses it.

    """

    fd: FileDescriptor
    attached: bool


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What else is known when a hot reset is judged.

    Attributes:
        held: every kernel device here.
        groups: the numbers of the groups held here.
        lingering: those of them where only another process has a device.
        lent: groups lent for the call, by number.
        drivers: of host functions, by address; one that is not known is left out.
        virtual: addresses of the affected functions that are virtual ones of SR-IOV.

    """

    held: Sequence[Held] = ()
    groups: Set[int] = frozenset()
    lingering: Set[int] = frozenset()
    lent: Mapping[int, Lent] = field(default_factory=lambda: MappingProxyType({}))
    drivers: Mapping[str, str | None] = field(default_factory=lambda: MappingProxyType({}))
    virtual: Set[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Verdict:
    """What :func:`judge` found.

    Attributes:
        report: for the caller.
        info: what the kernel said.
        devices: the devices here that are affected, in the order of their addresses.
        groups: asked by a device of a group: every affected group, each once; their fds go to the kernel.

    """

    report: HotResetReport
    info: vfio.HotResetInfo
    devices: tuple[str, ...]
    groups: tuple[int, ...]


def judge(asked: Held, info: vfio.HotResetInfo, around: Surroundings) -> Verdict:
    """Say whether the reset would be done, what it touches, and what stands in its way. Pure."""
    by_devid = bool(info.flags & vfio.HotResetFlags.DEV_ID)
    functions = sorted(info.devices, key=lambda one: one.address)
    affected, devices = [], []
    for function in functions:
        here = _find(asked, function, around.held, by_devid=by_devid)
        if here is not None:
            devices.append(here.device)
        if function.address in around.virtual:
            reason: str | None = (
                "it is a virtual function: the kernel resets no bus that has any, whoever holds them; take them away "
                "first (0 into sriov_numvfs of the physical function)"
            )
        elif by_devid:
            reason = _why_not_cdev(asked, function, here, around)
        else:
            reason = _why_not_group(asked, function, here, around)
        affected.append(
            AffectedFunction(
                address=function.address,
                group=UNSET if by_devid else function.group_id,
                devid=function.devid if by_devid else UNSET,
                held_as=UNSET if here is None else here.device,
                reason=UNSET if reason is None else reason,
            )
        )
    trouble = _trouble(asked, info, affected, by_devid=by_devid)
    report = HotResetReport(possible=trouble is None, reason=UNSET if trouble is None else trouble, affected=affected)
    groups = () if by_devid else tuple(dict.fromkeys(function.group_id for function in functions))
    return Verdict(report, info, tuple(dict.fromkeys(devices)), groups)


def _find(asked: Held, function: vfio.DependentDevice, held: Sequence[Held], *, by_devid: bool) -> Held | None:
    for one in held:
        # A cdev whose address sysfs did not tell is known by its id alone.
        same_id = by_devid and function.devid > 0 and one.devid == function.devid and one.iommufd == asked.iommufd
        if same_id or one.address == function.address:
            return one
    return None


def _why_not_group(asked: Held, function: vfio.DependentDevice, here: Held | None, around: Surroundings) -> str | None:
    """Asked by a device of a group: why this function stands in the way; None: it does not."""
    group = function.group_id
    if here is not None:
        if here.group is not None:
            return None
        return (
            f"it is '{here.device}' here, added by its cdev, while '{asked.device}' was added by its group: one reset "
            "cannot cover both; add both in the same way"
        )
    if group in around.lingering:
        return (
            f"another process still has a device of group {group}, by an fd that region-map gave out: "
            "it has to close it first"
        )
    lent = around.lent.get(group)
    if group not in around.groups:
        if lent is None:
            return (
                f"group {group} is not held here: add its device to this machine, or lend the group's fd to the call "
                "(hot-reset, group-fds)"
            )
        if lent.attached:
            return (
                f"group {group} was lent, but is attached to a container: somebody uses it; "
                "VFIO_GROUP_UNSET_CONTAINER takes it out"
            )
    return _why_not_driver(function, around)


def _why_not_cdev(asked: Held, function: vfio.DependentDevice, here: Held | None, around: Surroundings) -> str | None:
    """Asked by a cdev: why this function stands in the way; None: it does not."""
    if function.devid > 0:
        if here is not None:
            return None
        return f"another process has it, bound to the same iommufd '{asked.iommufd}': it has to close it first"
    if function.devid != _NOT_OWNED:
        return _why_not_driver(function, around)
    wrong_driver = _why_not_driver(function, around)
    if here is None:
        return wrong_driver or (
            f"neither it nor its IOMMU group is owned by iommufd '{asked.iommufd}': add it to this machine with that "
            "iommufd"
        )
    if here.iommufd is None:
        return (
            f"it is '{here.device}' here, added by its group, while '{asked.device}' was added by its cdev: one reset "
            "cannot cover both; add both in the same way"
        )
    return (
        f"it is '{here.device}' here, bound to iommufd '{here.iommufd}', while '{asked.device}' is bound to "
        f"'{asked.iommufd}': add both with the same iommufd"
    )


def _why_not_driver(function: vfio.DependentDevice, around: Surroundings) -> str | None:
    """The kernel resets nothing that another driver works with, or that no vfio driver has been told of."""
    if function.address not in around.drivers:
        return None  # not known: the kernel will say
    driver = around.drivers[function.address]
    if driver is not None and "vfio" in driver:
        return None
    return f"it is bound to {driver or 'no driver'}: bind it to vfio-pci"


def _trouble(
    asked: Held, info: vfio.HotResetInfo, affected: Sequence[AffectedFunction], *, by_devid: bool
) -> str | None:
    """The whole, in a sentence; None: it would be done."""
    blockers = [f"{one.address}: {one.reason}" for one in affected if one.reason is not UNSET]
    if blockers:
        return f"{len(blockers)} of {len(affected)} affected functions in the way: " + "; ".join(blockers)
    if by_devid and not info.flags & vfio.HotResetFlags.DEV_ID_OWNED:
        return f"the kernel says that iommufd '{asked.iommufd}' does not own every affected function"
    return None


def look_at_lent(calls: Syscalls, fds: Sequence[FileDescriptor]) -> dict[int, Lent]:
    """The groups of a call's fds, by number. Two fds of one group are one group. Blocks.

    Raises:
        InvalidArgument: an fd that is no group.
        OperationFailed: the group does not say how it is.

    """
    lent: dict[int, Lent] = {}
    for position, fd in enumerate(fds):
        found = group_of_fd(fd.number, calls)
        if found is None:
            raise InvalidArgument(
                f"Parameter 'group-fds[{position}]' is not the fd of a VFIO group: expected /dev/vfio/N"
            )
        status = group_status(calls, fd, found[0])
        lent[found[0]] = Lent(fd, bool(status & vfio.GroupFlags.CONTAINER_SET))
    return lent
