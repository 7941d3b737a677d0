"""A manager, whole: it has the privileges, vfiod has the device.

    sudo python examples/manager.py 0000:03:00.0 --bind --uid 1000     a real device, by its VFIO group
    python examples/manager.py --demo                                  no hardware, no root: a mediated device

What a management layer does for one VM, in order:

1. bind the device to vfio-pci (``--bind``), and remember what it was bound to;
2. make the monitor's listening socket, so that its owner and mode are the manager's business;
3. start vfiod as an unprivileged user with that socket (``--qmp fd=N``), and raise its memory-lock limit (mapped guest
   memory is pinned, and counts against it);
4. open the VFIO group and container, which only root can, and pass them over the socket;
5. add the device, map guest memory, drive the device;
6. take it back, end vfiod, and give the device back to the host.

All but the driving is ``vfiod.client.manager``. vfiod never opens anything itself here. If the manager dies at any
line, vfiod goes on; if vfiod dies, the kernel takes the device back.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from vfiod.client import Client, ClientError, FileDescriptor
from vfiod.client.manager import Manager
from vfiod.client.progress import Progress
from vfiod.protocol.errors import VfiodError

GUEST_MEMORY = 2 << 20  # bytes
IOVA = 0x1_0000_0000  # above 4 GiB: clear of what x86 reserves for messages (0xfee00000)
PATIENCE = 60.0  # seconds for an interrupt


def main() -> int:
    """Run it. 0: every step worked and everything was given back."""
    parser = argparse.ArgumentParser(description="Give a PCI device to an unprivileged vfiod, and drive it.")
    parser.add_argument("address", nargs="?", help="[[DDDD:]BB:]DD.F of a device, bound to vfio-pci or with --bind")
    parser.add_argument("--demo", action="store_true", help="no hardware: a mediated device")
    parser.add_argument("--bind", action="store_true", help="bind the device to vfio-pci first, and back at the end")
    parser.add_argument("--uid", type=int, help="run vfiod as this user (needs root); default: this one")
    options = parser.parse_args()
    if options.demo == (options.address is not None) or (options.bind and options.demo):
        parser.error("give either a device's address, with --bind or not, or --demo")
    progress = Progress("manager", quiet=not sys.stderr.isatty())
    try:
        with Manager.start("vm1", uid=options.uid, memory=GUEST_MEMORY, progress=progress) as vm:
            pid = vm.process.pid
            print(f"manager: vfiod runs as process {pid}, uid {Path(f'/proc/{pid}').stat().st_uid}")
            if options.demo:
                device = vm.add_mediated("primer-pci", id="dev0")
            else:
                device = vm.add_device(options.address, id="dev0", bind=options.bind)
            print(f"manager: dev0 is {device.state.value}")
            drive(vm.client)
            print(f"manager: dev0 is deleted, released: {vm.remove('dev0', force=True)}")
        print("manager: done; everything is as it was")
    except (VfiodError, OSError) as error:
        print(f"manager: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


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
