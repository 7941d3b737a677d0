"""A hypervisor in miniature: it takes a device's interrupts and maps its BARs, and then needs vfiod no more for either.

    python examples/hypervisor.py vm1.sock dev0

In a VM the eventfds made here go to KVM (``KVM_IRQFD``), and the mappings into the guest's physical address space
(``KVM_SET_USER_MEMORY_REGION``). Here they are read and looked at instead. The manager has added the device; it may do
so, and take it back, while this runs: the end of the session is the end of what this holds.
"""

from __future__ import annotations

import argparse
import contextlib
import mmap
import os
import select
import sys
from collections.abc import Iterator

from vfiod.client import Client, FileDescriptor, VectorFds
from vfiod.protocol.errors import VfiodError

PATIENCE = 60.0  # seconds for any one answer


def main() -> int:
    """Attach, show that interrupts and mappings work, and go."""
    parser = argparse.ArgumentParser(description="Attach to a device of a vfiod, as a hypervisor does.")
    parser.add_argument("path", help="the monitor's socket")
    parser.add_argument("device", help="the device's id")
    parser.add_argument("--stay", action="store_true", help="wait for interrupts until the device goes")
    options = parser.parse_args()
    try:
        with Client.connect(options.path, timeout=PATIENCE) as client, contextlib.ExitStack() as stack:
            for name, offset, area in mapped_bars(client, options.device, stack):
                print(f"hypervisor: {name} at offset {offset:#x} is mapped, {len(area)} bytes")
            vectors = stack.enter_context(message_interrupts(client, options.device))
            show_interrupts(client, options.device, vectors)
            if options.stay:
                stay(client, options.device, vectors)
    except (VfiodError, OSError) as error:
        print(f"hypervisor: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def mapped_bars(client: Client, device: str, stack: contextlib.ExitStack) -> Iterator[tuple[str, int, mmap.mmap]]:
    """Every area of every BAR that can be mapped, mapped.

    Yields:
        The region's name, the area's offset in the region, and the area itself. Of device memory, touch only through a
        cast memoryview: anything else makes accesses of other widths, and more of them, than the program says.

    """
    for region in client.query_regions(device=device):
        if not region.mappable or not region.name.startswith("bar"):
            continue
        with client.region_map(device=device, region=region.region) as given:
            for area in given.areas:
                mapping = mmap.mmap(given.map_fd.number, area.size, offset=given.offset + area.offset)
                yield region.name, area.offset, stack.enter_context(contextlib.closing(mapping))


@contextlib.contextmanager
def message_interrupts(client: Client, device: str) -> Iterator[dict[int, FileDescriptor]]:
    """An eventfd of ours for each MSI vector; the device's interrupts go there without passing vfiod."""
    count = next(irq.count for irq in client.query_irqs(device=device) if irq.name == "msi")
    eventfds = {v: FileDescriptor(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)) for v in range(count)}
    try:
        if eventfds:
            pairs = [VectorFds(vector=vector, trigger=eventfd) for vector, eventfd in eventfds.items()]
            # The host may grant fewer than were asked for: what was started is what the reply says.
            started = client.irq_start(device=device, index="msi", vectors=list(eventfds), eventfds=pairs)
            granted = {irq.vector for irq in started.irqs}
            print(f"hypervisor: {len(granted)} of {count} MSI vectors, {started.irqs[0].mode.value}")
            yield {vector: eventfds[vector] for vector in sorted(granted)}
            client.irq_stop(device=device, index="msi")
        else:
            print("hypervisor: the device has no MSI")
            yield {}
    finally:
        for eventfd in eventfds.values():
            eventfd.close()


def show_interrupts(client: Client, device: str, vectors: dict[int, FileDescriptor]) -> None:
    """Let the kernel signal each vector once, and see it arrive at its own eventfd and no other."""
    for vector in vectors:
        client.irq_trigger(device=device, index="msi", vector=vector)
        arrived: dict[int, int] = {}
        while not arrived:
            if not select.select(list(vectors.values()), [], [], PATIENCE)[0]:
                raise TimeoutError(f"vector {vector} did not arrive")
            arrived = drained(vectors)
        print(f"hypervisor: vector {vector} arrived: {arrived}")
        if arrived != {vector: 1}:
            raise RuntimeError(f"vector {vector} was triggered, and {arrived} arrived")


def drained(vectors: dict[int, FileDescriptor]) -> dict[int, int]:
    """What has arrived: the count of each vector that has."""
    counts = {}
    for vector, eventfd in vectors.items():
        with contextlib.suppress(BlockingIOError):
            counts[vector] = os.eventfd_read(eventfd.number)
    return counts


def stay(client: Client, device: str, vectors: dict[int, FileDescriptor]) -> None:
    """Print interrupts until the host or the manager wants the device back."""
    print("hypervisor: waiting for interrupts", flush=True)
    with client.events("DEVICE_REQUESTED", "DEVICE_DELETED") as events:
        while not any(getattr(event.data, "device", None) == device for event in events.pending()):
            select.select([client.fileno(), *(eventfd.number for eventfd in vectors.values())], [], [])
            if counts := drained(vectors):
                print(f"hypervisor: {counts}", flush=True)
    print("hypervisor: the device is wanted back")


if __name__ == "__main__":
    sys.exit(main())
