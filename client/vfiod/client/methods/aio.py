"""The commands as typed methods, asyncio. Written by ``vfiod.client.generate``: do not edit."""

# ruff: noqa: D417, E501, ASYNC109

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar, overload

from msgspec import UNSET, UnsetType

from vfiod.client.fds import Fd, LentFds, OpenFd
from vfiod.client.methods import values
from vfiod.protocol.catalogue.ccw import (
    CcwClear,
    CcwControlResult,
    CcwHalt,
    CcwRequest,
    CcwResult,
    CrwInfo,
    OrbFields,
    QueryCrw,
    QuerySubchannel,
    SubchannelInfo,
)
from vfiod.protocol.catalogue.declare import Arguments, Empty
from vfiod.protocol.catalogue.devices import (
    DeviceAdd,
    DeviceAddResult,
    DeviceDel,
    DeviceInfo,
    DeviceListProperties,
    MachineInfo,
    OnRequest,
    PropertyInfo,
    QueryDevices,
    QueryMachine,
    QueryTopology,
    Topology,
    TopologyFormat,
)
from vfiod.protocol.catalogue.exports import (
    DeviceExportAdd,
    DeviceExportDel,
    ExportInfo,
    ExportType,
    QueryDeviceExports,
)
from vfiod.protocol.catalogue.fds import (
    AddFd,
    AddFdResult,
    Closefd,
    FdInfo,
    FdsetInfo,
    Getfd,
    GetfdResult,
    QueryFds,
    QueryFdsets,
    RemoveFd,
)
from vfiod.protocol.catalogue.interrupts import (
    IrqEoi,
    IrqInfo,
    IrqMask,
    IrqRoute,
    IrqStart,
    IrqStop,
    IrqTrigger,
    IrqUnmask,
    QueryIrqs,
    Route,
)
from vfiod.protocol.catalogue.mediated import (
    MdevCreate,
    MdevCreateResult,
    MdevDestroy,
    MdevShutdown,
    MdevStart,
    MdevTypeInfo,
    QueryMdevTypes,
)
from vfiod.protocol.catalogue.memory import DmaMap, DmaMapResult, DmaUnmap, DmaUnmapResult, MappingInfo, QueryDma
from vfiod.protocol.catalogue.monitor import (
    CommandInfo,
    HumanMonitorCommand,
    NameInfo,
    QmpCapabilities,
    QmpCapability,
    QueryCommands,
    QueryName,
    QueryQmpSchema,
    QueryStats,
    QueryStatus,
    QueryUuid,
    QueryVersion,
    Quit,
    StatsRequest,
    StatsResult,
    StatsTarget,
    StatusInfo,
    TraceEventGetState,
    TraceEventInfo,
    TraceEventSetState,
    UuidInfo,
    VersionInfo,
)
from vfiod.protocol.catalogue.objects import ObjectAdd, ObjectDel, ObjectInfo, ObjectType, QueryObjects
from vfiod.protocol.catalogue.regions import (
    QueryRegions,
    RegionInfo,
    RegionMap,
    RegionRead,
    RegionReadResult,
    RegionUnmap,
    RegionWrite,
)
from vfiod.protocol.catalogue.reset import DeviceReset, HotReset, HotResetReport, QueryHotReset, SystemReset
from vfiod.protocol.catalogue.words import IrqMode

__all__ = ["AsyncMethods"]

R = TypeVar("R")


class AsyncMethods:
    """Every command of the catalogue as a method. Arguments are keyword-only."""

    @overload
    async def call(
        self,
        arguments: IrqStart,
        *,
        fds: Mapping[str, OpenFd] | None = None,
        attach: Sequence[OpenFd] = (),
        oob: bool = False,
        timeout: float | None = None,
    ) -> values.IrqStartResult: ...

    @overload
    async def call(
        self,
        arguments: RegionMap,
        *,
        fds: Mapping[str, OpenFd] | None = None,
        attach: Sequence[OpenFd] = (),
        oob: bool = False,
        timeout: float | None = None,
    ) -> values.RegionMapResult: ...

    @overload
    async def call(
        self,
        arguments: Arguments[R],
        *,
        fds: Mapping[str, OpenFd] | None = None,
        attach: Sequence[OpenFd] = (),
        oob: bool = False,
        timeout: float | None = None,
    ) -> R: ...

    async def call(
        self,
        arguments: Arguments[Any],
        *,
        fds: Mapping[str, OpenFd] | None = None,
        attach: Sequence[OpenFd] = (),
        oob: bool = False,
        timeout: float | None = None,
    ) -> Any:
        """Run a command declared in the catalogue, and return its typed result.

        Args:
            arguments: the command, with its arguments.
            fds: open fds the arguments refer to by these names, lent; at most 253.
            attach: open fds that travel with the command itself, lent, and wait at the server for ``getfd``.
            oob: run out of band, ahead of commands that wait (QMP; commands that allow it).
            timeout: seconds to wait for the answer; None: the client's own default.

        Raises:
            RemoteError: the server refuses, or failed: the machine is as it was, the names of ``fds`` are gone.
            ConnectionLost, RequestTimedOut: no answer.

        """
        return await self._run(arguments, fds=fds, attach=attach, oob=oob, timeout=timeout)

    async def _run(
        self,
        arguments: Arguments[Any],
        *,
        fds: Mapping[str, OpenFd] | None = None,
        attach: Sequence[OpenFd] = (),
        oob: bool = False,
        timeout: float | None = None,
    ) -> Any:
        raise NotImplementedError  # AsyncClient does it

    async def ccw_request(
        self,
        *,
        device: str,
        orb: bytes | UnsetType = UNSET,
        orb_fields: OrbFields | UnsetType = UNSET,
        scsw: bytes | UnsetType = UNSET,
        timeout_ms: int = 10000,
        queue: bool = False,
        timeout: float | None = None,
    ) -> CcwResult:
        """Start a channel program on a subchannel (the guest's START SUBCHANNEL), and wait for its interrupt.

        Give ``orb`` or ``orb-fields``. The program lies in guest memory (``dma-map``), and the kernel, or the mediated
        device, fetches it there. One program runs at a time: while another request is pending this one is refused with
        EBUSY, or waits for its turn with ``queue``. When the time is over the program is not stopped: ``ccw-clear`` does
        that; its late interrupt becomes ``CCW_IO``. A halt or clear meanwhile ends the request with the IRB of that.

        Args:
            orb: The ORB of START SUBCHANNEL: 12 bytes, big-endian, in base64.
            scsw: The guest's SCSW, 12 bytes, base64; default: start function accepted.
            timeout_ms: From the start of the program; with queue, from its turn (0 to 86400000).
            queue: Wait for a pending request of this subchannel rather than fail.
            timeout: Seconds to wait for the answer; None: the client's own default.

        Raises:
            RemoteError: the server refuses, or failed. ConnectionLost, RequestTimedOut: no answer.

        """
        return await self.call(
            CcwRequest(device=device, orb=orb, orb_fields=orb_fields, scsw=scsw, timeout_ms=timeout_ms, queue=queue),
            timeout=timeout,
        )

    async def ccw_halt(self, *, device: str, oob: bool = False, timeout: float | None = None) -> CcwControlResult:
        """Halt what the subchannel does (HALT SUBCHANNEL). Needs the async command region.

        It waits for no other command of the device, in band neither.

        Args:
            oob: Run out of band, ahead of commands that wait.
            timeout: Seconds to wait for the answer; None: the client's own default.

        Raises:
            RemoteError: the server refuses, or failed. ConnectionLost, RequestTimedOut: no answer.

        """
        return await self.call(CcwHalt(device=device), oob=oob, timeout=timeout)

    async def ccw_clear(self, *, device: str, oob: bool = False, timeout: float | None = None) -> CcwControlResult:
        """Clear the subchannel (CLEAR SUBCHANNEL): whatever it did is over. Needs the async command region.

        It waits for no other command of the device, in band neither.

        Args:
            oob: Run out of band, ahead of commands that wait.
            timeout: Seconds to wait for the answer; None: the client's own default.

        Raises:
            RemoteError: the server refuses, or failed. ConnectionLost, RequestTimedOut: no answer.

        """
        return await self.call(CcwClear(device=device), oob=oob, timeout=timeout)

    async def query_subchannel(self, *, device: str, oob: bool = False, timeout: float | None = None) -> SubchannelInfo:
        """Read the SCHIB of a subchannel, which makes the kernel store it, and show what goes on there.

        Args:
            oob: Run out of band, ahead of commands that wait.
            timeout: Seconds to wait for the answer; None: the client's own default.

        Raises:
            RemoteError: the server refuses, or failed. ConnectionLost, RequestTimedOut: no answer.

        """
        return await self.call(QuerySubchannel(device=device), oob=oob, timeout=timeout)

    async def query_crw(self, *, device: str, oob: bool = False, timeout: float | None = None) -> list[CrwInfo]:
        """Read the channel-report words that are pending, until there are no more, and those that came last as events.

        Reading takes a report from the kernel, so those that became ``CCW_CRW`` are kept here, the last few of them.

        Args:
            oob: Run out of band, ahead of commands that wait.
            timeout: Seconds to wait for the answer; None: the client's own default.

        Raises:
            RemoteError: the server refuses, or failed. ConnectionLost, RequestTimedOut: no answer.

        """
        return await self.call(QueryCrw(device=device), oob=oob, timeout=timeout)

    async def getfd(self, *, fdname: str, fd: OpenFd | None = None, timeout: float | None = None) -> GetfdResult:
        """Name the oldest fd this session has sent and not yet named.

        A name that exists is replaced and its fd closed. Names belong to the session and end with it.

        Args:
            fdname: A name for the fd; it does not start with a digit.
            fd: An open fd, lent: it travels with the command. None: one sent before.
            timeout: Seconds to wait for the answer; None: the client's own default.

        Raises:
            RemoteError: the server refuses, or failed. ConnectionLost, RequestTimedOut: no answer.

        """
        return await self.call(Getfd(fdname=fdname), attach=() if fd is None else (fd,), timeout=timeout)

    async def closefd(self, *, fdname: str, timeout: float | None = None) -> Empty:
        """Close an fd that getfd named.

        Args:
            timeout: Seconds to wait for the answer; None: the client's own default.

        Raises:
            RemoteError: the server refuses, or failed. ConnectionLost, RequestTimedOut: no answer.

        """
        return await self.call(Closefd(fdname=fdname), timeout=timeout)

    async def add_fd(
        self,
        *,
        fdset_id: int | UnsetType = UNSET,
        opaque: str | UnsetType = UNSET,
        fd: OpenFd | None = None,
        timeout: float | None = None,
    ) -> AddFdResult:
        """Put the oldest unnamed fd into an fd set. Sets are the machine's, and outlive the session.

        Args:
            fdset_id: The number of an fd set: 0 or more.
            fd: An open fd, lent: it travels with the command. None: one sent before.
            timeout: Seconds to wait for the answer; None: the client's own default.

        Raises:
            RemoteError: the server refuses, or failed. ConnectionLost, RequestTimedOut: no answer.

        """
        return await self.call(
            AddFd(fdset_id=fdset_id, opaque=opaque), attach=() if fd is None else (fd,), timeout=timeout
        )

    async def remove_fd(self, *, fdset_id: int, fd: int | UnsetType = UNSET, timeout: float | None = None) -> Empty:
        """Close one fd of a set, or all of them; an empty set ceases to be.

        Args:
            fdset_id: The number of an fd set: 0 or more.
            timeout: Seconds to wait for the answer; None: the client's own default.

        Raises:
            RemoteError: the server refuses, or failed. ConnectionLost, RequestTimedOut: no answer.

        """
        return await self.call(RemoveFd(fdset_id=fdset_id, fd=fd), timeout=timeout)

    async def query_fdsets(self, *, oob: bool = False, timeout: float | None = None) -> list[FdsetInfo]:
        """List the machine's fd sets.

        Args:
            oob: Run out of band, ahead of commands that wait.
            timeout: Seconds to wait for the answer; None: the client's own default.

        Raises:
            RemoteError: the server refuses, or failed. ConnectionLost, RequestTimedOut: no answer.

        """
        return await self.call(QueryFdsets(), oob=oob, timeout=timeout)

    async def query_fds(self, *, oob: bool = False, timeout: float | None = None) -> list[FdInfo]:
        """List every fd with its owner: of this session (named and pending), of fd sets, devices and objects.

        Args:
            oob: Run out of band, ahead of commands that wait.
            timeout: Seconds to wait for the answer; None: the client's own default.

        Raises:
            RemoteError: the server refuses, or failed. ConnectionLost, RequestTimedOut: no answer.

        """
        return await self.call(QueryFds(), oob=oob, timeout=timeout)

    async def irq_start(
        self,
        *,
        device: str | UnsetType = UNSET,
        index: int | str | UnsetType = UNSET,
        vectors: list[int] | UnsetType = UNSET,
        eventfds: list[values.VectorFds] | UnsetType = UNSET,
        first_number: int | UnsetType = UNSET,
        routes: list[Route] | UnsetType = UNSET,
        mode: IrqMode | Literal["direct", "relayed"] | UnsetType = UNSET,
        indexes: list[int | str] | UnsetType = UNSET,
        force: bool = False,
        timeout: float | None = None,
    ) -> values.IrqStartResult:
        """Start interrupts of a device, with the caller's eventfds or with new ones that the reply carries.

        Without ``device`` it is the "machine complete" notification: it starts every platform device, numbers their
        interrupts from ``first-number`` or by ``routes``, and those of devices that are added later follow. A platform
        device has one interrupt per index: ``index``, ``indexes``, else all. A PCI device takes ``index`` (default
        ``intx``); starting one kind ends the others. Without ``mode``, MSI is direct, and INTx is direct when it has a
        resample eventfd; a platform interrupt is direct when its eventfds are taken (``x-irqfd``), and relayed when that
        cannot be set up. Starting again changes the eventfds or the mode, and is harmless.

        A platform device's index ``x-msi`` grants messages as a block from vector 0 on, perhaps fewer than were asked for,
        and the reply has the message of each.

        Args:
            index: An interrupt index: its VFIO index, or intx, msi, msix, err, req (PCI), irqN (platform).
            vectors: Vectors of the index; irq-start: [0] (length 1 to 2048).
            eventfds: length 1 to 253.
            first_number: An interrupt number of the machine (GSI): 32 bits, as in kvm_irqfd (0 to 4294967295).
            indexes: Indexes of a platform device; irq-start: all it has (length 1 to 2048).
            force: Do it also while a hypervisor is attached to the device by an export, under its hands.
            timeout: Seconds to wait for the answer; None: the client's own default.

        Returns:
            The result. Its fds are the caller's: close it, or use it in ``with``.

        Raises:
            RemoteError: the server refuses, or failed. ConnectionLost, RequestTimedOut: no answer.

        """
        lent = LentFds()
        return await self.call(
            IrqStart(
                device=device,
                index=index,
                vectors=vectors,
                eventfds=eventfds if isinstance(eventfds, UnsetType) else [part.lend(lent) for part in eventfds],
                first_number=first_number,
                routes=routes,
                mode=mode if isinstance(mode, UnsetType) else IrqMode(mode),
                indexes=indexes,
                force=force,
            ),
            fds=lent.named,
            timeout=timeout,
        )

    async def irq_stop(
        self,
        *,
        device: str | UnsetType = UNSET,
        index: int | str | UnsetType = UNSET,
        vectors: list[int] | UnsetType = UNSET,
        force: bool = False,
        timeout: float | None = None,
    ) -> Empty:
        """Stop the interrupts of a device, of one index, or some vectors of it.

        Args:
            index: An interrupt index: its VFIO index, or intx, msi, msix, err, req (PCI), irqN (platform).
            vectors: Vectors of the index; irq-start: [0] (length 1 to 2048).
            force: Do it also while a hypervisor is attached to the device by an export, under its hands.
            timeout: Seconds to wait for the answer; None: the client's own default.

        Raises:
            RemoteError: the server refuses, or failed. ConnectionLost, RequestTimedOut: no answer.

        """
        return await self.call(IrqStop(device=device, index=index, vectors=vectors, force=force), timeout=timeout)

    async def irq_mask(
        self,
        *,
        device: str,
        index: int | str,
        vector: int = 0,
        force: bool = False,
        oob: bool = False,
        timeout: float | None = None,
    ) -> Empty:
        """Mask an interrupt. Its index must be maskable.

        Args:
            index: An interrupt index: its VFIO index, or intx, msi, msix, err, req (PCI), irqN (platform).
            vector: An interrupt within its index (VFIO sub-index), from 0 (0 to 2047).
            force: Do it also while a hypervisor is attached to the device by an export, under its hands.
            oob: Run out of band, ahead of commands that wait.
            timeout: Seconds to wait for the answer; None: the client's own default.

        Raises:
            RemoteError: the server refuses, or failed. ConnectionLost, RequestTimedOut: no answer.

        """
        return await self.call(
            IrqMask(device=device, index=index, vector=vector, force=force), oob=oob, timeout=timeout
        )

    async def irq_unmask(
        self, *, device: str, index: int | str, vector: int = 0, force: bool = False, timeout: float | None = None
    ) -> Empty:
        """Unmask an interrupt. Its index must be maskable.

        Args:
            index: An interrupt index: its VFIO index, or intx, msi, msix, err, req (PCI), irqN (platform).
            vector: An interrupt within its index (VFIO sub-index), from 0 (0 to 2047).
            force: Do it also while a hypervisor is attached to the device by an export, under its hands.
            timeout: Seconds to wait for the answer; None: the client's own default.

        Raises:
            RemoteError: the server refuses, or failed. ConnectionLost, RequestTimedOut: no answer.

        """
        return await self.call(IrqUnmask(device=device, index=index, vector=vector, force=force), timeout=timeout)

    async def irq_eoi(
        self,
        *,
        device: str,
        index: int | str,
        vector: int = 0,
        force: bool = False,
        oob: bool = False,
        timeout: float | None = None,
    ) -> Empty:
        """Complete a level interrupt: the line goes down and is unmasked. With nothing pending it does nothing.

        Args:
            index: An interrupt index: its VFIO index, or intx, msi, msix, err, req (PCI), irqN (platform).
            vector: An interrupt within its index (VFIO sub-index), from 0 (0 to 2047).
            force: Do it also while a hypervisor is attached to the device by an export, under its hands.
            oob: Run out of band, ahead of commands that wait.
            timeout: Seconds to wait for the answer; None: the client's own default.

        Raises:
            RemoteError: the server refuses, or failed. ConnectionLost, RequestTimedOut: no answer.

        """
        return await self.call(IrqEoi(device=device, index=index, vector=vector, force=force), oob=oob, timeout=timeout)

    async def irq_trigger(
        self, *, device: str, index: int | str, vector: int = 0, force: bool = False, timeout: float | None = None
    ) -> Empty:
        """Make the kernel signal an interrupt's eventfd as the device would (loopback).

        Args:
            index: An interrupt index: its VFIO index, or intx, msi, msix, err, req (PCI), irqN (platform).
            vector: An interrupt within its index (VFIO sub-index), from 0 (0 to 2047).
            force: Do it also while a hypervisor is attached to the device by an export, under its hands.
            timeout: Seconds to wait for the answer; None: the client's own default.

        Raises:
            RemoteError: the server refuses, or failed. ConnectionLost, RequestTimedOut: no answer.

        """
        return await self.call(IrqTrigger(device=device, index=index, vector=vector, force=force), timeout=timeout)

    async def irq_route(
        self,
        *,
        device: str,
        index: int | str,
        vector: int = 0,
        number: int | UnsetType = UNSET,
        force: bool = False,
        timeout: float | None = None,
    ) -> Empty:
        """Say which interrupt number a vector has now. Direct mode is torn down and set up again for a new route.

        Without ``number`` the route is disabled: torn down and left so. An unchanged route does nothing.

        Args:
            index: An interrupt index: its VFIO index, or intx, msi, msix, err, req (PCI), irqN (platform).
            vector: An interrupt within its index (VFIO sub-index), from 0 (0 to 2047).
            number: An interrupt number of the machine (GSI): 32 bits, as in kvm_irqfd (0 to 4294967295).
            force: Do it also while a hypervisor is attached to the device by an export, under its hands.
            timeout: Seconds to wait for the answer; None: the client's own default.

        Raises:
            RemoteError: the server refuses, or failed. ConnectionLost, RequestTimedOut: no answer.

        """
        return await self.call(
            IrqRoute(device=device, index=index, vector=vector, number=number, force=force), timeout=timeout
        )

    async def query_irqs(
        self, *, device: str | UnsetType = UNSET, oob: bool = False, timeout: float | None = None
    ) -> list[IrqInfo]:
        """List interrupt indexes and their vectors, with mode, state and counts.

        Args:
            oob: Run out of band, ahead of commands that wait.
            timeout: Seconds to wait for the answer; None: the client's own default.

        Raises:
            RemoteError: the server refuses, or failed. ConnectionLost, RequestTimedOut: no answer.

        """
        return await self.call(QueryIrqs(device=device), oob=oob, timeout=timeout)

    async def query_mdev_types(self, *, oob: bool = False, timeout: float | None = None) -> list[MdevTypeInfo]:
        """List what mediated devices can be made, and which exist.

        Args:
            oob: Run out of band, ahead of commands that wait.
            timeout: Seconds to wait for the answer; None: the client's own default.

        Raises:
            RemoteError: the server refuses, or failed. ConnectionLost, RequestTimedOut: no answer.

        """
        return await self.call(QueryMdevTypes(), oob=oob, timeout=timeout)

    async def mdev_create(
        self,
        *,
        parent: str,
        type: str,
        uuid: str | UnsetType = UNSET,
        parameters: dict[str, Any] | UnsetType = UNSET,
        timeout: float | None = None,
    ) -> MdevCreateResult:
        """Make a mediated device. Refused beyond the type's available instances.

        Args:
            uuid: A UUID in its 8-4-4-4-12 form (RFC 9562).
            timeout: Seconds to wait for the answer; None: the client's own default.

        Raises:
            RemoteError: the server refuses, or failed. ConnectionLost, RequestTimedOut: no answer.

        """
        return await self.call(MdevCreate(parent=parent, type=type, uuid=uuid, parameters=parameters), timeout=timeout)

    async def mdev_destroy(self, *, uuid: str, timeout: float | None = None) -> Empty:
        """Destroy a mediated device. Refused while it is added, or when its parent refuses.

        Args:
            uuid: A UUID in its 8-4-4-4-12 form (RFC 9562).
            timeout: Seconds to wait for the answer; None: the client's own default.

        Raises:
            RemoteError: the server refuses, or failed. ConnectionLost, RequestTimedOut: no answer.

        """
        return await self.call(MdevDestroy(uuid=uuid), timeout=timeout)

    async def mdev_start(self, *, uuid: str | UnsetType = UNSET, timeout: float | None = None) -> Empty:
        """Tell the parents of this VM's mediated devices that the VM is about to run. All start, or none.

        Args:
            uuid: The VM; default: this machine's.
            timeout: Seconds to wait for the answer; None: the client's own default.

        Raises:
            RemoteError: the server refuses, or failed. ConnectionLost, RequestTimedOut: no answer.

        """
        return await self.call(MdevStart(uuid=uuid), timeout=timeout)

    async def mdev_shutdown(self, *, uuid: str | UnsetType = UNSET, timeout: float | None = None) -> Empty:
        """Tell the parents of this VM's mediated devices that the VM has stopped.

        Args:
            uuid: The VM; default: this machine's.
            timeout: Seconds to wait for the answer; None: the client's own default.

        Raises:
            RemoteError: the server refuses, or failed. ConnectionLost, RequestTimedOut: no answer.

        """
        return await self.call(MdevShutdown(uuid=uuid), timeout=timeout)

    async def dma_map(
        self,
        *,
        iova: int,
        size: int,
        fd: Fd | UnsetType = UNSET,
        memory_backend: str | UnsetType = UNSET,
        offset: int = 0,
        readonly: bool = False,
        force: bool = False,
        timeout: float | None = None,
    ) -> DmaMapResult:
        """Let every device of the machine, now and later, reach a piece of memory.

        Takes ``fd`` (consumed) or ``memory-backend``. The range is clipped to whole pages of the IOMMU's smallest
        page size; IOVA and offset must agree within a page. Either every address space has it, or none.

        Args:
            iova: An I/O virtual address (IOVA), in bytes; below 2**64 (0 or more).
            size: A size, in bytes (above 0).
            fd: An open fd, lent; or a name the server knows (length 1 to 255).
            memory_backend: The id of a memory-backend-fd object.
            offset: Where in the file, in bytes (0 or more).
            readonly: Devices may read it, not write it.
            force: Do it also while a hypervisor is attached to the device by an export, under its hands.
            timeout: Seconds to wait for the answer; None: the client's own default.

        Raises:
            RemoteError: the server refuses, or failed. ConnectionLost, RequestTimedOut: no answer.

        """
        lent = LentFds()
        return await self.call(
            DmaMap(
                iova=iova,
                size=size,
                fd=lent.name(fd),
                memory_backend=memory_backend,
                offset=offset,
                readonly=readonly,
                force=force,
            ),
            fds=lent.named,
            timeout=timeout,
        )

    async def dma_unmap(
        self, *, iova: int, size: int, force: bool = False, timeout: float | None = None
    ) -> DmaUnmapResult:
        """Take a range back. Clips as ``dma-map`` does; refuses to split a mapping; may cover several.

        Args:
            iova: An I/O virtual address (IOVA), in bytes; below 2**64 (0 or more).
            size: A size, in bytes (above 0).
            force: Do it also while a hypervisor is attached to the device by an export, under its hands.
            timeout: Seconds to wait for the answer; None: the client's own default.

        Raises:
            RemoteError: the server refuses, or failed. ConnectionLost, RequestTimedOut: no answer.

        """
        return await self.call(DmaUnmap(iova=iova, size=size, force=force), timeout=timeout)

    async def query_dma(self, *, oob: bool = False, timeout: float | None = None) -> list[MappingInfo]:
        """List guest memory mappings: the machine's, which every address space has, then those of clients of exports.

        Args:
            oob: Run out of band, ahead of commands that wait.
            timeout: Seconds to wait for the answer; None: the client's own default.

        Raises:
            RemoteError: the server refuses, or failed. ConnectionLost, RequestTimedOut: no answer.

        """
        return await self.call(QueryDma(), oob=oob, timeout=timeout)

    async def qmp_capabilities(
        self, *, enable: list[QmpCapability] | UnsetType = UNSET, timeout: float | None = None
    ) -> Empty:
        """Enable capabilities and leave negotiation. QMP sessions only, and once.

        Args:
            timeout: Seconds to wait for the answer; None: the client's own default.

        Raises:
            RemoteError: the server refuses, or failed. ConnectionLost, RequestTimedOut: no answer.

        """
        return await self.call(QmpCapabilities(enable=enable), timeout=timeout)

    async def query_version(self, *, oob: bool = False, timeout: float | None = None) -> VersionInfo:
        """Return vfiod's version.

        Args:
            oob: Run out of band, ahead of commands that wait.
            timeout: Seconds to wait for the answer; None: the client's own default.

        Raises:
            RemoteError: the server refuses, or failed. ConnectionLost, RequestTimedOut: no answer.

        """
        return await self.call(QueryVersion(), oob=oob, timeout=timeout)

    async def query_commands(self, *, oob: bool = False, timeout: float | None = None) -> list[CommandInfo]:
        """List every command of this server.

        Args:
            oob: Run out of band, ahead of commands that wait.
            timeout: Seconds to wait for the answer; None: the client's own default.

        Raises:
            RemoteError: the server refuses, or failed. ConnectionLost, RequestTimedOut: no answer.

        """
        return await self.call(QueryCommands(), oob=oob, timeout=timeout)

    async def query_qmp_schema(self, *, oob: bool = False, timeout: float | None = None) -> list[dict[str, Any]]:
        """Describe every command, event and type (QEMU ``qapi/introspect.json``).

        Args:
            oob: Run out of band, ahead of commands that wait.
            timeout: Seconds to wait for the answer; None: the client's own default.

        Raises:
            RemoteError: the server refuses, or failed. ConnectionLost, RequestTimedOut: no answer.

        """
        return await self.call(QueryQmpSchema(), oob=oob, timeout=timeout)

    async def query_name(self, *, oob: bool = False, timeout: float | None = None) -> NameInfo:
        """Return the name of the VM this server works for.

        Args:
            oob: Run out of band, ahead of commands that wait.
            timeout: Seconds to wait for the answer; None: the client's own default.

        Raises:
            RemoteError: the server refuses, or failed. ConnectionLost, RequestTimedOut: no answer.

        """
        return await self.call(QueryName(), oob=oob, timeout=timeout)

    async def query_uuid(self, *, oob: bool = False, timeout: float | None = None) -> UuidInfo:
        """Return the UUID of the VM this server works for.

        Args:
            oob: Run out of band, ahead of commands that wait.
            timeout: Seconds to wait for the answer; None: the client's own default.

        Raises:
            RemoteError: the server refuses, or failed. ConnectionLost, RequestTimedOut: no answer.

        """
        return await self.call(QueryUuid(), oob=oob, timeout=timeout)

    async def query_status(self, *, oob: bool = False, timeout: float | None = None) -> StatusInfo:
        """Tell whether the server is running or shutting down.

        Args:
            oob: Run out of band, ahead of commands that wait.
            timeout: Seconds to wait for the answer; None: the client's own default.

        Raises:
            RemoteError: the server refuses, or failed. ConnectionLost, RequestTimedOut: no answer.

        """
        return await self.call(QueryStatus(), oob=oob, timeout=timeout)

    async def query_stats(
        self,
        *,
        target: StatsTarget | Literal["vm", "device", "session"],
        providers: list[StatsRequest] | UnsetType = UNSET,
        oob: bool = False,
        timeout: float | None = None,
    ) -> list[StatsResult]:
        """Return counters of the machine, of its devices or of the monitor's sessions.

        Args:
            oob: Run out of band, ahead of commands that wait.
            timeout: Seconds to wait for the answer; None: the client's own default.

        Raises:
            RemoteError: the server refuses, or failed. ConnectionLost, RequestTimedOut: no answer.

        """
        return await self.call(QueryStats(target=StatsTarget(target), providers=providers), oob=oob, timeout=timeout)

    async def trace_event_get_state(
        self, *, name: str, oob: bool = False, timeout: float | None = None
    ) -> list[TraceEventInfo]:
        """List the trace points that match a pattern, and whether they are on.

        Args:
            name: A trace point's name, or a pattern with * and ? (length 1 to 255).
            oob: Run out of band, ahead of commands that wait.
            timeout: Seconds to wait for the answer; None: the client's own default.

        Raises:
            RemoteError: the server refuses, or failed. ConnectionLost, RequestTimedOut: no answer.

        """
        return await self.call(TraceEventGetState(name=name), oob=oob, timeout=timeout)

    async def trace_event_set_state(
        self, *, name: str, enable: bool, ignore_unavailable: bool = False, timeout: float | None = None
    ) -> Empty:
        """Turn the trace points that match a pattern on or off. They are written to the log.

        Args:
            name: A trace point's name, or a pattern with * and ? (length 1 to 255).
            timeout: Seconds to wait for the answer; None: the client's own default.

        Raises:
            RemoteError: the server refuses, or failed. ConnectionLost, RequestTimedOut: no answer.

        """
        return await self.call(
            TraceEventSetState(name=name, enable=enable, ignore_unavailable=ignore_unavailable), timeout=timeout
        )

    async def human_monitor_command(
        self, *, command_line: str, cpu_index: int | UnsetType = UNSET, timeout: float | None = None
    ) -> str:
        """Run a line as a person would type it (``info devices``), and return text for a person to read.

        Args:
            timeout: Seconds to wait for the answer; None: the client's own default.

        Raises:
            RemoteError: the server refuses, or failed. ConnectionLost, RequestTimedOut: no answer.

        """
        return await self.call(HumanMonitorCommand(command_line=command_line, cpu_index=cpu_index), timeout=timeout)

    async def quit(self, *, timeout: float | None = None) -> Empty:
        """Close every device in order and end the server. The connection may close before the reply comes.

        Args:
            timeout: Seconds to wait for the answer; None: the client's own default.

        Raises:
            RemoteError: the server refuses, or failed. ConnectionLost, RequestTimedOut: no answer.

        """
        return await self.call(Quit(), timeout=timeout)

    async def object_add(
        self,
        *,
        qom_type: ObjectType | Literal["iommufd", "vfio-container", "memory-backend-fd"],
        id: str,
        fd: Fd,
        size: int | UnsetType = UNSET,
        readonly: bool = False,
        timeout: float | None = None,
    ) -> Empty:
        """Make an object that other commands refer to by its id.

        ``iommufd`` holds a passed ``/dev/iommu`` fd, for devices added with ``fd`` and ``iommufd``. ``vfio-container``
        holds a passed container fd; ``memory-backend-fd`` holds a passed memfd, hugetlbfs
        file or shared file, from which ``dma-map`` takes guest memory.

        Args:
            id: An id: a letter, then letters, digits, '-', '.', '_' (QEMU's id_wellformed).
            fd: The fd the object takes over. An open fd, lent; or a name the server knows (length 1 to 255).
            size: memory-backend-fd: bytes of the file to use; default: all of it (above 0).
            readonly: memory-backend-fd: the device may read this memory only.
            timeout: Seconds to wait for the answer; None: the client's own default.

        Raises:
            RemoteError: the server refuses, or failed. ConnectionLost, RequestTimedOut: no answer.

        """
        lent = LentFds()
        return await self.call(
            ObjectAdd(qom_type=ObjectType(qom_type), id=id, fd=lent.name(fd), size=size, readonly=readonly),
            fds=lent.named,
            timeout=timeout,
        )

    async def object_del(self, *, id: str, timeout: float | None = None) -> Empty:
        """Remove an object. Refused while something refers to it; the error says what.

        Args:
            id: An id: a letter, then letters, digits, '-', '.', '_' (QEMU's id_wellformed).
            timeout: Seconds to wait for the answer; None: the client's own default.

        Raises:
            RemoteError: the server refuses, or failed. ConnectionLost, RequestTimedOut: no answer.

        """
        return await self.call(ObjectDel(id=id), timeout=timeout)

    async def query_objects(self, *, oob: bool = False, timeout: float | None = None) -> list[ObjectInfo]:
        """List the machine's objects.

        Args:
            oob: Run out of band, ahead of commands that wait.
            timeout: Seconds to wait for the answer; None: the client's own default.

        Raises:
            RemoteError: the server refuses, or failed. ConnectionLost, RequestTimedOut: no answer.

        """
        return await self.call(QueryObjects(), oob=oob, timeout=timeout)

    async def device_add(
        self,
        *,
        driver: str,
        id: str | UnsetType = UNSET,
        host: str | UnsetType = UNSET,
        sysfsdev: str | UnsetType = UNSET,
        group_fd: Fd | UnsetType = UNSET,
        container_fd: Fd | UnsetType = UNSET,
        container: str | UnsetType = UNSET,
        fd: Fd | UnsetType = UNSET,
        iommufd: str | UnsetType = UNSET,
        mdev: str | UnsetType = UNSET,
        socket: str | UnsetType = UNSET,
        socket_fd: Fd | UnsetType = UNSET,
        x_msg_timeout: int | UnsetType = UNSET,
        reconnect_ms: int | UnsetType = UNSET,
        vf_token: str | UnsetType = UNSET,
        romfile: str | UnsetType = UNSET,
        rombar: bool | UnsetType = UNSET,
        multifunction: bool | UnsetType = UNSET,
        mmap_timeout_ms: int | UnsetType = UNSET,
        x_intx_mmap_timeout_ms: int | UnsetType = UNSET,
        share_fd: bool = True,
        on_request: OnRequest | Literal["event", "delete"] = OnRequest.EVENT,
        on_request_timeout_ms: int = 5000,
        x_irqfd: bool | UnsetType = UNSET,
        x_no_mmap: bool | UnsetType = UNSET,
        x_noiommu: bool = False,
        export: str | UnsetType = UNSET,
        x_dry_run: bool = False,
        timeout: float | None = None,
    ) -> DeviceAddResult:
        """Add a device from exactly one origin.

        Kernel group: ``host`` or ``sysfsdev`` with ``group-fd`` (once per group; later devices of the group need
        none), and ``container-fd``, or ``container`` with the id of an object, when the manager passes its own.
        Kernel cdev: ``fd`` with the device's own fd (``/dev/vfio/devices/vfioN``) and ``iommufd`` with the id of an object.
        Served by another program (vfio-user): ``socket``, or ``socket-fd`` with a socket that is connected to it.
        Mediated: ``mdev``. Opened here: ``host`` alone, when the server was started with ``--allow-open``.

        Succeeding consumes the fd names it was given; failing leaves them, and the machine, as they were.

        Args:
            driver: The device driver: vfio-pci, vfio-platform, vfio-ccw or vfio-ap.
            id: An id: a letter, then letters, digits, '-', '.', '_' (QEMU's id_wellformed).
            host: Host address: [[DDDD:]BB:]DD.F, or a platform device's name.
            sysfsdev: The host device's directory in sysfs.
            group_fd: An open fd, lent; or a name the server knows (length 1 to 255).
            container_fd: An open fd, lent; or a name the server knows (length 1 to 255).
            container: The id of a vfio-container object.
            fd: The device's own fd (cdev). An open fd, lent; or a name the server knows (length 1 to 255).
            iommufd: The id of an iommufd object.
            mdev: A UUID in its 8-4-4-4-12 form (RFC 9562).
            socket: The path of a vfio-user server's socket.
            socket_fd: A socket that is connected to a vfio-user server. An open fd, lent; or a name the server
                knows (length 1 to 255).
            x_msg_timeout: vfio-user: how long a reply may take; default 5000 (QEMU's) (0 to 86400000).
            reconnect_ms: vfio-user: after which time to connect again to a server that went away; 0, default: never
                (0 to 86400000).
            vf_token: SR-IOV: the secret the users of a PF and of its VFs share (VFIO_DEVICE_FEATURE_PCI_VF_TOKEN).
            romfile: A file whose bytes stand in for the device's ROM; empty: no ROM.
            rombar: Whether the guest sees a ROM BAR; default: true.
            multifunction: Set or clear the multifunction bit; default: cleared (QEMU's).
            mmap_timeout_ms: Before the fast path returns after a level interrupt; default 1100 (0 to 86400000).
            x_intx_mmap_timeout_ms: QEMU's name for mmap-timeout-ms (0 to 86400000).
            share_fd: Whether region-map may give the device's fd away.
            on_request_timeout_ms: With on-request=delete: how long to wait for holders before forcing (0 to
                86400000).
            x_irqfd: Whether interrupts may be direct, signalled by the kernel to the hypervisor; default: true.
            x_no_mmap: Never map regions: every access is a read or write; default: false.
            x_noiommu: Accept a noiommu group: the device can reach all memory.
            export: Offer it to a hypervisor by a vfio-user socket at this path; the export's id is the device's.
            x_dry_run: Make every check and report it; change nothing.
            timeout: Seconds to wait for the answer; None: the client's own default.

        Raises:
            RemoteError: the server refuses, or failed. ConnectionLost, RequestTimedOut: no answer.

        """
        lent = LentFds()
        return await self.call(
            DeviceAdd(
                driver=driver,
                id=id,
                host=host,
                sysfsdev=sysfsdev,
                group_fd=lent.name(group_fd),
                container_fd=lent.name(container_fd),
                container=container,
                fd=lent.name(fd),
                iommufd=iommufd,
                mdev=mdev,
                socket=socket,
                socket_fd=lent.name(socket_fd),
                x_msg_timeout=x_msg_timeout,
                reconnect_ms=reconnect_ms,
                vf_token=vf_token,
                romfile=romfile,
                rombar=rombar,
                multifunction=multifunction,
                mmap_timeout_ms=mmap_timeout_ms,
                x_intx_mmap_timeout_ms=x_intx_mmap_timeout_ms,
                share_fd=share_fd,
                on_request=OnRequest(on_request),
                on_request_timeout_ms=on_request_timeout_ms,
                x_irqfd=x_irqfd,
                x_no_mmap=x_no_mmap,
                x_noiommu=x_noiommu,
                export=export,
                x_dry_run=x_dry_run,
            ),
            fds=lent.named,
            timeout=timeout,
        )

    async def device_del(
        self, *, id: str, force: bool = False, timeout_ms: int = 5000, timeout: float | None = None
    ) -> Empty:
        """Start to remove a device; returns at once.

        Ends in one ``DEVICE_DELETED``, or, when holders remain after ``timeout-ms`` and ``force`` is not set, in
        one ``DEVICE_UNPLUG_ERROR`` that names them, and the device runs on. With ``force`` holders are not waited for.

        Args:
            id: The device's id, or its path.
            timeout_ms: A time, in milliseconds (0 to 86400000).
            timeout: Seconds to wait for the answer; None: the client's own default.

        Raises:
            RemoteError: the server refuses, or failed. ConnectionLost, RequestTimedOut: no answer.

        """
        return await self.call(DeviceDel(id=id, force=force, timeout_ms=timeout_ms), timeout=timeout)

    async def device_list_properties(
        self, *, typename: str, oob: bool = False, timeout: float | None = None
    ) -> list[PropertyInfo]:
        """List what ``device_add`` takes for a driver.

        Args:
            oob: Run out of band, ahead of commands that wait.
            timeout: Seconds to wait for the answer; None: the client's own default.

        Raises:
            RemoteError: the server refuses, or failed. ConnectionLost, RequestTimedOut: no answer.

        """
        return await self.call(DeviceListProperties(typename=typename), oob=oob, timeout=timeout)

    async def query_devices(
        self, *, id: str | UnsetType = UNSET, oob: bool = False, timeout: float | None = None
    ) -> list[DeviceInfo]:
        """List devices with their state and who still holds them.

        Args:
            oob: Run out of band, ahead of commands that wait.
            timeout: Seconds to wait for the answer; None: the client's own default.

        Raises:
            RemoteError: the server refuses, or failed. ConnectionLost, RequestTimedOut: no answer.

        """
        return await self.call(QueryDevices(id=id), oob=oob, timeout=timeout)

    async def query_topology(
        self,
        *,
        format: TopologyFormat | Literal["json", "tree", "dot", "svg"] = TopologyFormat.JSON,
        oob: bool = False,
        timeout: float | None = None,
    ) -> Topology:
        """Show containers, address spaces, groups, devices and reset domains: as a graph, a tree, or a picture.

        Args:
            oob: Run out of band, ahead of commands that wait.
            timeout: Seconds to wait for the answer; None: the client's own default.

        Raises:
            RemoteError: the server refuses, or failed. ConnectionLost, RequestTimedOut: no answer.

        """
        return await self.call(QueryTopology(format=TopologyFormat(format)), oob=oob, timeout=timeout)

    async def query_machine(self, *, oob: bool = False, timeout: float | None = None) -> MachineInfo:
        """Return one consistent snapshot of everything, with the event sequence number it belongs to.

        Args:
            oob: Run out of band, ahead of commands that wait.
            timeout: Seconds to wait for the answer; None: the client's own default.

        Raises:
            RemoteError: the server refuses, or failed. ConnectionLost, RequestTimedOut: no answer.

        """
        return await self.call(QueryMachine(), oob=oob, timeout=timeout)

    async def device_export_add(
        self,
        *,
        id: str,
        type: ExportType | Literal["vfio-user"],
        device: str,
        path: str | UnsetType = UNSET,
        fd: Fd | UnsetType = UNSET,
        socket_mode: int | UnsetType = UNSET,
        socket_group: str | UnsetType = UNSET,
        timeout: float | None = None,
    ) -> Empty:
        """Offer a device to a hypervisor by a socket: ``-device vfio-user-pci`` of QEMU attaches there.

        One client at a time; the next may attach when it is gone. While one is attached the monitor may look at the
        device, but changes nothing of it unless ``force`` is given. Sockets are for the server's own user and root
        (mode 0600), and for the users of ``--allow-uid`` with a mode and group that let them in.

        Args:
            id: An id: a letter, then letters, digits, '-', '.', '_' (QEMU's id_wellformed).
            device: The device's id, or its path.
            path: Of the socket to make.
            fd: Instead: a Unix socket that listens, or one that is connected already. An open fd, lent; or a name
                the server knows (length 1 to 255).
            socket_mode: Permission bits of the socket file, as a number: 384 is 0600, 432 is 0660 (0 to 511).
            socket_group: The socket's group, by name or number; its mode is 0660 then.
            timeout: Seconds to wait for the answer; None: the client's own default.

        Raises:
            RemoteError: the server refuses, or failed. ConnectionLost, RequestTimedOut: no answer.

        """
        lent = LentFds()
        return await self.call(
            DeviceExportAdd(
                id=id,
                type=ExportType(type),
                device=device,
                path=path,
                fd=lent.name(fd),
                socket_mode=socket_mode,
                socket_group=socket_group,
            ),
            fds=lent.named,
            timeout=timeout,
        )

    async def device_export_del(self, *, id: str, force: bool = False, timeout: float | None = None) -> Empty:
        """Close an export. Refused while a client is attached, unless ``force`` is given: then it is disconnected.

        Ends in one ``DEVICE_EXPORT_DELETED``. The device stays.

        Args:
            id: An id: a letter, then letters, digits, '-', '.', '_' (QEMU's id_wellformed).
            timeout: Seconds to wait for the answer; None: the client's own default.

        Raises:
            RemoteError: the server refuses, or failed. ConnectionLost, RequestTimedOut: no answer.

        """
        return await self.call(DeviceExportDel(id=id, force=force), timeout=timeout)

    async def query_device_exports(self, *, oob: bool = False, timeout: float | None = None) -> list[ExportInfo]:
        """List exports, and who is attached.

        Args:
            oob: Run out of band, ahead of commands that wait.
            timeout: Seconds to wait for the answer; None: the client's own default.

        Raises:
            RemoteError: the server refuses, or failed. ConnectionLost, RequestTimedOut: no answer.

        """
        return await self.call(QueryDeviceExports(), oob=oob, timeout=timeout)

    async def query_regions(
        self, *, device: str | UnsetType = UNSET, oob: bool = False, timeout: float | None = None
    ) -> list[RegionInfo]:
        """List the regions of a device, or of all.

        Args:
            oob: Run out of band, ahead of commands that wait.
            timeout: Seconds to wait for the answer; None: the client's own default.

        Raises:
            RemoteError: the server refuses, or failed. ConnectionLost, RequestTimedOut: no answer.

        """
        return await self.call(QueryRegions(device=device), oob=oob, timeout=timeout)

    async def region_read(
        self,
        *,
        device: str,
        region: int | str,
        offset: int,
        size: Literal[1, 2, 4, 8] | UnsetType = UNSET,
        length: int | UnsetType = UNSET,
        timeout: float | None = None,
    ) -> RegionReadResult:
        """Read a register (``size``), or bytes (``length``). Reading a device may change it.

        Args:
            region: A region: its VFIO index, or bar0 to bar5, rom, config, vga (PCI), regionN (any).
            offset: Where in the region, in bytes (0 or more).
            size: One access of this many bytes, little-endian.
            length: How many bytes, by the widest accesses that fit (1 to 1048576).
            timeout: Seconds to wait for the answer; None: the client's own default.

        Raises:
            RemoteError: the server refuses, or failed. ConnectionLost, RequestTimedOut: no answer.

        """
        return await self.call(
            RegionRead(device=device, region=region, offset=offset, size=size, length=length), timeout=timeout
        )

    async def region_write(
        self,
        *,
        device: str,
        region: int | str,
        offset: int,
        size: Literal[1, 2, 4, 8] | UnsetType = UNSET,
        value: int | UnsetType = UNSET,
        data: bytes | UnsetType = UNSET,
        force: bool = False,
        timeout: float | None = None,
    ) -> Empty:
        """Write a register (``size`` and ``value``), or bytes (``data``).

        Args:
            region: A region: its VFIO index, or bar0 to bar5, rom, config, vga (PCI), regionN (any).
            offset: Where in the region, in bytes (0 or more).
            size: One access of this many bytes, little-endian.
            value: Below 2**(8*size) (0 or more).
            data: base64 (length 1 to 1048576).
            force: Do it also while a hypervisor is attached to the device by an export, under its hands.
            timeout: Seconds to wait for the answer; None: the client's own default.

        Raises:
            RemoteError: the server refuses, or failed. ConnectionLost, RequestTimedOut: no answer.

        """
        return await self.call(
            RegionWrite(device=device, region=region, offset=offset, size=size, value=value, data=data, force=force),
            timeout=timeout,
        )

    async def region_map(
        self, *, device: str, region: int | str, force: bool = False, timeout: float | None = None
    ) -> values.RegionMapResult:
        """Give out the fd through which a region can be mapped.

        For a kernel device this is the device's own fd: its receiver has full control of the device and keeps it
        open. ``share-fd=false`` forbids it. From then on vfiod cannot see every access, so an INTx is no longer
        completed by the first access: use ``irq-eoi`` or a resample eventfd.

        Args:
            region: A region: its VFIO index, or bar0 to bar5, rom, config, vga (PCI), regionN (any).
            force: Do it also while a hypervisor is attached to the device by an export, under its hands.
            timeout: Seconds to wait for the answer; None: the client's own default.

        Returns:
            The result. Its fds are the caller's: close it, or use it in ``with``.

        Raises:
            RemoteError: the server refuses, or failed. ConnectionLost, RequestTimedOut: no answer.

        """
        return await self.call(RegionMap(device=device, region=region, force=force), timeout=timeout)

    async def region_unmap(self, *, device: str, region: int | str, timeout: float | None = None) -> Empty:
        """This session no longer holds a region that ``region-map`` gave it: it has unmapped it and closed the fd.

        A session that ends does so by itself. Nothing is taken back: an fd that is kept nevertheless keeps the device
        (``released`` of ``DEVICE_DELETED`` says so), and the slow path stays until the device is gone, because vfiod
        cannot know who else has the fd by now.

        Args:
            region: A region: its VFIO index, or bar0 to bar5, rom, config, vga (PCI), regionN (any).
            timeout: Seconds to wait for the answer; None: the client's own default.

        Raises:
            RemoteError: the server refuses, or failed. ConnectionLost, RequestTimedOut: no answer.

        """
        return await self.call(RegionUnmap(device=device, region=region), timeout=timeout)

    async def device_reset(self, *, id: str, force: bool = False, timeout: float | None = None) -> Empty:
        """Reset one device (``VFIO_DEVICE_RESET``): interrupts off, bus mastering off, reset, state restored.

        Args:
            force: Do it also while a hypervisor is attached to the device by an export, under its hands.
            timeout: Seconds to wait for the answer; None: the client's own default.

        Raises:
            RemoteError: the server refuses, or failed. ConnectionLost, RequestTimedOut: no answer.

        """
        return await self.call(DeviceReset(id=id, force=force), timeout=timeout)

    async def query_hot_reset(self, *, id: str, oob: bool = False, timeout: float | None = None) -> HotResetReport:
        """List every function that a hot reset of this device would reset, and say whether and why not it would be done.

        Args:
            oob: Run out of band, ahead of commands that wait.
            timeout: Seconds to wait for the answer; None: the client's own default.

        Raises:
            RemoteError: the server refuses, or failed. ConnectionLost, RequestTimedOut: no answer.

        """
        return await self.call(QueryHotReset(id=id), oob=oob, timeout=timeout)

    async def hot_reset(
        self, *, id: str, group_fds: Sequence[Fd] | UnsetType = UNSET, force: bool = False, timeout: float | None = None
    ) -> HotResetReport:
        """Reset the bus or slot of a device (``VFIO_DEVICE_PCI_HOT_RESET``), with every function on it.

        Each affected function must be held here, or lie in a group whose fd is lent for the call and that is attached to
        no container. All quiesce, the bus is reset once, each is restored and has its ``DEVICE_RESET``. Refused, nothing
        is touched.

        Args:
            group_fds: Groups lent for this call (group devices only).
            force: Do it also while a hypervisor is attached to the device by an export, under its hands.
            timeout: Seconds to wait for the answer; None: the client's own default.

        Raises:
            RemoteError: the server refuses, or failed. ConnectionLost, RequestTimedOut: no answer.

        """
        lent = LentFds()
        return await self.call(
            HotReset(
                id=id,
                group_fds=group_fds if isinstance(group_fds, UnsetType) else [lent.name(one) for one in group_fds],
                force=force,
            ),
            fds=lent.named,
            timeout=timeout,
        )

    async def system_reset(self, *, force: bool = False, timeout: float | None = None) -> Empty:
        """Reset every device that can be reset, as the machine's own reset does.

        Args:
            force: Do it also while a hypervisor is attached to the device by an export, under its hands.
            timeout: Seconds to wait for the answer; None: the client's own default.

        Raises:
            RemoteError: the server refuses, or failed. ConnectionLost, RequestTimedOut: no answer.

        """
        return await self.call(SystemReset(force=force), timeout=timeout)
