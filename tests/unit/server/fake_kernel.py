"""A small, faithful model of VFIO's kernel side: the only fake of the whole program.

It stands in for :class:`vfiod.server.kernel.syscalls.Syscalls`. Every fd it hands out is a real one (a memfd), so
that ``close``, ``dup`` and passing work really, and it looks at this process's open fds to know what is still
held, as the kernel's reference counts do. Rules: ``drivers/vfio/{group,container,vfio_iommu_type1}.c``.

::

    kernel = FakeKernel()
    kernel.add_device("0000:01:00.0", group=7)
    group = FileDescriptor(kernel.open("/dev/vfio/7"))     # what a manager does
    groups = KernelGroups(kernel, ...)
    ...
    kernel.fail("VFIO_SET_IOMMU", errno.EPERM)             # the next one fails
    kernel.device("0000:01:00.0").raise_interrupt()
    kernel.request("0000:01:00.0")                         # the host wants it back
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
from collections import deque
from dataclasses import dataclass, field
from uuid import UUID

from tests.unit.server import fake_iommufd
from tests.unit.server.fake_device import FakeDevice, refuse
from tests.unit.server.fake_iommufd import FakeCdevFile, FakeIoas, FakeIommufd
from tests.unit.server.fake_platform import FakePlatformDevice

from vfiod.protocol import vfio
from vfiod.protocol.fd import FdKind
from vfiod.server.kernel.syscalls import PAGE_SIZE, Syscalls

__all__ = ["FakeContainer", "FakeDevice", "FakeGroup", "FakeIoas", "FakeIommufd", "FakeKernel"]

GROUP_MAJOR = 242
CDEV_MAJOR = 511
IOMMU_MINOR = 124
X86_RANGES = ((0, 0xFEDFFFFF), (0xFEF00000, (1 << 39) - 1))


@dataclass
class FakeContainer:
    """An open ``/dev/vfio/vfio``."""

    inode: int
    iommu: int | None = None
    groups: list[FakeGroup] = field(default_factory=list)
    mappings: dict[int, tuple[int, int, vfio.DmaMapFlags]] = field(default_factory=dict)  # iova: size, vaddr, flags

    @property
    def locked(self) -> int:
        return sum(size for size, _, _ in self.mappings.values())

    def translate(self, iova: int, size: int, write: bool) -> int:
        for start, (length, vaddr, flags) in self.mappings.items():
            if start <= iova and iova + size <= start + length:
                if write and not flags & vfio.DmaMapFlags.WRITE:
                    break
                return vaddr + iova - start
        raise refuse(errno.EFAULT)


@dataclass
class FakeGroup:
    """An IOMMU group with at least one device."""

    number: int
    noiommu: bool = False
    inode: int | None = None  # of the one open file
    container: FakeContainer | None = None
    claimed: bool = False  # by somebody else's cdev or container


class FakeKernel(Syscalls):
    """See the module.

    Attributes:
        memory_lock: RLIMIT_MEMLOCK, None: unlimited.
        ipc_lock: CAP_IPC_LOCK.
        rawio: CAP_SYS_RAWIO.
        sysfs: whether /sys is there.
        api_version: what ``VFIO_GET_API_VERSION`` says.
        extensions: what ``VFIO_CHECK_EXTENSION`` has.
        interrupt_remapping: whether type1 takes groups.
        compatible: whether a second group fits into a container's IOMMU, a second device into an IOAS.
        maps_files: whether there is ``IOMMU_IOAS_MAP_FILE`` (Linux 6.13).
        bind_takes_token: whether BIND knows a VF token (Linux 6.17).
        log: every ioctl that was made, by name, in order.

    """

    def __init__(self) -> None:
        self.memory_lock: int | None = None
        self.ipc_lock = False
        self.rawio = True
        self.sysfs = True
        self.api_version = 0
        self.extensions = {vfio.Extension.TYPE1_IOMMU, vfio.Extension.TYPE1v2_IOMMU, vfio.Extension.NOIOMMU_IOMMU}
        self.interrupt_remapping = True
        self.compatible = True
        self.maps_files = True
        self.bind_takes_token = True
        self.iova_ranges: tuple[tuple[int, int], ...] = X86_RANGES
        self.page_sizes = PAGE_SIZE | 1 << 21 | 1 << 30
        self.modes = {"/dev/vfio/vfio": 0}  # path -> errno of open, 0: works
        self.file_limit = 1024
        self.log: list[str] = []
        self.groups: dict[int, FakeGroup] = {}
        self.devices: dict[str, FakeDevice] = {}
        self._objects: dict[int, FakeContainer | FakeGroup | FakeDevice | FakeIommufd | FakeCdevFile] = {}
        self._failures: dict[str, deque[int]] = {}

    # --- set-up and looking in ---
    def add_device(self, name: str, group: int, *, noiommu: bool = False, **settings: object) -> FakeDevice:
        """A device of the host; ``settings`` are attributes of :class:`FakeDevice`."""
        device = FakeDevice(name, group, len(self.devices))
        for key, value in settings.items():
            getattr(device, key)
            setattr(device, key, value)
        self.devices[name] = device
        self.groups.setdefault(group, FakeGroup(group, noiommu))
        return device

    def add_platform_device(
        self, name: str, group: int, *, noiommu: bool = False, **settings: object
    ) -> FakePlatformDevice:
        """A platform device of the host; ``settings`` are attributes of :class:`FakePlatformDevice`."""
        device = FakePlatformDevice(name, group, len(self.devices))
        for key, value in settings.items():
            getattr(device, key)
            setattr(device, key, value)
        self.devices[name] = device
        self.groups.setdefault(group, FakeGroup(group, noiommu))
        return device

    def device(self, name: str) -> FakeDevice:
        """One of them, after what the kernel does by itself."""
        self._reap()
        self.devices[name].poll()
        return self.devices[name]

    def fail(self, operation: str, *numbers: int) -> None:
        """The next ioctls (or ``open``s) of this name fail with these errnos; 0 lets one pass."""
        self._failures.setdefault(operation, deque()).extend(numbers)

    def request(self, name: str) -> bool:
        """The host asks for a device back; returns whether anybody listens."""
        return self.device(name).signal_single(vfio.PciIrq.REQ)

    def containers(self) -> list[FakeContainer]:
        """Those that exist."""
        self._reap()
        return [thing for thing in self._objects.values() if isinstance(thing, FakeContainer)]

    def iommufds(self) -> list[FakeIommufd]:
        """Those that exist."""
        self._reap()
        return [thing for thing in self._objects.values() if isinstance(thing, FakeIommufd)]

    def ioases(self) -> list[FakeIoas]:
        """Those that exist."""
        return [ioas for iommufd in self.iommufds() for ioas in iommufd.ioases()]

    def nothing_is_open(self) -> bool:
        """Whether no container, group or device is held by anybody."""
        self._reap()
        return not self._objects

    def kind(self, fd: int) -> FdKind | None:
        """The kind of one of its own fds."""
        thing = self._objects.get(os.fstat(fd).st_ino)
        kinds = {
            FakeContainer: FdKind.VFIO_CONTAINER,
            FakeGroup: FdKind.VFIO_GROUP,
            FakeDevice: FdKind.VFIO_DEVICE,
            FakeIommufd: FdKind.IOMMUFD,
            FakeCdevFile: FdKind.VFIO_DEVICE,
        }
        return kinds.get(type(thing)) if thing is not None else None

    # --- files ---
    def open(self, path: str) -> int:
        self._reap()
        self._maybe_fail("open")
        if self.modes.get(path):
            raise refuse(self.modes[path])
        if path == "/dev/vfio/vfio":
            fd, inode = self._file("container")
            self._objects[inode] = FakeContainer(inode)
            return fd
        if path == "/dev/iommu":
            fd, inode = self._file("iommufd")
            self._objects[inode] = FakeIommufd(inode)
            return fd
        for device in self.devices.values():
            if path == f"/dev/vfio/devices/vfio{device.cdev}" and device.driver and "vfio" in device.driver:
                fd, inode = self._file(f"cdev-{device.cdev}")
                self._objects[inode] = FakeCdevFile(device)
                return fd
        for group in self.groups.values():
            if path == f"/dev/vfio/{'noiommu-' if group.noiommu else ''}{group.number}" and self._bound(group):
                if group.noiommu and not self.rawio:
                    raise refuse(errno.EPERM)
                if group.inode is not None or self._cdevs_open(group.number):
                    raise refuse(errno.EBUSY)
                fd, group.inode = self._file(f"group-{group.number}")
                self._objects[group.inode] = group
                return fd
        raise refuse(errno.ENOENT)

    def _file(self, name: str) -> tuple[int, int]:
        fd = os.memfd_create(f"fake-{name}", os.MFD_CLOEXEC)
        return fd, os.fstat(fd).st_ino

    def _cdev_files(self) -> list[FakeCdevFile]:
        """Those that are bound."""
        return [one for one in self._objects.values() if isinstance(one, FakeCdevFile) and one.iommufd is not None]

    def _cdevs_open(self, group: int) -> list[FakeCdevFile]:
        return [file for file in self._cdev_files() if file.device.group == group]

    def _bound(self, group: FakeGroup) -> list[FakeDevice]:
        mine = (device for device in self.devices.values() if device.group == group.number)
        return [device for device in mine if device.driver and "vfio" in device.driver]

    def fstat(self, fd: int) -> os.stat_result:
        real = os.fstat(fd)
        thing = self._objects.get(real.st_ino)
        if isinstance(thing, FakeContainer):
            return self._character_device(real, os.makedev(10, 196))
        if isinstance(thing, FakeGroup):
            return self._character_device(real, os.makedev(GROUP_MAJOR, thing.number))
        if isinstance(thing, FakeDevice):
            return os.stat_result((0o600, *real[1:10]))
        if isinstance(thing, FakeCdevFile):
            return self._character_device(real, os.makedev(CDEV_MAJOR, thing.device.cdev))
        if isinstance(thing, FakeIommufd):
            return self._character_device(real, os.makedev(10, IOMMU_MINOR))
        return real

    def _character_device(self, real: os.stat_result, device: int) -> os.stat_result:
        return os.stat_result((stat.S_IFCHR | 0o600, *real[1:10]), {"st_rdev": device})

    def link_of(self, fd: int) -> str:
        thing = self._objects.get(os.fstat(fd).st_ino)
        match thing:
            case FakeContainer():
                return "/dev/vfio/vfio"
            case FakeGroup():
                return f"/dev/vfio/{'noiommu-' if thing.noiommu else ''}{thing.number}"
            case FakeDevice():
                return "anon_inode:[vfio-device]"
            case FakeCdevFile():
                return f"/dev/vfio/devices/vfio{thing.device.cdev}"
            case FakeIommufd():
                return "/dev/iommu"
        return super().link_of(fd)

    def same_file(self, first: int, second: int) -> bool | None:
        return os.fstat(first).st_ino == os.fstat(second).st_ino

    def pread(self, fd: int, length: int, offset: int) -> bytes:
        thing = self._device_behind(fd)
        if isinstance(thing, FakeDevice):
            self._maybe_fail("pread")
            return thing.read(length, offset)
        return super().pread(fd, length, offset)

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        thing = self._device_behind(fd)
        if isinstance(thing, FakeDevice):
            self._maybe_fail("pwrite")
            return thing.write(data, offset)
        return super().pwrite(fd, data, offset)

    def _device_behind(self, fd: int) -> object:
        thing = self._objects.get(os.fstat(fd).st_ino)
        if isinstance(thing, FakeCdevFile):
            if thing.iommufd is None:
                raise refuse(errno.EINVAL)
            return thing.device
        return thing

    # --- what is still held ---
    def _reap(self) -> None:
        """Let go of what no fd refers to any more: devices, then groups, then containers."""
        if not self._objects:
            return
        live = self._live_inodes()
        for inode, thing in list(self._objects.items()):
            if isinstance(thing, FakeDevice | FakeCdevFile) and inode not in live:
                del self._objects[inode]
                thing.close()
        for inode, thing in list(self._objects.items()):
            bound = any(file.iommufd is thing for file in self._cdev_files())
            if isinstance(thing, FakeIommufd) and inode not in live and not bound:
                del self._objects[inode]
                thing.close()
        for inode, thing in list(self._objects.items()):
            if isinstance(thing, FakeGroup) and inode not in live and not self._open_devices(thing):
                del self._objects[inode]
                self._detach(thing)
                thing.inode = None
        for inode, thing in list(self._objects.items()):
            if isinstance(thing, FakeContainer) and inode not in live and not thing.groups:
                del self._objects[inode]

    def _live_inodes(self) -> set[int]:
        own = {device.fd for device in self.devices.values()}  # the model's own references do not count
        live = set()
        for name in os.listdir("/proc/self/fd"):
            try:
                if int(name) not in own:
                    live.add(os.fstat(int(name)).st_ino)
            except OSError:
                continue
        return live

    def _open_devices(self, group: FakeGroup) -> list[FakeDevice]:
        return [device for device in self.devices.values() if device.group == group.number and device.opened]

    def _detach(self, group: FakeGroup) -> None:
        container, group.container = group.container, None
        if container is not None:
            container.groups.remove(group)
            if not container.groups:
                container.iommu = None
                container.mappings.clear()

    # --- ioctls ---
    def ioctl(self, fd: int, request: int, argument: int | bytearray = 0) -> int:
        self._reap()
        thing = self._objects.get(os.fstat(fd).st_ino)
        number = argument if isinstance(argument, int) else 0
        buffer = argument if isinstance(argument, bytearray) else bytearray()
        match thing:
            case FakeContainer():
                enum: type[vfio.Ioctl] = vfio.ContainerIoctl
            case FakeGroup():
                enum = vfio.GroupIoctl
            case FakeDevice():
                enum = vfio.DeviceIoctl
            case FakeCdevFile():
                enum = vfio.DeviceIoctl
            case FakeIommufd():
                enum = vfio.IommufdIoctl
            case _:
                raise refuse(errno.ENOTTY)
        try:
            name = enum(request).name
        except ValueError:
            raise refuse(errno.ENOTTY) from None
        self.log.append(name)
        self._maybe_fail(name)
        if isinstance(thing, FakeContainer):
            return self._container_ioctl(thing, name, number, buffer)
        if isinstance(thing, FakeGroup):
            return self._group_ioctl(thing, name, buffer)
        if isinstance(thing, FakeIommufd):
            return self._iommufd_ioctl(thing, name, buffer)
        if isinstance(thing, FakeCdevFile):
            return self._cdev_ioctl(thing, fd, name, buffer)
        return self._device_ioctl(thing, name, buffer)

    def _maybe_fail(self, name: str) -> None:
        queue = self._failures.get(name)
        if queue:
            number = queue.popleft()
            if number:
                raise refuse(number)

    @staticmethod
    def _answer(buffer: bytearray, whole: bytes, cap_offset: int | None = None) -> None:
        """What INFO ioctls do: all of it when it fits, else the fixed part, ``cap_offset`` 0 and the size needed."""
        size = vfio.argsz_of(buffer)
        fits = bytearray(whole[:size])
        if len(whole) > size and cap_offset is not None and cap_offset + 4 <= size:
            fits[cap_offset : cap_offset + 4] = bytes(4)
        buffer[: len(fits)] = fits

    def _container_ioctl(self, container: FakeContainer, name: str, number: int, buffer: bytearray) -> int:
        match name:
            case "VFIO_GET_API_VERSION":
                return self.api_version
            case "VFIO_CHECK_EXTENSION":
                noiommu = number == vfio.Extension.NOIOMMU_IOMMU
                if container.groups and container.groups[0].noiommu != noiommu:
                    return 0
                return int(number in self.extensions)
            case "VFIO_SET_IOMMU":
                if not container.groups or container.iommu is not None or number not in self.extensions:
                    raise refuse(errno.EINVAL)
                noiommu = number == vfio.Extension.NOIOMMU_IOMMU
                if container.groups[0].noiommu != noiommu:
                    raise refuse(errno.ENODEV)
                if not noiommu and not self.interrupt_remapping:
                    raise refuse(errno.EPERM)
                container.iommu = number
                return 0
        if container.iommu is None:
            raise refuse(errno.EINVAL)
        if container.iommu == vfio.Extension.NOIOMMU_IOMMU:
            raise refuse(errno.ENOTTY)
        match name:
            case "VFIO_IOMMU_GET_INFO":
                chain = (vfio.IovaRanges(self.iova_ranges), vfio.DmaAvailable(65535 - len(container.mappings)))
                info = vfio.Type1Info(vfio.Type1Flags.PGSIZES, self.page_sizes, chain if self.iova_ranges else ())
                self._answer(buffer, info.pack(), 16)
                return 0
            case "VFIO_IOMMU_MAP_DMA":
                return self._map(container, vfio.DmaMap.unpack(bytes(buffer)))
            case "VFIO_IOMMU_UNMAP_DMA":
                request = vfio.DmaUnmap.unpack(bytes(buffer))
                done = self._unmap(container, request)
                buffer[:] = vfio.DmaUnmap(request.iova, done, request.flags).pack()
                return 0
        raise refuse(errno.ENOTTY)

    def _map(self, container: FakeContainer, request: vfio.DmaMap) -> int:
        mask = (self.page_sizes & -self.page_sizes) - 1
        last = request.iova + request.size - 1
        if (request.iova | request.size | request.vaddr) & mask or not request.size or not request.flags:
            raise refuse(errno.EINVAL)
        if self.iova_ranges and not any(low <= request.iova and last <= high for low, high in self.iova_ranges):
            raise refuse(errno.EINVAL)
        if any(start <= last and request.iova < start + held[0] for start, held in container.mappings.items()):
            raise refuse(errno.EEXIST)
        if not self._is_memory(request.vaddr, request.size, write=bool(request.flags & vfio.DmaMapFlags.WRITE)):
            raise refuse(errno.EFAULT)
        if self.memory_lock is not None and not self.ipc_lock and self._locked() + request.size > self.memory_lock:
            raise refuse(errno.ENOMEM)
        container.mappings[request.iova] = (request.size, request.vaddr, request.flags)
        return 0

    def _unmap(self, container: FakeContainer, request: vfio.DmaUnmap) -> int:
        if request.flags & vfio.DmaUnmapFlags.ALL:
            done = container.locked
            container.mappings.clear()
            return done
        mask = (self.page_sizes & -self.page_sizes) - 1
        end = request.iova + request.size
        if not request.size or (request.iova | request.size) & mask:
            raise refuse(errno.EINVAL)
        hit = [start for start, held in container.mappings.items() if start < end and request.iova < start + held[0]]
        if any(start < request.iova or start + container.mappings[start][0] > end for start in hit):
            raise refuse(errno.EINVAL)
        return sum(container.mappings.pop(start)[0] for start in hit)

    @staticmethod
    def _is_memory(address: int, size: int, *, write: bool) -> bool:
        with open("/proc/self/maps") as maps:
            for line in maps:
                span, mode = line.split()[:2]
                low, high = (int(part, 16) for part in span.split("-"))
                if low <= address < high:
                    if "r" not in mode or (write and "w" not in mode):
                        return False
                    if address + size <= high:
                        return True
                    size -= high - address
                    address = high
        return False

    def _group_ioctl(self, group: FakeGroup, name: str, buffer: bytearray) -> int:
        match name:
            case "VFIO_GROUP_GET_STATUS":
                flags = vfio.GroupFlags(0)
                if group.container is not None:
                    flags = vfio.GroupFlags.VIABLE | vfio.GroupFlags.CONTAINER_SET
                elif self._viable(group):
                    flags = vfio.GroupFlags.VIABLE
                self._answer(buffer, vfio.GroupStatus(flags).pack())
                return 0
            case "VFIO_GROUP_SET_CONTAINER":
                return self._set_container(group, struct.unpack("=i", buffer)[0])
            case "VFIO_GROUP_UNSET_CONTAINER":
                if group.container is None:
                    raise refuse(errno.EINVAL)
                if self._open_devices(group):
                    raise refuse(errno.EBUSY)
                self._detach(group)
                return 0
        return self._get_device(group, bytes(buffer).split(b"\0")[0].decode())

    def _viable(self, group: FakeGroup) -> bool:
        mine = [device for device in self.devices.values() if device.group == group.number]
        stubs = ("pci-stub", "pcieport")
        return not group.claimed and all(d.driver is None or d.driver in stubs or "vfio" in d.driver for d in mine)

    def _set_container(self, group: FakeGroup, fd: int) -> int:
        if group.container is not None:
            raise refuse(errno.EINVAL)
        container = self._objects.get(os.fstat(fd).st_ino)
        if not isinstance(container, FakeContainer):
            raise refuse(errno.EBADFD)
        if group.noiommu and not self.rawio:
            raise refuse(errno.EPERM)
        if container.groups and container.groups[0].noiommu != group.noiommu:
            raise refuse(errno.EPERM)
        if not self._viable(group):
            raise refuse(errno.EBUSY)
        if container.iommu is not None and not self.compatible:
            raise refuse(errno.EINVAL)
        group.container = container
        container.groups.append(group)
        return 0

    def _get_device(self, group: FakeGroup, name: str) -> int:
        name, _, token = name.partition(" vf_token=")
        device = self.devices.get(name)
        if device is None or device not in self._bound(group):
            raise refuse(errno.ENODEV)
        self._match_token(device, UUID(token).bytes if token else None)
        if group.container is None or group.container.iommu is None:
            raise refuse(errno.EINVAL)
        if device.opened:  # the kernel gives a second fd of the same device
            return os.dup(device.fd)
        fd, inode = self._file(name)
        device.open(fd, group.container.translate)
        self._objects[inode] = device
        return fd

    def _match_token(self, device: FakeDevice, token: bytes | None) -> None:
        """``vfio_pci_core_match_token_uuid``."""
        if device.vf_of is not None:
            physical = self.devices[device.vf_of]
            if not (physical.driver and "vfio" in physical.driver):
                if token is not None:
                    raise refuse(errno.EINVAL)
            elif token is None or token != physical.vf_token:
                raise refuse(errno.EACCES)
        elif device.sriov:
            if any(other.vf_of == device.name and other.opened for other in self.devices.values()):
                if token != device.vf_token:
                    raise refuse(errno.EACCES)
            elif token is not None:
                device.vf_token = token
        elif token is not None:
            raise refuse(errno.EINVAL)

    # --- cdevs (drivers/vfio/device_cdev.c) ---
    def _cdev_ioctl(self, file: FakeCdevFile, fd: int, name: str, buffer: bytearray) -> int:
        if name == "VFIO_DEVICE_BIND_IOMMUFD":
            return self._bind(file, fd, buffer)
        if file.iommufd is None:
            raise refuse(errno.EINVAL)
        if name == "VFIO_DEVICE_ATTACH_IOMMUFD_PT":
            ioas = file.iommufd.ioas(vfio.AttachPt.unpack(buffer).pt_id)
            if ioas.devices and not self.compatible:
                raise refuse(errno.EINVAL)
            fake_iommufd.attach(file, ioas)
            return 0
        if name == "VFIO_DEVICE_DETACH_IOMMUFD_PT":
            file.detach()
            return 0
        return self._device_ioctl(file.device, name, buffer, file)

    def _bind(self, file: FakeCdevFile, fd: int, buffer: bytearray) -> int:
        request = vfio.BindIommufd.unpack(buffer)
        device = file.device
        if request.flags and not self.bind_takes_token:
            raise refuse(errno.EINVAL)
        group = self.groups[device.group]
        if group.inode is not None:
            raise refuse(errno.EBUSY)
        if file.iommufd is not None or device.opened:
            raise refuse(errno.EINVAL)
        if self.bind_takes_token:
            wanted = request.flags & vfio.BindFlags.TOKEN
            self._match_token(device, ctypes.string_at(request.token_uuid_ptr, 16) if wanted else None)
        iommufd = self._objects.get(os.fstat(request.iommufd).st_ino)
        if not isinstance(iommufd, FakeIommufd):
            raise refuse(errno.EBADFD)
        if not self.interrupt_remapping or not self._viable(group):
            raise refuse(errno.EPERM)
        if any(other.iommufd is not iommufd for other in self._cdevs_open(device.group)):
            raise refuse(errno.EPERM)
        device.open(fd, fake_iommufd._nowhere)
        file.iommufd = iommufd
        struct.pack_into("=I", buffer, 12, iommufd.allocate(device))
        return 0

    # --- iommufd (drivers/iommu/iommufd) ---
    def _iommufd_ioctl(self, iommufd: FakeIommufd, name: str, buffer: bytearray) -> int:
        match name:
            case "IOMMU_DESTROY":
                number = vfio.IommuDestroy.unpack(buffer).id
                thing = iommufd.objects.get(number)
                if thing is None:
                    raise refuse(errno.ENOENT)
                if isinstance(thing, FakeDevice) or thing.devices:
                    raise refuse(errno.EBUSY)
                thing.clear()
                del iommufd.objects[number]
            case "IOMMU_IOAS_ALLOC":
                buffer[:] = vfio.IoasAlloc(iommufd.allocate(FakeIoas())).pack()
            case "IOMMU_IOAS_IOVA_RANGES":
                self._answer_ranges(iommufd, buffer)
            case "IOMMU_IOAS_MAP":
                request = vfio.IoasMap.unpack(buffer)
                write = bool(request.flags & vfio.IoasMapFlags.WRITEABLE)
                self._check_map(iommufd, request.ioas_id, request.iova, request.length, request.user_va)
                if not self._is_memory(request.user_va, request.length, write=write):
                    raise refuse(errno.EFAULT)
                fake_iommufd.map_address(iommufd.ioas(request.ioas_id), request)
            case "IOMMU_IOAS_MAP_FILE":
                if not self.maps_files:
                    raise refuse(errno.ENOTTY)
                wanted = vfio.IoasMapFile.unpack(buffer)
                self._check_map(iommufd, wanted.ioas_id, wanted.iova, wanted.length, wanted.start)
                fake_iommufd.map_file(iommufd.ioas(wanted.ioas_id), wanted, shared_only=True)
            case "IOMMU_IOAS_UNMAP":
                asked = vfio.IoasUnmap.unpack(buffer)
                done = fake_iommufd.unmap(iommufd.ioas(asked.ioas_id), asked.iova, asked.length)
                buffer[:] = vfio.IoasUnmap(asked.ioas_id, asked.iova, done).pack()
            case "IOMMU_GET_HW_INFO":
                question = vfio.HwInfo.unpack(buffer)
                if not isinstance(iommufd.objects.get(question.dev_id), FakeDevice):
                    raise refuse(errno.ENOENT)
                buffer[:] = vfio.HwInfo(question.dev_id, vfio.HwInfoType.INTEL_VTD).pack()
            case "IOMMU_OPTION":
                option = vfio.IommuOption.unpack(buffer)
                if option.op is not vfio.IommufdOptionOp.GET:
                    raise refuse(errno.EPERM)
                value = int(iommufd.per_process)
                buffer[:] = vfio.IommuOption(option.option_id, option.op, option.object_id, value).pack()
            case _:
                raise refuse(errno.ENOTTY)
        return 0

    def _answer_ranges(self, iommufd: FakeIommufd, buffer: bytearray) -> None:
        question = vfio.IoasIovaRanges.unpack(buffer)
        ioas = iommufd.ioas(question.ioas_id)
        ranges = (self.iova_ranges if ioas.devices else ()) or ((0, (1 << 64) - 1),)
        packed = b"".join(vfio.IovaRange.LAYOUT.pack(*one) for one in ranges[: question.num_iovas])
        ctypes.memmove(question.allowed_iovas, packed, len(packed))
        alignment = self.page_sizes & -self.page_sizes if ioas.devices else 1
        answer = vfio.IoasIovaRanges(question.ioas_id, len(ranges), question.allowed_iovas, alignment)
        buffer[:] = answer.pack()
        if len(ranges) > question.num_iovas:
            raise refuse(errno.EMSGSIZE)

    def _check_map(self, iommufd: FakeIommufd, number: int, iova: int, length: int, place: int) -> None:
        ioas = iommufd.ioas(number)
        mask = (self.page_sizes & -self.page_sizes) - 1
        last = iova + length - 1
        if (iova | length | place) & mask or not length:
            raise refuse(errno.EINVAL)
        if not any(low <= iova and last <= high for low, high in self.iova_ranges or ((0, (1 << 64) - 1),)):
            raise refuse(errno.EINVAL)
        if any(start <= last and iova < start + held.size for start, held in ioas.mappings.items()):
            raise refuse(errno.EADDRINUSE)
        if self.memory_lock is not None and not self.ipc_lock and self._locked() + length > self.memory_lock:
            raise refuse(errno.ENOMEM)

    # --- hot reset (drivers/vfio/pci/vfio_pci_core.c) ---
    def _affected(self, device: FakeDevice) -> list[FakeDevice]:
        """Every function of its bus, in order."""
        if not device.hot_resettable:
            raise refuse(errno.ENODEV)
        bus = device.name.rpartition(":")[0]
        return [self.devices[name] for name in sorted(self.devices) if name.rpartition(":")[0] == bus]

    @staticmethod
    def _owner_id(device: FakeDevice, iommufd: FakeIommufd) -> int:
        number = iommufd.id_of(device)
        if number is not None:
            return number
        group = any(isinstance(one, FakeDevice) and one.group == device.group for one in iommufd.objects.values())
        return vfio.VFIO_PCI_DEVID_OWNED if group else vfio.VFIO_PCI_DEVID_NOT_OWNED

    def _hot_reset_info(self, device: FakeDevice, buffer: bytearray, file: FakeCdevFile | None) -> None:
        affected = self._affected(device)
        room = (vfio.argsz_of(buffer) - vfio.HotResetInfo.LAYOUT.size) // vfio.DependentDevice.LAYOUT.size
        if len(affected) > room:
            struct.pack_into("=II", buffer, 4, 0, len(affected))
            raise refuse(errno.ENOSPC)
        flags = vfio.HotResetFlags(0)
        entries = []
        for one in affected:
            segment, bus, rest = one.name.split(":")
            slot, function = rest.split(".")
            number = one.group
            if file is not None and file.iommufd is not None:
                number = self._owner_id(one, file.iommufd) & 0xFFFFFFFF
            devfn = int(slot, 16) << 3 | int(function)
            entries.append(vfio.DependentDevice(number, int(segment, 16), int(bus, 16), devfn))
        if file is not None:
            flags |= vfio.HotResetFlags.DEV_ID
            if all(entry.devid >= 0 for entry in entries):
                flags |= vfio.HotResetFlags.DEV_ID_OWNED
        packed = vfio.HotResetInfo(flags, tuple(entries)).pack()
        buffer[4 : len(packed)] = packed[4:]

    def _hot_reset(self, device: FakeDevice, buffer: bytearray, file: FakeCdevFile | None) -> None:
        fds = vfio.HotReset.unpack(bytes(buffer)).group_fds
        if bool(fds) == (file is not None):
            raise refuse(errno.EINVAL)
        affected = self._affected(device)
        if len(fds) > len(affected):
            raise refuse(errno.EINVAL)
        numbers = set()
        for fd in fds:
            try:
                group = self._objects.get(os.fstat(fd).st_ino)
            except OSError:
                raise refuse(errno.EBADF) from None
            if not isinstance(group, FakeGroup):
                raise refuse(errno.EINVAL)
            numbers.add(group.number)
        for one in affected:
            if one.vf_of is not None or not (one.driver and "vfio" in one.driver):
                raise refuse(errno.EINVAL)  # a VF is in no set but its own (vfio_pci_dev_set_resettable)
            if file is not None and file.iommufd is not None:
                owned = self._owner_id(one, file.iommufd) >= 0
            else:
                owned = one.group in numbers
            if not owned:
                raise refuse(errno.EINVAL)
        for one in affected:
            one.hot_resets += 1
            if one.opened:
                one.forget()

    def _device_ioctl(self, device: FakeDevice, name: str, buffer: bytearray, file: FakeCdevFile | None = None) -> int:
        device.poll()
        match name:
            case "VFIO_DEVICE_GET_INFO":
                self._answer(buffer, device.device_info(), 16)
            case "VFIO_DEVICE_GET_REGION_INFO":
                self._answer(buffer, device.region_info(vfio.RegionInfo.unpack(bytes(buffer)).index), 12)
            case "VFIO_DEVICE_GET_IRQ_INFO":
                self._answer(buffer, device.irq_info(vfio.IrqInfo.unpack(bytes(buffer)).index))
            case "VFIO_DEVICE_SET_IRQS":
                return device.set_irqs(vfio.SetIrqs.unpack(bytes(buffer)))
            case "VFIO_DEVICE_RESET":
                device.reset()
            case "VFIO_DEVICE_GET_PCI_HOT_RESET_INFO":
                self._hot_reset_info(device, buffer, file)
            case "VFIO_DEVICE_PCI_HOT_RESET":
                self._hot_reset(device, buffer, file)
            case "VFIO_DEVICE_BIND_IOMMUFD":
                raise refuse(errno.EINVAL)  # a device of a group
            case "VFIO_DEVICE_FEATURE":
                self._feature(device, buffer)
            case _:
                raise refuse(errno.ENOTTY)
        return 0

    @staticmethod
    def _feature(device: FakeDevice, buffer: bytearray) -> None:
        asked = vfio.DeviceFeature.unpack(bytes(buffer))
        setting = vfio.FeatureFlags.SET in asked.flags
        if asked.feature == vfio.Feature.PCI_VF_TOKEN and setting:
            if not device.sriov:
                raise refuse(errno.ENOTTY)
            device.vf_token = asked.data
        elif asked.feature not in device.features:
            raise refuse(errno.ENOTTY)
        elif vfio.FeatureFlags.PROBE in asked.flags:
            return
        elif setting:
            device.feature_values[asked.feature] = asked.data
        else:
            value = device.feature_values.get(asked.feature, b"")
            if len(asked.data) < len(value):
                raise refuse(errno.EINVAL)
            buffer[asked.LAYOUT.size : asked.LAYOUT.size + len(value)] = value

    # --- limits ---
    def _locked(self) -> int:
        containers = (thing.locked for thing in self._objects.values() if isinstance(thing, FakeContainer))
        return sum(containers) + sum(
            ioas.locked for thing in self._objects.values() if isinstance(thing, FakeIommufd) for ioas in thing.ioases()
        )

    def memory_lock_limit(self) -> int | None:
        return self.memory_lock

    def memory_locked(self) -> int:
        return self._locked()

    def may_lock_any_memory(self) -> bool:
        return self.ipc_lock

    def open_file_limit(self) -> int:
        return self.file_limit

    # --- sysfs ---
    def _entry(self, path: str) -> str | None:
        """A link's target, or a file's text; None: nothing there."""
        if not self.sysfs:
            return None
        parts = path.strip("/").split("/")
        match parts:
            case ["sys", "bus"] | ["sys", "kernel", "iommu_groups"]:
                return ""
            case ["sys", "bus", bus, "devices", name, *rest] if name in self.devices and self.devices[name].bus == bus:
                return self._device_entry(self.devices[name], rest)
            case ["sys", "devices", bus, name, *rest] if name in self.devices and self.devices[name].bus == bus:
                return self._device_entry(self.devices[name], rest)
            case ["sys", "kernel", "iommu_groups", number, "devices", name, *rest] if name in self.devices:
                return self._device_entry(self.devices[name], rest) if self.devices[name].group == int(number) else None
            case ["sys", "kernel", "iommu_groups", number, "name"] if self.groups[int(number)].noiommu:
                return "vfio-noiommu\n"
            case ["sys", "dev", "char", device, "uevent"] if device == f"10:{IOMMU_MINOR}":
                return "DEVNAME=iommu\n"
            case ["sys", "dev", "char", device, "uevent"] if device.startswith(f"{CDEV_MAJOR}:"):
                return f"DEVNAME=vfio/devices/vfio{device.partition(':')[2]}\n"
            case ["sys", "dev", "char", device, "device"] if device.startswith(f"{CDEV_MAJOR}:"):
                return ""
            case ["sys", "dev", "char", device, "uevent"]:
                major, _, number = device.partition(":")
                if int(major) != GROUP_MAJOR:
                    return "MAJOR=10\nMINOR=196\nDEVNAME=vfio/vfio\n" if device == "10:196" else None
                prefix = "noiommu-" if int(number) in self.groups and self.groups[int(number)].noiommu else ""
                return f"MAJOR={GROUP_MAJOR}\nDEVNAME=vfio/{prefix}{number}\n"
            case ["proc", "interrupts"]:
                return " 0: IR-IO-APIC timer\n" if self.interrupt_remapping else " 0: IO-APIC timer\n"
        return None

    @staticmethod
    def _device_entry(device: FakeDevice, rest: list[str]) -> str | None:
        match rest:
            case []:
                return ""
            case ["driver"]:
                return f"../../bus/{device.bus}/drivers/{device.driver}" if device.driver else None
            case ["physfn"]:
                return f"../{device.vf_of}" if device.vf_of is not None else None
            case ["iommu_group"]:
                return f"../../kernel/iommu_groups/{device.group}" if device.group >= 0 else None
            case ["subsystem"]:
                return f"../../bus/{device.bus}"
            case ["reset_method"]:
                return device.reset_method
            case ["mdev_type", "device_api"]:
                return device.device_api
            case ["of_node", "compatible"] if isinstance(device, FakePlatformDevice):
                return device.compatible
        return None

    def _must(self, path: str) -> str:
        entry = self._entry(path)
        if entry is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return entry

    def read_text(self, path: str) -> str:
        return self._must(path)

    def read_link(self, path: str) -> str:
        return self._must(path)

    def real_path(self, path: str) -> str:
        self._must(path)
        parts = path.strip("/").split("/")
        if parts[:3] == ["sys", "dev", "char"]:
            number = int(parts[3].partition(":")[2])
            device = next(device for device in self.devices.values() if device.cdev == number)
            return f"/sys/devices/{device.bus}/{device.name}"
        return (
            f"/sys/devices/{self.devices[name].bus}/{name}" if (name := path.split("/")[-1]) in self.devices else path
        )

    def list_directory(self, path: str) -> tuple[str, ...]:
        parts = path.strip("/").split("/")
        if self.sysfs and parts[-1] == "vfio-dev" and parts[-2] in self.devices:
            device = self.devices[parts[-2]]
            if device.driver and "vfio" in device.driver:
                return (f"vfio{device.cdev}",)
        if not self.sysfs or parts[:3] != ["sys", "kernel", "iommu_groups"]:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return tuple(sorted(name for name, device in self.devices.items() if device.group == int(parts[3])))

    def exists(self, path: str) -> bool:
        return self._entry(path) is not None
