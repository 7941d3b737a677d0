"""A manager's work for one VM: it has the privileges, an (unprivileged) vfiod has the devices.

::

    with Manager.start("vm1", uid=1000, memory=1 << 30) as vm:
        vm.add_device("0000:03:00.0", id="nic0", bind=True)      # bound, opened, passed: one call
        socket = vm.export("nic0")                               # for -device vfio-user-pci
        vm.client.dma_map(...)                                   # everything else: the client
    # removed, vfiod ended, drivers as before

What it does is what ``docs/manager.md`` says, in that order; if it dies at any line, vfiod goes on, and ``vfiod host
unbind`` gives the devices back (:mod:`~vfiod.client.host.journal`). A manager belongs to one thread.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self

from msgspec import UNSET

from vfiod.client.errors import ClientError, ConnectionLost
from vfiod.client.host import binding
from vfiod.client.host.journal import Journal
from vfiod.client.host.sysfs import HostDevice, HostError, Sysfs
from vfiod.client.progress import Progress
from vfiod.client.serve import server_command
from vfiod.client.signals import held, let_in
from vfiod.client.sync import Client
from vfiod.protocol.catalogue.devices import DeviceDeleted, DeviceInfo, DeviceUnplugError
from vfiod.protocol.catalogue.reset import HotResetReport
from vfiod.protocol.errors import RemoteError, VfiodError, errno_name
from vfiod.protocol.fd import FileDescriptor

__all__ = ["Manager"]

PATIENCE: Final = 60.0
"""Seconds for any one answer of vfiod."""

SLACK: Final = 64 << 20
"""Bytes a vfiod may pin beyond guest memory: hypervisors map their ROMs and the devices' BARs too."""

Interface = Literal["auto", "group", "cdev"]


class Manager:
    """One vfiod, started here, and what was given to it; :meth:`start` makes one.

    Attributes:
        client: a session with it.
        process: it.
        path: its QMP socket, for others of this user.
        directory: its sockets' and nobody else's; it goes with the manager.

    """

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        client: Client,
        directory: Path,
        *,
        memory: int = 0,
        sysfs: Sysfs | None = None,
        journal: Journal | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.process = process
        self.client = client
        self.directory = directory
        self.path = directory / "qmp.sock"
        self._memory = memory
        self._sysfs = sysfs or Sysfs()
        self._journal = journal or Journal()
        self._progress = progress or Progress("manager", quiet=True)
        self._devices: list[str] = []
        self._mdevs: dict[str, str] = {}
        self._bound: list[str] = []
        self._spaces = 0
        self._closed = False

    @classmethod
    def start(
        cls,
        name: str,
        *,
        uid: int | None = None,
        gid: int | None = None,
        memory: int = 0,
        arguments: Sequence[str] = (),
        sysfs: Sysfs | None = None,
        journal: Journal | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """Start a vfiod, and open a session with it.

        The monitor's socket is made here and inherited, so that its owner and mode are the manager's business. vfiod
        gets a session (setsid) of its own: a Ctrl-C meant for the manager does not end it first.

        Args:
            name: the VM's.
            uid: run vfiod as this user; None: as this one. Anybody else takes root.
            gid: and this group; None: ``uid``.
            memory: bytes of guest memory that its devices will pin. The memory-lock limit is raised accordingly.
            arguments: more options of ``vfiod serve``.
            sysfs: the host's tree, when it is not ``/sys``.
            journal: where bindings are noted; default: ``/run/vfiod/host``.
            progress: tells of what takes long; default: nobody does.

        Raises:
            ClientError: it did not start. OSError: this user may not do that.

        """
        directory: Path | None = None
        process: subprocess.Popen[bytes] | None = None
        try:
            with held():
                directory = Path(tempfile.mkdtemp(prefix="vfiod-"))
                sockets = directory / "devices"
                sockets.mkdir(mode=0o700)
                if uid is not None:
                    os.chown(sockets, uid, uid if gid is None else gid)
                    directory.chmod(0o711)
                # Its sandbox lets it make sockets there; the monitor's it has inherited.
                options = ["--allow-path", os.fspath(sockets), *arguments]
                process = _spawn(name, directory / "qmp.sock", uid, uid if gid is None else gid, options)
            with let_in():
                # Connecting works already: the kernel queues us until vfiod accepts, or refuses us when it has died.
                client = Client.connect(directory / "qmp.sock", timeout=PATIENCE)
            return cls(process, client, directory, memory=memory, sysfs=sysfs, journal=journal, progress=progress)
        except BaseException as error:
            with held():
                status = None if process is None else _terminated(process)
                if directory is not None:
                    shutil.rmtree(directory, ignore_errors=True)
            if isinstance(error, ConnectionLost):
                raise ClientError(f"vfiod ended with status {status} before it was ready") from error
            raise

    def add_device(
        self,
        address: str,
        *,
        id: str,
        bind: bool = False,
        force: bool = False,
        interface: Interface = "auto",
        **options: Any,
    ) -> DeviceInfo:
        """Give a PCI device to the VM: bind it, open it, pass it, add it.

        Args:
            address: ``[[DDDD:]BB:]DD.F``.
            id: its id in vfiod.
            bind: bind it to vfio-pci first, and back in :meth:`close`. False: it has to be bound.
            force: bind it even when the host is using it.
            interface: ``group``: ``/dev/vfio/N`` and a container of its own; ``cdev``: ``/dev/vfio/devices/vfioN`` and
                one iommufd for all; ``auto``: by group where the kernel has groups.
            options: more arguments of ``device_add``, such as ``vf_token``.

        Raises:
            HostError: the host says no, and why. RemoteError: vfiod does. Then nothing has changed.

        """
        device = self._sysfs.device(address)
        with held(), contextlib.ExitStack() as undo:
            if bind:
                with self._progress.step(f"{device.address}: binding to vfio-pci"):
                    bound = binding.bind(self._sysfs, address, force=force, journal=self._journal)
                if bound.before != bound.after:
                    self._bound.append(device.address)
                    undo.callback(self._restore, device.address)
                device = self._sysfs.device(address)
            with (
                self._progress.step(f"{device.address}: opening and passing it"),
                self._opened(device, interface) as fds,
            ):
                try:
                    with let_in():
                        self.client.device_add(driver="vfio-pci", id=id, **fds, **options)
                except RemoteError:
                    raise
                except BaseException:
                    # vfiod may have it, now or in a moment: only when vfiod has ended it can be given back.
                    undo.pop_all()
                    raise
            undo.pop_all()
            self._devices.append(id)
        return self.device(id)

    def add_mediated(
        self, type: str, *, id: str, parent: str | None = None, parameters: dict[str, Any] | None = None, **options: Any
    ) -> DeviceInfo:
        """Make a mediated device of a type that vfiod's parents have, and add it.

        Args:
            type: of ``query-mdev-types``.
            id: its id in vfiod.
            parent: whose; None: the only one that has the type.
            parameters: of ``mdev-create``.
            options: more arguments of ``device_add``.

        """
        types = self.client.query_mdev_types()
        having = [one for one in types if one.type == type and parent in (None, one.parent)]
        if len(having) != 1:
            known = ", ".join(f"{one.type} of {one.parent}" for one in having or types)
            raise ClientError(f"{'Several parents have' if having else 'There is no'} mdev type '{type}': {known}")
        uuid = self.client.mdev_create(parent=having[0].parent, type=type, parameters=parameters or {}).uuid
        try:
            self.client.device_add(driver=having[0].device_api.value, id=id, mdev=uuid, **options)
        except BaseException:
            self.client.mdev_destroy(uuid=uuid)
            raise
        self._devices.append(id)
        self._mdevs[id] = uuid
        return self.device(id)

    def device(self, id: str) -> DeviceInfo:
        """What vfiod says of a device."""
        return self.client.query_devices(id=id)[0]

    def export(self, id: str, path: Path | None = None) -> Path:
        """Offer a device to a hypervisor: the vfio-user socket, in :attr:`directory` unless a path is given."""
        path = path or self.directory / "devices" / f"{id}.sock"
        self.client.device_export_add(id=id, type="vfio-user", device=id, path=str(path))
        return path

    def hot_reset(self, id: str, *, force: bool = False) -> HotResetReport:
        """Reset a device with its bus, lending the groups of the functions that nobody has.

        Raises:
            HostError: such a group cannot be opened: another process has it. RemoteError: vfiod refuses, and says why.

        """
        affected = self.client.query_hot_reset(id=id).affected
        ours = {one.group for one in affected if one.held_as is not UNSET}
        lent = {one.group for one in affected if one.held_as is UNSET and isinstance(one.group, int)} - ours
        with contextlib.ExitStack() as stack, self._progress.step(f"{id}: resetting its bus"):
            groups = [stack.enter_context(_opened_file(f"/dev/vfio/{one}")) for one in sorted(map(int, lent))]
            return self.client.hot_reset(id=id, group_fds=groups or UNSET, force=force)

    def remove(self, id: str, *, force: bool = False, seconds: float = PATIENCE) -> bool:
        """Take a device back, and wait until it is gone.

        Args:
            id: the device.
            force: whoever still holds it. Otherwise holders are waited for.
            seconds: how long.

        Returns:
            Whether the kernel's device is closed; False: an fd that was given out keeps it open.

        Raises:
            ClientError: holders kept it; it runs on. RemoteError, RequestTimedOut.

        """
        path = self.device(id).path
        with self._progress.step(f"{id}: removing it"), self.client.events(DeviceDeleted, DeviceUnplugError) as events:
            self.client.device_del(id=id, force=force, timeout_ms=int(seconds * 1000))
            while True:
                told = events.get(timeout=seconds + PATIENCE).data
                if isinstance(told, DeviceUnplugError) and told.path == path:
                    raise ClientError(f"Device '{id}' stays: {told.msg}")
                if isinstance(told, DeviceDeleted) and told.path == path:
                    break
        self._devices.remove(id)
        if id in self._mdevs:
            self.client.mdev_destroy(uuid=self._mdevs.pop(id))
        return told.released

    def close(self) -> None:
        """Remove every device, end vfiod, restore every driver. Doing it again does nothing.

        A Ctrl-C meanwhile is held until all of it is done.

        Raises:
            VfiodError: the first thing that failed; all the others were done nevertheless.

        """
        with held():
            if not self._closed:
                self._closed = True
                self._close()

    def _close(self) -> None:
        problems: list[VfiodError] = []

        @contextlib.contextmanager
        def noted() -> Iterator[None]:
            try:
                yield
            except VfiodError as error:
                problems.append(error)

        alive = self.process.poll() is None
        for id in reversed(self._devices) if alive else ():
            with noted():
                self.remove(id, force=True)
        self._devices.clear()
        if alive:
            with noted(), contextlib.suppress(ConnectionLost):  # whoever is told to end may end before it answers
                self.client.quit()
        self.client.close()
        with noted():
            self._end()
        while self._bound:
            with noted(), self._progress.step(f"{self._bound[-1]}: giving it back"):
                self._restore(self._bound[-1])
        shutil.rmtree(self.directory, ignore_errors=True)
        if problems:
            raise problems[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            self.close()
        except VfiodError as problem:
            if error is None:
                raise
            error.add_note(f"and then: {problem}")  # what came first is what matters

    def _end(self) -> None:
        try:
            status = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise ClientError(f"vfiod did not end within {PATIENCE:g} s, and was killed") from None
        if status != 0:
            how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
            raise ClientError(f"vfiod {how}")

    def _restore(self, address: str) -> None:
        self._bound.remove(address)
        # By force: vfiod has ended, or failed to add it; whatever still has the device open, the kernel waits for it.
        binding.unbind(self._sysfs, address, force=True, journal=self._journal)

    @contextlib.contextmanager
    def _opened(self, device: HostDevice, interface: Interface) -> Iterator[dict[str, Any]]:
        """The arguments of ``device_add`` that are fds; ours are closed when the block ends."""
        if device.group is None:
            raise HostError(f"{device.address} is in no IOMMU group: is the IOMMU on?")
        group = self._sysfs.group(device.group)
        if group.blockers:
            raise HostError(
                f"Group {group.number} is not viable: {', '.join(group.blockers)}. Bind them to vfio-pci too"
            )
        path = f"/dev/vfio/{'noiommu-' if group.noiommu else ''}{group.number}"
        by_cdev = interface == "cdev" or (interface == "auto" and not Path(path).exists() and device.vfio_device)
        with contextlib.ExitStack() as stack:
            fds: dict[str, Any] = {} if by_cdev else {"host": device.address}
            if by_cdev:
                if device.vfio_device is None:
                    raise HostError(f"{device.address} has no cdev: it is bound to {device.driver or 'no driver'}")
                fds["fd"] = stack.enter_context(_opened_file(f"/dev/vfio/devices/{device.vfio_device}"))
                fds["iommufd"] = self._iommufd()
            elif group.number not in {
                one.group.id for one in self.client.query_devices() if one.backend == "kernel-group" and one.group
            }:
                fds["group_fd"] = stack.enter_context(_opened_file(path))
                fds["container_fd"] = stack.enter_context(_opened_file("/dev/vfio/vfio"))
                self._another_space()
            yield fds

    def _iommufd(self) -> str:
        """The one object of all cdevs."""
        if not any(one.id == "iommufd0" for one in self.client.query_objects()):
            with _opened_file("/dev/iommu") as fd:
                self.client.object_add(qom_type="iommufd", id="iommufd0", fd=fd)
            self._another_space()
        return "iommufd0"

    def _another_space(self) -> None:
        """Each address space pins guest memory once more: raise vfiod's memory-lock limit, if that is in our power."""
        self._spaces += 1
        need = self._spaces * self._memory + SLACK
        soft, hard = resource.prlimit(self.process.pid, resource.RLIMIT_MEMLOCK)
        if not self._memory or soft == resource.RLIM_INFINITY or soft >= need:
            return
        enough = hard == resource.RLIM_INFINITY or hard >= need
        try:
            resource.prlimit(self.process.pid, resource.RLIMIT_MEMLOCK, (need, hard if enough else need))
        except (PermissionError, ValueError):
            self._progress.say(
                f"vfiod may pin {hard >> 20} MiB only, and {need >> 20} MiB are needed: raise 'ulimit -l', or be root"
            )


def _terminated(process: subprocess.Popen[bytes]) -> int:
    """End one that is of no use. Its status."""
    process.terminate()
    try:
        return process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _spawn(
    name: str, path: Path, uid: int | None, gid: int | None, arguments: Sequence[str]
) -> subprocess.Popen[bytes]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))  # the directory is ours alone, and so is the socket
        path.chmod(0o600)
        listener.listen()
        # vfiod lets in root and its own user by SO_PEERCRED; others are named. Naming the manager's covers --uid.
        options = ["--name", name, "--qmp", f"fd={listener.fileno()}", "--allow-uid", str(os.getuid()), *arguments]
        return subprocess.Popen(
            server_command(options),
            stdin=subprocess.DEVNULL,
            pass_fds=[listener.fileno()],
            start_new_session=True,
            user=uid,
            group=gid,
            extra_groups=None if uid is None else [],
        )


@contextlib.contextmanager
def _opened_file(path: str) -> Iterator[FileDescriptor]:
    """A device file, for reading and writing. Raises HostError with what to do."""
    try:
        number = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        advice = {
            "EBUSY": ": another process has it open",
            "EACCES": ": this user may not; it takes root, or a udev rule",
            "ENOENT": ": is vfio-pci loaded, and the device bound to it?",
        }.get(name := errno_name(error.errno or 0), "")
        raise HostError(f"Cannot open {path}: {name}{advice}") from error
    with FileDescriptor(number) as fd:
        yield fd
