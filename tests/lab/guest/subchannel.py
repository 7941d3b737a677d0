"""A subchannel opened with plain system calls, by its group or by its own file, and memory its programs can use."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import select
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Literal

from tests.lab.guest import ccw

from vfiod.protocol import vfio
from vfiod.protocol.channel import Fctl, Irb, Laid, Orb, Scsw
from vfiod.protocol.vfio.ccw import AsyncCommand, CcwCmdRegion, CcwIoRegion, CcwIrq, CcwRegion

Way = Literal["group", "cdev"]

#: Below 16 MiB, so that CCWs of format 0 reach it.
LOW, LOW_SIZE = 0x10_0000, 0x10_0000
#: Beyond 4 GiB: only IDAWs of format 2 reach it.
HIGH, HIGH_SIZE = 0x2_0000_0000, 0x1_0000
#: The regions after the I/O region, in the order the kernel adds them (vfio_ccw_ops.c).
ASYNC, SCHIB, CRW = 1, 2, 3
#: Seconds until an interrupt must have come, in emulation on a busy machine.
PATIENCE = 60


class Memory:
    """Anonymous memory and where the device sees it."""

    def __init__(self, iova: int, size: int) -> None:
        self.iova = iova
        self.bytes = mmap.mmap(-1, size)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.bytes))

    def __contains__(self, iova: int) -> bool:
        return self.iova <= iova < self.iova + len(self.bytes)


class Subchannel:
    """The open device: ``fd``, the offsets of its regions, an eventfd for each of its interrupts."""

    def __init__(self, fd: int, memories: list[Memory]) -> None:
        self.fd = fd
        self.memories = memories
        self.info = vfio.DeviceInfo.unpack(self.ioctl(vfio.DeviceIoctl.VFIO_DEVICE_GET_INFO, vfio.DeviceInfo().pack()))
        self.regions = [self.region(index) for index in range(self.info.num_regions)]
        self.eventfds = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in CcwIrq]
        for irq in CcwIrq:
            change = vfio.SetIrqs(irq, 0, 1, vfio.IrqAction.TRIGGER, vfio.IrqData.EVENTFD, (self.eventfds[irq],))
            self.ioctl(vfio.DeviceIoctl.VFIO_DEVICE_SET_IRQS, change.pack())

    def ioctl(self, request: vfio.DeviceIoctl, argument: bytes = b"") -> bytes:
        """One ioctl; the structure as the kernel left it."""
        buffer = bytearray(argument)
        fcntl.ioctl(self.fd, request, buffer if argument else 0)
        return bytes(buffer)

    def region(self, index: int) -> vfio.RegionInfo:
        """What the kernel says of one region, capabilities included."""
        question = vfio.RegionInfo(index).pack()
        size = vfio.argsz_of(self.ioctl(vfio.DeviceIoctl.VFIO_DEVICE_GET_REGION_INFO, question))
        question = size.to_bytes(4, "big") + question[4:].ljust(size - 4, b"\0")
        return vfio.RegionInfo.unpack(self.ioctl(vfio.DeviceIoctl.VFIO_DEVICE_GET_REGION_INFO, question))

    # --- memory ---
    def write(self, iova: int, data: bytes) -> None:
        """Write guest memory."""
        memory = next(one for one in self.memories if iova in one)
        memory.bytes[iova - memory.iova : iova - memory.iova + len(data)] = data

    def read(self, iova: int, length: int) -> bytes:
        """Read guest memory."""
        memory = next(one for one in self.memories if iova in one)
        return memory.bytes[iova - memory.iova : iova - memory.iova + length]

    def lay(self, laid: Laid) -> Orb:
        """Put a program into memory; the ORB that starts it."""
        for address, data in laid.pieces:
            self.write(address, data)
        return laid.orb

    # --- requests: 0 or the errno ---
    def start(self, orb: Orb, function: Fctl = Fctl.START) -> int:
        """Write the I/O region. The caller has drained the interrupt's eventfd (``fired``)."""
        data = CcwIoRegion(orb=orb.pack(), scsw=Scsw(fctl=function).pack()).pack()
        return self._write(CcwRegion.CONFIG, data)

    def control(self, command: AsyncCommand) -> int:
        """Halt or clear."""
        return self._write(ASYNC, CcwCmdRegion(command).pack())

    def reset(self) -> int:
        """VFIO_DEVICE_RESET."""
        try:
            self.ioctl(vfio.DeviceIoctl.VFIO_DEVICE_RESET)
        except OSError as error:
            return error.errno or -1
        return 0

    def _write(self, index: int, data: bytes) -> int:
        # EAGAIN: another access to the region is in progress. The kernel asks for another try.
        while True:
            try:
                assert os.pwrite(self.fd, data, self.regions[index].offset) == len(data)
            except OSError as error:
                if error.errno == errno.EAGAIN:
                    continue
                return error.errno or -1
            return 0

    def look(self, index: int) -> bytes:
        """Read a region whole."""
        data = os.pread(self.fd, self.regions[index].size, self.regions[index].offset)
        assert len(data) == self.regions[index].size
        return data

    def io(self) -> CcwIoRegion:
        """Read the I/O region."""
        return CcwIoRegion.unpack(self.look(CcwRegion.CONFIG))

    # --- interrupts ---
    def fired(self, irq: CcwIrq) -> bool:
        """Whether the interrupt came since the last question."""
        try:
            os.eventfd_read(self.eventfds[irq])
        except BlockingIOError:
            return False
        return True

    def wait(self, irq: CcwIrq, seconds: float = PATIENCE) -> None:
        """Wait for an interrupt; TimeoutError when none comes."""
        poll = select.poll()
        poll.register(self.eventfds[irq], select.POLLIN)
        if not poll.poll(seconds * 1000):
            raise TimeoutError(f"no {irq.name} interrupt within {seconds} s")
        os.eventfd_read(self.eventfds[irq])

    def run(self, laid: Laid) -> Irb:
        """Run a program to its end: the IRB. A stale interrupt is dropped first."""
        orb = self.lay(laid)
        self.fired(CcwIrq.IO)
        assert self.start(orb) == 0
        self.wait(CcwIrq.IO)
        return Irb.unpack(self.io().irb)


@contextmanager
def opened(device: str, way: Way) -> Iterator[Subchannel]:
    """Have the device's subchannel open, as a mediated device, for the length of a block."""
    name = ccw.mediated(device)
    with ExitStack() as stack:
        memories = [Memory(LOW, LOW_SIZE), Memory(HIGH, HIGH_SIZE)]
        fd = _by_group(stack, name, memories) if way == "group" else _by_cdev(stack, name, memories)
        yield Subchannel(fd, memories)


def open_file(stack: ExitStack, path: str) -> int:
    """Open for the length of a stack."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    stack.callback(os.close, fd)
    return fd


def _by_group(stack: ExitStack, name: str, memories: list[Memory]) -> int:
    container = open_file(stack, "/dev/vfio/vfio")
    group = open_file(stack, f"/dev/vfio/{ccw.group_of(name)}")
    fcntl.ioctl(group, vfio.GroupIoctl.VFIO_GROUP_SET_CONTAINER, container.to_bytes(4, "big"))
    fcntl.ioctl(container, vfio.ContainerIoctl.VFIO_SET_IOMMU, vfio.Extension.TYPE1v2_IOMMU)
    flags = vfio.DmaMapFlags.READ | vfio.DmaMapFlags.WRITE
    for one in memories:
        request = vfio.DmaMap(flags, one.address, one.iova, len(one.bytes)).pack()
        fcntl.ioctl(container, vfio.ContainerIoctl.VFIO_IOMMU_MAP_DMA, request)
    fd: int = fcntl.ioctl(group, vfio.GroupIoctl.VFIO_GROUP_GET_DEVICE_FD, bytearray(name.encode() + b"\0"))
    stack.callback(os.close, fd)
    return fd


def _by_cdev(stack: ExitStack, name: str, memories: list[Memory]) -> int:
    iommufd = open_file(stack, "/dev/iommu")
    fd = open_file(stack, str(ccw.cdev_of(name)))
    fcntl.ioctl(fd, vfio.DeviceIoctl.VFIO_DEVICE_BIND_IOMMUFD, bytearray(vfio.BindIommufd(iommufd).pack()))
    buffer = bytearray(vfio.IoasAlloc().pack())
    fcntl.ioctl(iommufd, vfio.IommufdIoctl.IOMMU_IOAS_ALLOC, buffer)
    ioas = vfio.IoasAlloc.unpack(buffer).out_ioas_id
    fcntl.ioctl(fd, vfio.DeviceIoctl.VFIO_DEVICE_ATTACH_IOMMUFD_PT, bytearray(vfio.AttachPt(ioas).pack()))
    flags = vfio.IoasMapFlags.FIXED_IOVA | vfio.IoasMapFlags.READABLE | vfio.IoasMapFlags.WRITEABLE
    for one in memories:
        request = bytearray(vfio.IoasMap(flags, ioas, one.address, len(one.bytes), one.iova).pack())
        fcntl.ioctl(iommufd, vfio.IommufdIoctl.IOMMU_IOAS_MAP, request)
    return fd
