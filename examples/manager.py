"""A manager, whole: it has the privileges, vfiod has the device.

    sudo python examples/manager.py 0000:03:00.0 --bind --uid 1000     a real device, by its VFIO group
    python examples/manager.py --demo                                  no hardware, no root: a mediated device

What a management layer does for one VM, in order:

1. bind the device to vfio-pci (``--bind``), and remember what it was bound to;
2. make the monitor's listening socket, so that its owner and mode are the manager's business;
3. raise the memory-lock limit, which vfiod inherits (mapped guest memory is pinned, and counts against it), and start
   vfiod as an unprivileged user with that socket (``--qmp fd=N``);
4. open the VFIO group and container, which only root can, and pass them over the socket;
5. add the device, map guest memory, drive the device;
6. take it back, end vfiod, and give the device back to the host.

vfiod never opens anything itself here. If the manager dies at any line, vfiod goes on; if vfiod dies, the kernel takes
the device back.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from vfiod.client import Client, ClientError, FileDescriptor
from vfiod.client.host import binding
from vfiod.client.host.sysfs import HostError, Sysfs
from vfiod.client.serve import server_command
from vfiod.protocol.catalogue.devices import DeviceDeleted
from vfiod.protocol.errors import VfiodError

GUEST_MEMORY = 2 << 20  # bytes
IOVA = 0x1_0000_0000  # above 4 GiB: clear of what x86 reserves for messages (0xfee00000)
PATIENCE = 60.0  # seconds for any one answer


def main() -> int:
    """Run it. 0: every step worked and everything was given back."""
    options = command_line()
    directory = Path(tempfile.mkdtemp(prefix="vfiod-manager-"))
    try:
        with contextlib.ExitStack() as stack:
            if options.bind:
                stack.enter_context(bound_to_vfio(options.address))
            if not options.demo:  # a mediated device reaches memory through vfiod, and pins nothing
                allow_memory_lock(GUEST_MEMORY)
            client = stack.enter_context(running_vfiod(directory / "vm1.sock", options.uid))
            with added_device(client, options.address):
                drive(client)
        print("manager: done; everything is as it was")
    except (VfiodError, OSError) as error:
        print(f"manager: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    else:
        return 0
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def command_line() -> argparse.Namespace:
    """What the user wants."""
    parser = argparse.ArgumentParser(description="Give a PCI device to an unprivileged vfiod, and drive it.")
    parser.add_argument("address", nargs="?", help="[[DDDD:]BB:]DD.F of a device, bound to vfio-pci or with --bind")
    parser.add_argument("--demo", action="store_true", help="no hardware: a mediated device")
    parser.add_argument("--bind", action="store_true", help="bind the device to vfio-pci first, and back at the end")
    parser.add_argument("--uid", type=int, help="run vfiod as this user (needs root); default: this one")
    options = parser.parse_args()
    if options.demo == (options.address is not None):
        parser.error("give either a device's address, or --demo")
    if options.bind and options.demo:
        parser.error("--bind is for a device's address")
    return options


@contextlib.contextmanager
def bound_to_vfio(address: str) -> Iterator[None]:
    """The device is VFIO's meanwhile, and then its former driver's."""
    sysfs = Sysfs()
    bound = binding.bind(sysfs, address)
    print(f"manager: {bound.address}: {bound.before or 'no driver'} -> {bound.after}")
    try:
        yield
    finally:
        if bound.before != bound.after:
            back = binding.unbind(sysfs, address)
            print(f"manager: {back.address}: {back.before} -> {back.after or 'no driver'}")


@contextlib.contextmanager
def running_vfiod(path: Path, uid: int | None) -> Iterator[Client]:
    """An unprivileged vfiod on an inherited socket, and a session with it."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))  # the directory is ours alone, and so is the socket
        path.chmod(0o600)
        listener.listen()
        # vfiod lets in root and its own user by SO_PEERCRED; others are named. Naming the manager's covers --uid.
        arguments = ["--name", "vm1", "--qmp", f"fd={listener.fileno()}", "--allow-uid", str(os.getuid())]
        process = subprocess.Popen(
            server_command(arguments),
            pass_fds=[listener.fileno()],
            user=uid,
            group=uid,
            extra_groups=None if uid is None else [],
        )
    # Connecting works from here on: the kernel queues us until vfiod accepts, or refuses us when it has died.
    try:
        with Client.connect(path, timeout=PATIENCE) as client:
            print(f"manager: vfiod runs as process {process.pid}, uid {Path(f'/proc/{process.pid}').stat().st_uid}")
            yield client
            client.quit()
        if (status := process.wait(PATIENCE)) != 0:
            raise ClientError(f"vfiod ended with status {status}")
        print("manager: vfiod has closed everything and ended")
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()


def allow_memory_lock(need: int) -> None:
    """Let the processes started from here on pin this many bytes. Raising a hard limit takes CAP_SYS_RESOURCE."""
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY or soft >= need:
        return
    enough = hard == resource.RLIM_INFINITY or hard >= need
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (need, hard if enough else need))


@contextlib.contextmanager
def added_device(client: Client, address: str | None) -> Iterator[None]:
    """The device is the VM's meanwhile."""
    mdev = None
    if address is None:
        mdev = client.mdev_create(parent="primer", type="primer-pci").uuid
        client.device_add(driver="vfio-pci", id="dev0", mdev=mdev)
    else:
        with opened_group(address) as group, opened("/dev/vfio/vfio") as container:
            # Passed now, the fds are vfiod's; ours are closed when this block ends.
            client.device_add(driver="vfio-pci", id="dev0", host=address, group_fd=group, container_fd=container)
    print(f"manager: dev0 is {client.query_devices(id='dev0')[0].state.value}")
    try:
        yield
    finally:
        with client.events(DeviceDeleted) as deleted:
            client.device_del(id="dev0", force=True)  # whoever still holds it: the VM is going away
            event = deleted.get(timeout=PATIENCE)
        print(f"manager: dev0 is deleted, released: {getattr(event.data, 'released', '?')}")
        if mdev is not None:
            client.mdev_destroy(uuid=mdev)


@contextlib.contextmanager
def opened_group(address: str) -> Iterator[FileDescriptor]:
    """The VFIO group of a device. A group can be open once only: this is what makes it exclusive."""
    sysfs = Sysfs()
    device = sysfs.device(address)
    if device.group is None:
        raise HostError(f"{device.address} is in no IOMMU group: is the IOMMU on?")
    group = sysfs.group(device.group)
    if group.blockers:
        raise HostError(f"Group {group.number} is not viable: {', '.join(group.blockers)}. Bind them to vfio-pci too")
    with opened(f"/dev/vfio/{group.number}") as fd:
        yield fd


@contextlib.contextmanager
def opened(path: str) -> Iterator[FileDescriptor]:
    """A device file, for reading and writing."""
    with FileDescriptor(os.open(path, os.O_RDWR | os.O_CLOEXEC)) as fd:
        yield fd


def drive(client: Client) -> None:
    """What any PCI device can be asked for: who it is, memory it could reach, an interrupt, a reset."""
    device = client.query_devices(id="dev0")[0]
    print(f"manager: it is {device.vendor_id:04x}:{device.device_id:04x}, group {getattr(device.group, 'id', 'none')}")
    for region in client.query_regions(device="dev0"):
        if region.size:
            print(f"manager:   {region.name}: {region.size:#x} bytes{', can be mapped' if region.mappable else ''}")

    with FileDescriptor(os.memfd_create("guest-memory", os.MFD_CLOEXEC)) as memory:
        os.ftruncate(memory.number, GUEST_MEMORY)
        client.dma_map(iova=IOVA, size=GUEST_MEMORY, fd=memory)
    print(f"manager: {GUEST_MEMORY >> 20} MiB of guest memory at {IOVA:#x}")

    indexes = {irq.name for irq in client.query_irqs(device="dev0") if irq.count}
    index = next((name for name in ("msi", "intx") if name in indexes), None)
    if index is not None:
        # In a VM the hypervisor brings these eventfds and gives them to KVM: see hypervisor.py.
        with client.irq_start(device="dev0", index=index) as started:
            client.irq_trigger(device="dev0", index=index)
            trigger = started.irqs[0].trigger_fd
            if isinstance(trigger, FileDescriptor):
                print(f"manager: {index} works, {started.irqs[0].mode.value}: {wait_for(trigger)} interrupt")
        if index == "intx":
            client.irq_eoi(device="dev0", index=index)  # a line stays down, and masked, until somebody says so
        client.irq_stop(device="dev0", index=index)

    if device.reset:
        client.device_reset(id="dev0")
        print("manager: it was reset")
    unmapped = client.dma_unmap(iova=IOVA, size=GUEST_MEMORY)
    print(f"manager: {unmapped.size >> 20} MiB unmapped")


def wait_for(eventfd: FileDescriptor) -> int:
    """The count of an eventfd. Raises ClientError when it is not signalled."""
    os.set_blocking(eventfd.number, False)
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            return os.eventfd_read(eventfd.number)
        except BlockingIOError:
            time.sleep(0.01)
    raise ClientError(f"No interrupt came within {PATIENCE:g} s")


if __name__ == "__main__":
    sys.exit(main())
