"""``vfiod demo``: a manager's whole day with one device, on a machine with no hardware to give away.

It starts a server of its own, makes a mediated device, and does to it what a manager and a hypervisor do to a real
one: every command printed here is really sent, every answer really came, and every value is compared.
"""

from __future__ import annotations

import argparse
import mmap
import os
import select
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec

from vfiod.client.errors import ClientError
from vfiod.client.events import Event
from vfiod.client.methods.values import VectorFds
from vfiod.client.render import describe_fd, json_text
from vfiod.client.spawn import OwnServer, own_directory, own_server
from vfiod.client.sync import Client
from vfiod.protocol.catalogue import Arguments, command_of
from vfiod.protocol.catalogue.devices import DeviceDeleted
from vfiod.protocol.errors import VfiodError
from vfiod.protocol.fd import FileDescriptor

__all__ = ["Demo", "DemoFailed", "main"]

MEMORY: Final = 1 << 20  # bytes of guest memory
IOVA: Final = 0x4000_0000  # where the device sees it
TIMEOUT: Final = 60.0  # seconds for any one answer: the demo ends, whatever happens

# Registers of BAR0 of the built-in device; the server's mdev/samples/pci.py describes them.
ID, SCRATCH, IRQ_RAISE, IRQ_ACK = 0x00, 0x04, 0x14, 0x18
DMA_ADDRESS, DMA_LOCAL, DMA_COUNT, DMA_COMMAND, DMA_STATUS = 0x20, 0x28, 0x2C, 0x30, 0x34
START, TO_GUEST, DONE, FAULT = 1, 2, 1, 2
PCI_COMMAND, MEMORY_SPACE, BUS_MASTER = 0x04, 0x2, 0x4  # PCI 3.0, 6.2.2


class DemoFailed(ClientError):
    """Something was not as it has to be. The text says what was expected, and what came."""


class Narrator:
    """Prints what is done, so that one can learn from it."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        self._step = 0

    def step(self, title: str, text: str = "") -> None:
        """A new chapter."""
        self._step += 1
        print(self._paint("1", f"\n{self._step}. {title}"))
        if text and not self._quiet:
            print(textwrap.fill(" ".join(text.split()), 96, initial_indent="   ", subsequent_indent="   "))

    def wire(self, text: str) -> None:
        """What went over the socket."""
        if not self._quiet:
            print(self._paint("2", "     " + (text if len(text) < 150 else text[:146] + " ...")))

    def ok(self, text: str) -> None:
        """Something was checked, and is right."""
        print(self._paint("32", "   ok ") + text)

    def _paint(self, code: str, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._colour else text


class TalkingClient(Client):
    """A client that says what it sends and what it gets."""

    narrator: Narrator
    silent = False

    def _run(self, arguments: Arguments[Any], **options: Any) -> Any:
        result = super()._run(arguments, **options)
        if not self.silent:
            for name, fd in (options.get("fds") or {}).items():
                self.narrator.wire(f'-> getfd {{"fdname": "{name}"}}   and with it, {describe_fd(fd)}')
            sent = json_text(msgspec.to_builtins(arguments), compact=True)
            self.narrator.wire(f"-> {command_of(arguments).name} {'' if sent == '{}' else sent}")
            received = json_text(_shown(result), compact=True)
            if received != "{}":
                self.narrator.wire(f"<- {received}")
        return result


def _shown(result: Any) -> Any:
    """A result as on the wire, each fd as what it is."""
    text = msgspec.to_builtins(
        result, enc_hook=lambda fd: describe_fd(fd) if isinstance(fd, FileDescriptor) else str(fd)
    )
    return _kebab(text)


def _kebab(value: Any) -> Any:
    if isinstance(value, dict):
        return {name.replace("_", "-"): _kebab(item) for name, item in value.items()}
    return [_kebab(item) for item in value] if isinstance(value, list) else value


def expect(what: str, found: object, right: object) -> None:
    """Raise DemoFailed unless they are equal."""
    if found != right:
        shown = [f"{value:#x}" if type(value) is int else repr(value) for value in (right, found)]
        raise DemoFailed(f"{what}: expected {shown[0]}, found {shown[1]}")


class Demo:
    """One run, against a server that is up.

    Args:
        path: its QMP socket.
        narrator: prints.

    """

    def __init__(self, path: Path, narrator: Narrator) -> None:
        self.path = path
        self.say = narrator
        self.memory = FileDescriptor(os.memfd_create("guest-memory", os.MFD_CLOEXEC))
        os.ftruncate(self.memory.number, MEMORY)
        self.uuid = ""

    def run(self) -> None:
        """Everything, in order. Raises DemoFailed, RemoteError, ClientError."""
        with (
            self.memory,
            self.connect() as self.client,
            self.client.events(DeviceDeleted, "DEVICE_UNPLUG_ERROR") as ends,
        ):
            self.greet()
            self.give_memory()
            self.add_device()
            self.registers()
            self.dma()
            self.intx()
            self.msi()
            self.map_bar()
            self.reset()
            self.unplug(ends.get)
            self.tidy_up()
            # Everything that can cause one is over: it has to have been the only one.
            expect("further DEVICE_DELETED events", ends.pending(), [])
            self.leave()

    def connect(self) -> TalkingClient:
        """A session, with a time limit for each answer."""
        client = TalkingClient.connect(self.path, timeout=TIMEOUT)
        client.narrator = self.say
        return client

    # --- the chapters ---------------------------------------------------------------------------------------------

    def greet(self) -> None:
        """Connect and look around."""
        self.say.step(
            "Connect",
            """A manager connects to the monitor's Unix socket, which speaks QMP as QEMU does. The client has negotiated
            already. Lines with -> are commands as they are sent, <- is the answer.""",
        )
        name = self.client.query_name().name
        status = self.client.query_status()
        commands = len(self.client.query_commands())
        self.say.ok(f"server '{name}' is {status.status.value} and knows {commands} commands")

    def give_memory(self) -> None:
        """Pass memory as a memfd, and map it."""
        self.say.step(
            "Pass the guest's memory",
            f"""The memory of the VM is a memfd. Its file descriptor goes over the socket (SCM_RIGHTS); vfiod keeps a
            duplicate as an object, and every device, now and later, may reach it at I/O address {IOVA:#x}. In JSON an
            fd has a name: getfd gives it one, and the command that takes it over ends the name.""",
        )
        self.client.object_add(qom_type="memory-backend-fd", id="ram0", fd=self.memory)
        mapped = self.client.dma_map(iova=IOVA, size=MEMORY, memory_backend="ram0")
        expect("the mapping", (mapped.iova, mapped.size), (IOVA, MEMORY))
        self.say.ok(f"{MEMORY >> 10} KiB mapped, before there is a device: mappings are replayed into later ones")

    def add_device(self) -> None:
        """Make a mediated device, and add it."""
        self.say.step(
            "Make a device, and add it",
            """With hardware, the manager passes a VFIO group's fd here. Without, a parent makes a mediated device: a
            real PCI device to everybody above, with registers, memory, interrupts and DMA, written in Python.""",
        )
        types = self.client.query_mdev_types()
        if not types:
            raise DemoFailed("The server offers no types of mediated devices")
        kind = types[0]
        self.uuid = self.client.mdev_create(parent=kind.parent, type=kind.type).uuid
        self.client.mdev_start()
        with self.client.events("DEVICE_ADDED") as added:
            self.client.device_add(driver="vfio-pci", id="dev0", mdev=self.uuid)
            self.event(added.get(TIMEOUT))
        device = self.client.query_devices(id="dev0")[0]
        expect("the device's state", device.state.value, "running")
        self.say.ok(f"dev0 is running: {device.regions} regions, {device.irq_indexes} interrupt indexes")

    def registers(self) -> None:
        """Config space and a register."""
        self.say.step(
            "Talk to its registers", "Regions are read and written by name, offset and size, as VFIO has them."
        )
        ids = self.client.region_read(device="dev0", region="config", offset=0, size=4).value
        assert isinstance(ids, int)  # noqa: S101 - a sized read gives a value
        identity = self.read(ID)
        expect("the identity register", identity >> 16, ids >> 16)
        for value in (0x12345678, 0xFFFF0000):
            self.write(SCRATCH, value)
            expect("the scratch register (it inverts)", self.read(SCRATCH), value ^ 0xFFFF_FFFF)
        # As a guest's driver does first: let it answer, and let it do DMA.
        command = self.client.region_read(device="dev0", region="config", offset=PCI_COMMAND, size=2).value
        assert isinstance(command, int)  # noqa: S101
        command |= MEMORY_SPACE | BUS_MASTER
        self.client.region_write(device="dev0", region="config", offset=PCI_COMMAND, size=2, value=command)
        self.say.ok(f"device {ids & 0xFFFF:04x}:{ids >> 16:04x}, identity {identity:#010x}; bus mastering is on")

    def dma(self) -> None:
        """Memory to device and back; and where it must not go."""
        self.say.step(
            "Move data by DMA",
            """The device reads guest memory itself, and writes it back somewhere else: no byte goes over the socket.
            vfiod has no say in it either; the mapping is the permission.""",
        )
        text = b"The quick brown fox jumps over the lazy dog. " * 200  # three pages, and not a whole number of them
        os.pwrite(self.memory.number, text, 0x1000)
        expect("DMA from the guest", self.transfer(IOVA + 0x1000, len(text), START), DONE)
        expect("DMA to the guest", self.transfer(IOVA + 0x8010, len(text), START | TO_GUEST), DONE)
        expect("what came back", os.pread(self.memory.number, len(text), 0x8010), text)
        expect("the byte after it", os.pread(self.memory.number, 1, 0x8010 + len(text)), b"\0")
        self.say.ok(f"{len(text)} bytes went to the device and came back unharmed")
        outside = self.transfer(IOVA + MEMORY, 64, START | TO_GUEST)
        expect("DMA to an address that is not mapped", outside & (DONE | FAULT), FAULT)
        self.say.ok("one byte beyond the mapping, the device gets a fault, and nothing is written")

    def intx(self) -> None:
        """Relayed, with end of interrupt."""
        self.say.step(
            "Take INTx interrupts",
            """The old kind: a line that stays up until somebody has dealt with it. vfiod relays it: it signals an
            eventfd that came with the reply, and keeps the line masked until irq-eoi.""",
        )
        rounds = 5
        with self.client.irq_start(device="dev0", index="intx", mode="relayed") as started:
            trigger = started.irqs[0].trigger_fd
            if not isinstance(trigger, FileDescriptor):
                raise DemoFailed("irq-start was given no eventfd, and handed none back")
            for number in range(1, rounds + 1):
                self.write(IRQ_RAISE, 1 << 3)
                expect(f"INTx {number}", take(trigger), 1)
                self.write(IRQ_ACK, 1 << 3)
                self.client.silent = number > 1
                self.client.irq_eoi(device="dev0", index="intx")
            self.client.silent = False
            index = next(irq for irq in self.client.query_irqs(device="dev0") if irq.name == "intx")
            expect("INTx fired and delivered", (index.fired, index.delivered), (rounds, rounds))
            self.client.irq_stop(device="dev0", index="intx")
        self.say.ok(f"{rounds} interrupts raised by the device, {rounds} relayed, {rounds} completed; the counts agree")

    def msi(self) -> None:
        """Direct, one eventfd for each vector."""
        self.say.step(
            "Take MSI interrupts",
            """The new kind: messages. The hypervisor brings an eventfd for each vector, and the interrupts go there
            directly: vfiod sleeps, and therefore cannot count them.""",
        )
        vectors = range(4)
        eventfds = [FileDescriptor(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)) for _ in vectors]
        try:
            pairs = [VectorFds(vector=vector, trigger=eventfds[vector]) for vector in vectors]
            started = self.client.irq_start(device="dev0", index="msi", vectors=list(vectors), eventfds=pairs)
            expect("the mode of each", {irq.mode.value for irq in started.irqs}, {"direct"})
            self.write(IRQ_RAISE, 0b1011)
            expect("eventfds signalled by vectors 0, 1 and 3", [take(eventfds[v]) for v in (0, 1, 3)], [1, 1, 1])
            expect("vector 2, which was not raised", take(eventfds[2], wait=False), 0)
            self.client.irq_trigger(device="dev0", index="msi", vector=2)
            expect("vector 2, triggered by hand", take(eventfds[2]), 1)
            self.write(IRQ_ACK, 0b1011)
            self.client.irq_stop(device="dev0", index="msi")
        finally:
            for eventfd in eventfds:
                eventfd.close()
        self.say.ok("each vector reached its own eventfd, exactly once; irq-trigger loops one back for testing")

    def map_bar(self) -> None:
        """The device's memory in this process."""
        self.say.step(
            "Map a BAR",
            """region-map hands out the fd of a region. The hypervisor maps it, and from then on the guest's accesses
            are loads and stores, with nobody between. It has a session of its own here: what it was given holds the
            device, for as long as that session lasts.""",
        )
        pattern = bytes(range(256)) * 4
        with self.connect() as hypervisor, hypervisor.region_map(device="dev0", region="bar2") as mapped:
            area = mapped.areas[0]
            with mmap.mmap(mapped.map_fd.number, area.size, offset=mapped.offset + area.offset) as bar:
                bar[0x2000 : 0x2000 + len(pattern)] = pattern
            holders = self.client.query_devices(id="dev0")[0].held_by
            expect("what holds the device meanwhile", [holder.kind for holder in holders], ["mapping"])
        read = self.client.region_read(device="dev0", region="bar2", offset=area.offset + 0x2000, length=len(pattern))
        expect("what the command reads where the mapping wrote", read.data, pattern)
        self.say.ok(f"{area.size >> 10} KiB of bar2 mapped; {len(pattern)} bytes written there are read by region-read")

    def reset(self) -> None:
        """Function level reset."""
        self.say.step("Reset it", "As when the guest restarts. DEVICE_RESET tells everybody who listens.")
        self.write(SCRATCH, 0)
        with self.client.events("DEVICE_RESET") as done:
            self.client.device_reset(id="dev0")
            self.event(done.get(TIMEOUT))
        expect("the scratch register after reset", self.read(SCRATCH), 0xFFFF_FFFF)
        self.say.ok("its registers have their values of power-on")

    def unplug(self, ended: Callable[[float], Event]) -> None:
        """device_del, and its one event."""
        self.say.step(
            "Unplug it",
            """device_del starts it and returns. It always ends, in one event: DEVICE_DELETED says that the id is free,
            and whether the kernel has the device back (released).""",
        )
        self.client.device_del(id="dev0")
        event = ended(TIMEOUT)
        self.event(event)
        if not isinstance(event.data, DeviceDeleted):
            raise DemoFailed(f"dev0 was not deleted: {event.name} {event.data}")
        expect("the device that was deleted", (event.data.device, event.data.released), ("dev0", True))
        expect("the devices left", self.client.query_devices(), [])
        self.say.ok("dev0 is gone and released")

    def tidy_up(self) -> None:
        """Everything else that was made."""
        self.say.step("Clean up", "Nothing is left behind: query-machine shows one consistent picture of everything.")
        self.client.mdev_shutdown()
        self.client.mdev_destroy(uuid=self.uuid)
        expect("bytes unmapped", self.client.dma_unmap(iova=IOVA, size=MEMORY).size, MEMORY)
        self.client.object_del(id="ram0")
        self.client.silent = True
        machine = self.client.query_machine()
        self.client.silent = False
        left = [machine.devices, machine.irqs, machine.objects, machine.mappings, machine.mdevs, machine.containers]
        expect("what is left in the machine", left, [[]] * len(left))
        fds = {fd.owner for fd in self.client.query_fds() if fd.owner != "server"}
        expect("fds the server still holds for anybody", fds, set())
        self.say.ok(f"no device, object, mapping or fd is left; {machine.seq} events were sent on the way")

    def leave(self) -> None:
        """End the server."""
        self.say.step("Quit", "The server closes what it has, in order, and ends.")
        with self.client.events("SHUTDOWN") as shutdown:
            self.client.quit()
            self.event(shutdown.get(TIMEOUT))

    # --- what the chapters need ---------------------------------------------------------------------------------

    def event(self, event: Event) -> None:
        """Show an event."""
        self.say.wire(f"** {event.name} {json_text(msgspec.to_builtins(event.data), compact=True)}")

    def read(self, register: int) -> int:
        """A register of BAR0, 4 bytes."""
        self.client.silent = True
        value = self.client.region_read(device="dev0", region="bar0", offset=register, size=4).value
        self.client.silent = False
        if not isinstance(value, int):
            raise DemoFailed(f"region-read with a size gave {value!r}, no value")
        self.say.wire(f"bar0[{register:#04x}] is {value:#010x}")
        return value

    def write(self, register: int, value: int) -> None:
        """Write a register of BAR0, 4 bytes."""
        self.say.wire(f"bar0[{register:#04x}] = {value:#010x}")
        self.client.silent = True
        self.client.region_write(device="dev0", region="bar0", offset=register, size=4, value=value)
        self.client.silent = False

    def transfer(self, address: int, count: int, command: int) -> int:
        """One transfer of the DMA engine. Its status, bits 0 and 1."""
        self.write(DMA_ADDRESS, address & 0xFFFF_FFFF)
        self.write(DMA_ADDRESS + 4, address >> 32)
        self.write(DMA_LOCAL, 0)
        self.write(DMA_COUNT, count)
        self.write(DMA_COMMAND, command)
        return self.read(DMA_STATUS) & (DONE | FAULT)


def take(eventfd: FileDescriptor, *, wait: bool = True) -> int:
    """The count of an eventfd, which is 0 afterwards; 0 when it was not signalled. Raises DemoFailed after a minute."""
    if not select.select([eventfd], [], [], TIMEOUT if wait else 0)[0]:
        if wait:
            raise DemoFailed(f"No interrupt came within {TIMEOUT:g} s")
        return 0
    return os.eventfd_read(eventfd.number)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser("vfiod demo", description="A manager's whole day with one device, without hardware.")
    made.add_argument("--quiet", action="store_true", help="only what was done and checked")
    return made


def main(argv: list[str]) -> int:
    """Run it. 0: everything was as it has to be; 1: something was not, and the text says what."""
    options = parser().parse_args(argv)
    narrator = Narrator(quiet=options.quiet)
    server: OwnServer | None = None
    with own_directory("vfiod-demo-") as directory:
        try:
            print(f"vfiod demo: starting 'vfiod serve --name demo --qmp unix:{directory}/qmp.sock'")
            with own_server(directory, name="demo") as server:
                Demo(server.path, narrator).run()
                expect("the server's exit status", server.wait(), 0)
                narrator.ok("the server closed everything and ended with status 0")
        except VfiodError as error:
            print(f"\nvfiod demo FAILED: {type(error).__name__}: {error}", file=sys.stderr)
            if server is not None and (said := server.messages()):
                print(f"The server said:\n{textwrap.indent(said, '  ')}", file=sys.stderr)
            return 1
    print(
        "\nEverything worked. Next: 'vfiod serve', then 'vfiod monitor'; examples/manager.py does this with hardware."
    )
    return 0
