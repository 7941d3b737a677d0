"""The machines the lab can boot, as data, and where their devices stand.

A topology is a list of QEMU devices with fixed places. The addresses a guest sees follow
from them: QEMU's own and virtme-ng's devices take the lowest free slots of the root bus,
so everything here stands at slot 0x10 and above, and the firmware numbers the buses behind
ports and bridges in the order of their slots. The constants below are those addresses;
``guest/test_kernel.py`` proves them, and a guest test takes its devices from here.

To add a machine: write its devices down, name its addresses, add it to ``TOPOLOGIES``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

#: QEMU ``-machine`` of a PC whose IOMMU remaps interrupts: without remapping, type1 refuses
#: devices (EPERM) unless told to accept unsafe interrupts. Split irqchip is what intremap wants.
Q35 = "q35,kernel-irqchip=split"
INTEL_IOMMU = "intel-iommu,intremap=on,caching-mode=on"


@dataclass(frozen=True, slots=True)
class Topology:
    """One machine: what QEMU is started with, and what the kernel is told.

    ``devices`` are ``-device`` arguments in order (a bridge before what stands behind it).
    ``machine`` is all of ``-machine``: virtme-ng's own choice (microvm) is switched off.
    """

    name: str
    about: str
    devices: tuple[str, ...]
    machine: str = Q35
    cpus: int = 2
    memory: str = "1G"
    kernel_arguments: tuple[str, ...] = ("intel_iommu=on",)
    #: The emulated processor. ``max``, virtme-ng's choice, has the wide vector instructions that libraries pick
    #: where they find them, and that emulation makes slow.
    cpu: str = "Nehalem"
    #: Whether the kernel must be told how fast the processor's clock is: it finds no other to compare it with.
    tell_clock: bool = False
    #: Further QEMU arguments that are no devices (``-drive``, ``-object``, ``-netdev`` ...).
    arguments: tuple[str, ...] = ()
    #: Of the guest: ``x86_64`` or ``s390x``, which says how it boots, too.
    architecture: str = "x86_64"
    #: Character devices a guest test talks to from inside (``machine.stream``): QEMU's side of a terminal.
    streams: tuple[str, ...] = ()

    @property
    def relayed(self) -> bool:
        """Whether files and streams go over a console: the s390x kernel has no 9p and no virtio-serial."""
        return self.architecture == "s390x"

    def qemu_arguments(self) -> list[str]:
        """Return what this topology adds to QEMU's command line."""
        line = ["-machine", self.machine, *self.arguments]
        for device in self.devices:
            line += ["-device", device]
        return line


def port(name: str, slot: int, chassis: int) -> str:
    """Return a PCIe root port on the root bus; what stands behind it has reset and hot reset."""
    return f"pcie-root-port,id={name},bus=pcie.0,addr={slot:#x},chassis={chassis},slot={chassis}"


def bridge(name: str, slot: int) -> str:
    """Return a PCIe-to-PCI bridge on the root bus; what stands behind it is one IOMMU group."""
    return f"pcie-pci-bridge,id={name},bus=pcie.0,addr={slot:#x}"


def device(driver: str, name: str, bus: str, slot: int, /, function: int = 0, **properties: str) -> str:
    """Return any device in its place. ``name`` is its QEMU id, the one ``device_del`` takes."""
    options = "".join(f",{key.replace('_', '-')}={value}" for key, value in properties.items())
    return f"{driver},id={name},bus={bus},addr={slot:#x}.{function}{options}"


# --- edu ---------------------------------------------------------------------------------
# Addresses in the guest, [[DDDD:]BB:]DD.F as sysfs writes them.

#: On the root bus: a group of its own, and no way to reset it.
EDU_ROOT = "0000:00:10.0"
#: Behind a root port: a group of its own, reset and hot reset.
EDU_PORT = "0000:01:00.0"
#: Two behind one PCI bridge: one group, two slots.
EDU_PAIR = ("0000:02:01.0", "0000:02:02.0")
#: Behind another PCI bridge: not viable for as long as its neighbour keeps its host driver.
EDU_SHARED = "0000:03:01.0"
#: That neighbour: a virtio-rng, bound to ``virtio-pci`` at boot.
SHARED_NEIGHBOUR = "0000:03:02.0"
#: Two functions of one slot behind a root port: one group, one bus reset for both.
EDU_FUNCTIONS = ("0000:04:00.0", "0000:04:00.1")

#: QEMU ids, for ``device_del`` and ``query-pci``, by guest address.
EDU_IDS: Mapping[str, str] = {
    EDU_ROOT: "edu-root",
    EDU_PORT: "edu-port",
    EDU_PAIR[0]: "edu-pair0",
    EDU_PAIR[1]: "edu-pair1",
    EDU_SHARED: "edu-shared",
    SHARED_NEIGHBOUR: "neighbour",
    EDU_FUNCTIONS[0]: "edu-function0",
    EDU_FUNCTIONS[1]: "edu-function1",
}

EDU = Topology(
    name="edu",
    about="edu devices in every kind of IOMMU group: alone, resettable, shared, not viable, multifunction",
    devices=(
        INTEL_IOMMU,
        device("edu", "edu-root", "pcie.0", 0x10),
        port("port1", 0x11, chassis=1),
        device("edu", "edu-port", "port1", 0),
        bridge("bridge2", 0x12),
        device("edu", "edu-pair0", "bridge2", 1),
        device("edu", "edu-pair1", "bridge2", 2),
        bridge("bridge3", 0x13),
        device("edu", "edu-shared", "bridge3", 1),
        device("virtio-rng-pci", "neighbour", "bridge3", 2),
        port("port4", 0x14, chassis=4),
        device("edu", "edu-function0", "port4", 0, multifunction="on"),
        device("edu", "edu-function1", "port4", 0, function=1),
    ),
)


# --- igb ---------------------------------------------------------------------------------

#: Two functions of one slot behind a root port, isolated from each other (ACS): a group each, one bus
#: reset for both. Intel 82576, PCI Express, SR-IOV: up to seven virtual functions each.
IGB_FUNCTIONS = ("0000:01:00.0", "0000:01:00.1")
#: The first virtual functions of each; there once ``sriov_numvfs`` says so.
IGB_VIRTUAL = (("0000:01:10.0", "0000:01:10.2"), ("0000:01:10.1", "0000:01:10.3"))

IGB = Topology(
    name="igb",
    about="two igb functions in one slot, each in a group of its own, with virtual functions",
    devices=(
        INTEL_IOMMU,
        # Above 5 GT/s Linux waits after a bus reset for a link that QEMU's igb never reports as up (ENOTTY).
        port("port1", 0x10, chassis=1) + ",x-speed=5",
        # With ARI (the port forwards it) the kernel follows this pointer, and not the multifunction bit.
        device("igb", "igb0", "port1", 0, multifunction="on", x_pcie_ari_nextfn_1="on"),
        device("igb", "igb1", "port1", 0, function=1),
    ),
)


# --- e1000e and nvme: MSI-X, a ROM, and queues in guest memory --------------------------------

#: A network card behind a root port: MSI-X, MSI and INTx, an expansion ROM, reset.
E1000E_PORT = "0000:01:00.0"
E1000E_IDS: Mapping[str, str] = {E1000E_PORT: "e1000e-port"}
#: The ROM it is given, by the name QEMU finds it under: no power of two, so that its end reads as padding.
E1000E_ROM = "efi-e1000e.rom"

E1000E = Topology(
    name="e1000e",
    about="an e1000e network card behind a root port: MSI-X with five vectors, and a ROM",
    devices=(
        INTEL_IOMMU,
        # As with igb: above 5 GT/s Linux waits in vain for the link after a bus reset (ENOTTY).
        port("port1", 0x11, chassis=1) + ",x-speed=5",
        device("e1000e", "e1000e-port", "port1", 0, romfile=E1000E_ROM),
    ),
)

#: A disk behind a root port: its admin queue is in guest memory, its interrupts are MSI-X.
NVME_PORT = "0000:01:00.0"
NVME_IDS: Mapping[str, str] = {NVME_PORT: "nvme-port"}
NVME_SERIAL = "vfiod-lab-1"

NVME = Topology(
    name="nvme",
    about="an NVMe disk behind a root port: queues in guest memory, doorbells, MSI-X",
    devices=(
        INTEL_IOMMU,
        port("port1", 0x11, chassis=1),
        device("nvme", "nvme-port", "port1", 0, serial=NVME_SERIAL, drive="disk0"),
    ),
    arguments=("-drive", "if=none,id=disk0,driver=null-co,size=1M"),
)


# --- a hypervisor in the guest -----------------------------------------------------------------

NESTED = Topology(
    name="nested",
    about="an edu behind a root port, and memory enough for a QEMU of the guest's own",
    devices=(
        INTEL_IOMMU,
        port("port1", 0x11, chassis=1),
        device("edu", "edu-port", "port1", 0),
    ),
    memory="2G",
)


# --- machines that lack something ------------------------------------------------------------

#: A USB controller with sixteen MSI vectors and no MSI-X, behind a root port.
XHCI_PORT = "0000:02:00.0"
XHCI_IDS: Mapping[str, str] = {XHCI_PORT: "xhci-port"}
XHCI_VECTORS = 16
#: The disk that takes the vectors away, on the machine that has few.
SHORT_NVME = "0000:01:00.0"
SHORT_NVME_VECTORS = 2048

_XHCI = (
    port("port2", 0x12, chassis=2),
    device("nec-usb-xhci", "xhci-port", "port2", 0, msi="on", msix="off", intrs=str(XHCI_VECTORS)),
)

SHORT = Topology(
    name="short",
    about="one processor, so about 200 interrupt vectors: an NVMe disk that can use 2,048, and a device with 16 MSI",
    devices=(
        INTEL_IOMMU,
        port("port1", 0x11, chassis=1),
        device("nvme", "nvme-port", "port1", 0, serial=NVME_SERIAL, drive="disk0")
        + f",msix_qsize={SHORT_NVME_VECTORS}",
        *_XHCI,
    ),
    arguments=NVME.arguments,
    cpus=1,
)

NOREMAP = Topology(
    name="noremap",
    about="an IOMMU without interrupt remapping: edu, and a device with 16 MSI vectors",
    devices=(
        "intel-iommu,intremap=off,caching-mode=on",
        port("port1", 0x11, chassis=1),
        device("edu", "edu-port", "port1", 0),
        *_XHCI,
    ),
    machine="q35,kernel-irqchip=off",
)

NOIOMMU = Topology(
    name="noiommu",
    about="no IOMMU at all: edu on the root bus and behind a root port",
    devices=(
        device("edu", "edu-root", "pcie.0", 0x10),
        port("port1", 0x11, chassis=1),
        device("edu", "edu-port", "port1", 0),
    ),
    kernel_arguments=(),
)


# --- for tests/bench -----------------------------------------------------------------------------

#: Three edu, each alone behind a root port: vfiod's, the C program's, and one for a backend without a server.
BENCH_EDUS = ("0000:01:00.0", "0000:02:00.0", "0000:03:00.0")
#: A disk with 2,048 MSI-X vectors, of which the machine has about 380.
BENCH_NVME = "0000:04:00.0"

BENCH = Topology(
    name="bench",
    about="three edu and an NVMe disk, each behind a root port, and memory to map (tests/bench)",
    devices=(
        INTEL_IOMMU,
        *(
            part
            for place, _ in enumerate(BENCH_EDUS, 1)
            for part in (
                port(f"port{place}", 0x10 + place, chassis=place),
                device("edu", f"edu{place}", f"port{place}", 0),
            )
        ),
        port("port4", 0x14, chassis=4),
        device("nvme", "nvme-port", "port4", 0, serial=NVME_SERIAL, drive="disk0") + ",msix_qsize=2048",
    ),
    arguments=NVME.arguments,
    memory="4G",
)


# --- microvm: platform devices -------------------------------------------------------------

#: ACPI's name of a virtio-mmio transport; the instances are its platform devices, in the order of their addresses.
VIRTIO_MMIO = ("LNRO0005:00", "LNRO0005:01")

MICROVM = Topology(
    name="microvm",
    about="a machine without chipset: virtio-mmio devices (rng, balloon) on the platform bus, no IOMMU",
    machine="microvm,acpi=on,pcie=on,rtc=on,pit=on,pic=on,isa-serial=on",
    # These devices have no reset that Linux knows of; without this vfio-platform would not take them.
    kernel_arguments=("vfio_platform.reset_required=0",),
    # Its ACPI is "hardware reduced": Linux does not look for a PIT there, and would wait for ever for a first tick.
    tell_clock=True,
    devices=("virtio-rng-device,id=rng", "virtio-balloon-device,id=balloon"),
)


# --- ccw: channel I/O, on s390x -------------------------------------------------------------
# Device numbers, as sysfs writes them: of the device, behind its subchannel.

#: A disk of 4 MiB, a virtio device: it answers SENSE ID, NOP and TIC.
CCW_DISK = "0.0.1000"
#: A real 3270 terminal; its keyboard and screen are the stream ``terminal``.
CCW_TERMINAL = "0.0.2000"
#: Entropy sources to unplug, on a machine of their own.
CCW_SPARE = tuple(f"0.0.300{number}" for number in range(5))

#: QEMU ids, for ``device_del``.
CCW_IDS: Mapping[str, str] = {
    CCW_DISK: "ccw-disk",
    CCW_TERMINAL: "ccw-terminal",
    **{address: f"ccw-spare{number}" for number, address in enumerate(CCW_SPARE)},
}

CCW = Topology(
    name="ccw",
    about="s390x: a virtio disk and a 3270 terminal, each behind a subchannel of its own",
    architecture="s390x",
    machine="s390-ccw-virtio",
    cpu="qemu",
    cpus=1,
    kernel_arguments=(),
    arguments=("-drive", "if=none,id=disk0,driver=null-co,size=4M"),
    devices=(
        "virtio-blk-ccw,id=ccw-disk,devno=fe.0.1000,drive=disk0",
        "x-terminal3270,id=ccw-terminal,devno=fe.0.2000,chardev=terminal",
    ),
    streams=("terminal",),
)

CCW_UNPLUG = replace(
    CCW,
    name="ccw-unplug",
    about="s390x: devices behind subchannels of their own, to be unplugged",
    arguments=(),
    devices=tuple(f"virtio-rng-ccw,id={CCW_IDS[spare]},devno=fe.{spare[2:]}" for spare in CCW_SPARE),
    streams=(),
)


TOPOLOGIES: Mapping[str, Topology] = {
    topology.name: topology
    for topology in (EDU, IGB, E1000E, NVME, MICROVM, SHORT, NOREMAP, NOIOMMU, NESTED, BENCH, CCW, CCW_UNPLUG)
}


def find_topology(name: str) -> Topology:
    """Return the topology called ``name``; ValueError names those there are."""
    if name not in TOPOLOGIES:
        raise ValueError(f"no lab machine is called {name!r}; there are: {', '.join(TOPOLOGIES)}")
    return TOPOLOGIES[name]
