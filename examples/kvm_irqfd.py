"""A device's level interrupt into a KVM guest and back, without vfiod or this program in between.

    python examples/kvm_irqfd.py [--driver vfio-platform | vfio-pci]

A vfiod with a built-in mediated device is started, and a VM of one processor with an in-kernel interrupt controller.
Two eventfds join them: the device signals the first, and KVM raises the line (``KVM_IRQFD``); the guest's EOI makes KVM
lower the line and signal the second (``KVM_IRQFD_FLAG_RESAMPLE``), which unmasks the interrupt at the device. The guest
is a few bytes of real mode code; its handler asks this program to quieten the device, as a driver would by a register.

Ends with 77 and the reason where there is no KVM, or where the guest cannot get ready. Once it is, all that
differs from what is said here is a fault: status 1.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import mmap
import os
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Final, Self

from vfiod.client import Client, FileDescriptor, VectorFds
from vfiod.client.spawn import own_server
from vfiod.protocol.errors import VfiodError

PATIENCE: Final = 60  # seconds for any one answer, of vfiod or of the guest
SKIPPED: Final = 77
LINE: Final = 5  # of the interrupt controller; the guest's handler is interrupt 0x20 + 5

# --- <linux/kvm.h> -------------------------------------------------------------------------------------------
KVM_GET_API_VERSION: Final = 0xAE00
KVM_CREATE_VM: Final = 0xAE01
KVM_CHECK_EXTENSION: Final = 0xAE03
KVM_GET_VCPU_MMAP_SIZE: Final = 0xAE04
KVM_CREATE_VCPU: Final = 0xAE41
KVM_SET_TSS_ADDR: Final = 0xAE47
KVM_CREATE_IRQCHIP: Final = 0xAE60
KVM_RUN: Final = 0xAE80
KVM_SET_USER_MEMORY_REGION: Final = 0x4020AE46
KVM_IRQFD: Final = 0x4020AE76
KVM_SET_REGS: Final = 0x4090AE82
KVM_GET_SREGS: Final = 0x8138AE83
KVM_SET_SREGS: Final = 0x4138AE84
KVM_GET_IRQCHIP: Final = 0xC208AE62
KVM_CAP_IRQFD_RESAMPLE: Final = 82
KVM_IRQFD_FLAG_RESAMPLE: Final = 2
KVM_EXIT_IO: Final = 2
PORT_END: Final = 36  # of struct kvm_run: the exit reason is at 8, the port of KVM_EXIT_IO at 34

# --- the guest: what it says to this program by writing to a port ----------------------------------------------
READY, QUIETEN, HANDLED = 0xE0, 0xE1, 0xE2
CODE: Final = 0x1000
HANDLER: Final = 0x1100
MEMORY: Final = 0x10000


def port(number: int, value: int) -> bytes:
    """``mov al, value; mov dx, number; out dx, al``."""
    return bytes([0xB0, value, 0xBA]) + struct.pack("<H", number) + b"\xee"


# The first interrupt controller: vectors from 0x20, only our line open, and that one level triggered (ELCR, 0x4d0).
MAIN: Final = (
    port(0x20, 0x11) + port(0x21, 0x20) + port(0x21, 0x04) + port(0x21, 0x01) + port(0x21, 0xFF & ~(1 << LINE))
    + port(0x4D0, 1 << LINE) + port(READY, 0) + b"\xfb\xf4\xeb\xfd"  # sti; hlt; jmp to the hlt
)  # fmt: skip
HANDLE: Final = port(QUIETEN, 0) + port(0x20, 0x20) + port(HANDLED, 0) + b"\xcf"  # the EOI in between; iret


@dataclass(frozen=True)
class Sample:
    """A built-in device: how it is made, and which registers raise and quieten its first level interrupt."""

    parent: str
    type: str
    index: int
    region: int
    raises: tuple[int, int]
    quietens: tuple[int, int]


SAMPLES: Final = {
    "vfio-platform": Sample("platform", "primer-platform", 0, 0, (0x10, 0), (0x14, 0)),
    "vfio-pci": Sample("primer", "primer-pci", 0, 0, (0x14, 1), (0x18, 1)),
}


class NoKvm(Exception):
    """What is missing here."""


def main() -> int:
    """Wire the two together, interrupt the guest, and look at every step."""
    parser = argparse.ArgumentParser(description="Wire a device's level interrupt to a KVM guest.")
    parser.add_argument("--driver", choices=SAMPLES, default="vfio-platform", help="which built-in device")
    options = parser.parse_args()
    signal.signal(signal.SIGALRM, too_long)
    try:
        with Vm() as vm, tempfile.TemporaryDirectory() as directory, own_server(Path(directory)) as server:
            print("kvm: a VM with an in-kernel interrupt controller; its guest waits for interrupts")
            with Client.connect(server.path, timeout=PATIENCE) as client:
                show(client, vm, options.driver)
    except NoKvm as error:
        print(f"skipped: {error}")
        return SKIPPED
    except (VfiodError, OSError) as error:
        print(f"kvm: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def show(client: Client, vm: Vm, driver: str) -> None:
    """One device's interrupt, twice around."""
    sample = SAMPLES[driver]
    made = client.mdev_create(parent=sample.parent, type=sample.type)
    client.device_add(driver=driver, id="dev0", mdev=made.uuid)
    with eventfd() as trigger, eventfd() as resample:
        vm.irqfd(LINE, trigger, resample)
        pair = VectorFds(vector=0, trigger=trigger, resample=resample)
        started = client.irq_start(device="dev0", index=sample.index, eventfds=[pair])
        print(f"kvm: interrupt {sample.index} of dev0 is line {LINE}, {started.irqs[0].mode.value}")

        write(client, sample, sample.raises)
        wait_for_line(vm)
        print(f"kvm: the device raised it, the interrupt controller has line {LINE} up")
        vm.run_until(QUIETEN)
        print("kvm: the guest handles it")
        # Not quietened: the EOI unmasks a line that is still up, and so it comes again.
        vm.run_until(HANDLED)
        vm.run_until(QUIETEN)
        print("kvm: not quietened, it came again after the guest's EOI")
        write(client, sample, sample.quietens)
        vm.run_until(HANDLED)
        if vm.lines() & 1 << LINE:
            raise OSError("the line is still up after the EOI")
        print("kvm: quietened, the line is down after the EOI")
        for _ in range(3):
            write(client, sample, sample.raises)
            vm.run_until(QUIETEN)
            write(client, sample, sample.quietens)
            vm.run_until(HANDLED)
        print("kvm: three more, each raised, handled and unmasked by the guest's EOI")
        client.irq_stop(device="dev0", index=sample.index)
    client.device_del(id="dev0")


def write(client: Client, sample: Sample, register: tuple[int, int]) -> None:
    """Write a register of the device."""
    offset, value = register
    client.region_write(device="dev0", region=sample.region, offset=offset, size=4, value=value)


def wait_for_line(vm: Vm) -> None:
    """KVM raises the line from a work queue: a moment after the eventfd."""
    signal.alarm(PATIENCE)
    while not vm.lines() & 1 << LINE:
        time.sleep(0.001)
    signal.alarm(0)


@contextlib.contextmanager
def eventfd() -> Iterator[FileDescriptor]:
    """One that is closed at the end."""
    with FileDescriptor(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)) as fd:
        yield fd


def too_long(number: int, frame: FrameType | None) -> None:
    """The guest, or KVM, does not answer."""
    raise TimeoutError(f"nothing happened for {PATIENCE} s")


def look(run: bytes, wanted: int) -> None:
    """Whether the guest stopped by writing to that port, by the start of ``struct kvm_run``."""
    (reason,) = struct.unpack_from("=I", run, 8)
    said = struct.unpack_from("=H", run, 34)[0] if reason == KVM_EXIT_IO else None
    if said != wanted:
        where = "no port" if said is None else f"port {said:#x}"
        raise OSError(f"the guest was to write to port {wanted:#x}, and stopped at {where}, exit reason {reason}")


class Vm:
    """A virtual machine with one processor, an interrupt controller, and the guest above."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        try:
            self._make()
            self.run_until(READY)
        except OSError as error:
            self._stack.close()
            raise NoKvm(f"KVM does not work here: {error}") from error
        except BaseException:
            self._stack.close()
            raise

    def _make(self) -> None:
        if struct.calcsize("P") != 8 or os.uname().machine != "x86_64":
            raise NoKvm(f"the guest is for x86_64, this is {os.uname().machine}")
        kvm = self._fd(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
        if fcntl.ioctl(kvm, KVM_GET_API_VERSION) != 12:
            raise NoKvm("this KVM has another interface than every KVM since Linux 2.6.22")
        if not fcntl.ioctl(kvm, KVM_CHECK_EXTENSION, KVM_CAP_IRQFD_RESAMPLE):
            raise NoKvm("this KVM has no KVM_CAP_IRQFD_RESAMPLE")
        self._vm = self._fd(fcntl.ioctl(kvm, KVM_CREATE_VM, 0))
        fcntl.ioctl(self._vm, KVM_SET_TSS_ADDR, 0x1000000)  # any place that the guest does not use
        fcntl.ioctl(self._vm, KVM_CREATE_IRQCHIP)
        memory = self._stack.enter_context(contextlib.closing(mmap.mmap(-1, MEMORY)))
        memory[CODE : CODE + len(MAIN)] = MAIN
        memory[HANDLER : HANDLER + len(HANDLE)] = HANDLE
        struct.pack_into("<HH", memory, 4 * (0x20 + LINE), HANDLER, 0)
        view = ctypes.c_char.from_buffer(memory)
        fcntl.ioctl(
            self._vm, KVM_SET_USER_MEMORY_REGION, struct.pack("=IIQQQ", 0, 0, 0, MEMORY, ctypes.addressof(view))
        )
        del view
        self._cpu = self._fd(fcntl.ioctl(self._vm, KVM_CREATE_VCPU, 0))
        size = fcntl.ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE)
        self._run = self._stack.enter_context(contextlib.closing(mmap.mmap(self._cpu, size)))
        special = bytearray(312)
        fcntl.ioctl(self._cpu, KVM_GET_SREGS, special)
        struct.pack_into("=QIH", special, 0, 0, 0xFFFF, 0)  # cs: base, limit, selector
        fcntl.ioctl(self._cpu, KVM_SET_SREGS, bytes(special))
        registers = [0] * 18
        registers[6], registers[16], registers[17] = MEMORY - 16, CODE, 2  # rsp, rip, rflags
        fcntl.ioctl(self._cpu, KVM_SET_REGS, struct.pack("=18Q", *registers))

    def _fd(self, number: int) -> int:
        return self._stack.enter_context(FileDescriptor(number)).number

    def irqfd(self, line: int, trigger: FileDescriptor, resample: FileDescriptor) -> None:
        """``KVM_IRQFD``: ``trigger`` raises the line; its EOI lowers it and signals ``resample``."""
        fcntl.ioctl(
            self._vm,
            KVM_IRQFD,
            struct.pack("=IIIi16x", trigger.number, line, KVM_IRQFD_FLAG_RESAMPLE, resample.number),
        )

    def lines(self) -> int:
        """The first interrupt controller's lines that are up: ``last_irr`` of ``struct kvm_pic_state``."""
        chip = bytearray(520)
        fcntl.ioctl(self._vm, KVM_GET_IRQCHIP, chip)
        return chip[8]

    def run_until(self, wanted: int) -> None:
        """Let the guest run until it writes to that port."""
        signal.alarm(PATIENCE)
        try:
            fcntl.ioctl(self._cpu, KVM_RUN, 0)
        finally:
            signal.alarm(0)
        look(self._run[:PORT_END], wanted)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


if __name__ == "__main__":
    sys.exit(main())
