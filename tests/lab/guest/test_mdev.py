"""The kernel's own mediated devices: made by ``vfiod host mdev``, held by an unprivileged vfiod, by group and by cdev.

mtty is a serial card that loops its data back; mdpy and mbochs are displays. Rules are those of behaviour.md,
section 8, and issue 6, part 3.
"""

from __future__ import annotations

import json
import mmap
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from tests.lab.guest.vm import Vm, opened, running_vm, told, trigger_of

from vfiod.client.host.mdev import HostMdev, KernelMdevs
from vfiod.client.host.sysfs import HostError
from vfiod.protocol.catalogue.devices import DeviceDeleted
from vfiod.protocol.errors import RemoteError
from vfiod.protocol.fd import FileDescriptor

MACHINE = "edu"

UUID = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
OTHER = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1002"
RBR, IER, IIR, FCR, LCR, MCR, LSR, MSR, SCR = 0, 1, 2, 2, 3, 4, 5, 6, 7


@pytest.fixture
def mdevs(tmp_path: Path) -> Iterator[KernelMdevs]:
    found = KernelMdevs(definitions=tmp_path)
    assert list(found.devices()) == []
    yield found
    for device in tuple(found.devices()):
        found.destroy(device.uuid)


@pytest.fixture
def vm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vm]:
    with running_vm(tmp_path_factory.mktemp("vm", numbered=True)) as started:
        Path(started.path).chmod(0o666)
        yield started


def add_by_group(vm: Vm, device: HostMdev, name: str) -> None:
    """As a manager does: the group, a container, and the device's place in sysfs."""
    with opened(f"/dev/vfio/{device.group}") as group, opened("/dev/vfio/vfio") as container:
        vm.client.device_add(
            driver="vfio-pci", id=name, sysfsdev=device.sysfsdev, group_fd=group, container_fd=container
        )


def add_by_cdev(vm: Vm, device: HostMdev, name: str) -> None:
    if not any(one.id == "iommufd0" for one in vm.client.query_objects()):
        with opened("/dev/iommu") as fd:
            vm.client.execute("object-add", {"qom-type": "iommufd", "id": "iommufd0", "fd": "iommu"}, fds={"iommu": fd})
    with opened(f"/dev/vfio/devices/{device.vfio_device}") as fd:
        vm.client.execute(
            "device_add", {"driver": "vfio-pci", "id": name, "fd": "cdev", "iommufd": "iommufd0"}, fds={"cdev": fd}
        )


ADD = {"group": add_by_group, "cdev": add_by_cdev}


class Port:
    """One port of an mtty card."""

    def __init__(self, vm: Vm, name: str, region: str = "bar0") -> None:
        self.vm, self.name, self.region = vm, name, region

    def get(self, register: int) -> int:
        value = self.vm.client.region_read(device=self.name, region=self.region, offset=register, size=1).value
        assert isinstance(value, int)
        return value

    def set(self, register: int, value: int) -> None:
        self.vm.client.region_write(device=self.name, region=self.region, offset=register, size=1, value=value)


def program(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vfiod.client.program", "host", "mdev", *arguments],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


# --- vfiod host mdev -------------------------------------------------------------------------------------------


def test_the_program_from_types_to_destroy(mdevs: KernelMdevs) -> None:
    types = {one["type"]: one for one in json.loads(program("types", "--json").stdout)}
    assert {"mtty-1", "mtty-2", "mdpy-vga", "mbochs-small"} <= set(types)
    assert (types["mtty-2"]["parent"], types["mtty-2"]["device-api"]) == ("mtty", "vfio-pci")
    room = types["mtty-2"]["available-instances"]
    done = program("create", "--parent", "mtty", "--type", "mtty-2", "--uuid", UUID)
    assert (done.returncode, done.stdout) == (0, f"{UUID}\n"), done.stderr
    [listed] = json.loads(program("list", "--json").stdout)
    place = f"/sys/devices/virtual/mtty/mtty/{UUID}"
    assert (listed["uuid"], listed["type"], listed["sysfsdev"]) == (UUID, "mtty-2", place)
    assert listed["group"] is not None
    assert listed["vfio-device"].startswith("vfio")
    [kind] = [one for one in mdevs.types("mtty") if one.type == "mtty-2"]
    assert (kind.devices, kind.available_instances) == ((UUID,), room - 1)
    again = program("create", "--parent", "mtty", "--type", "mtty-1", "--uuid", UUID)
    assert (again.returncode, "already, of parent mtty" in again.stderr) == (1, True)
    assert program("destroy", UUID).returncode == 0
    assert list(mdevs.devices()) == []


def test_of_a_definition(mdevs: KernelMdevs) -> None:
    directory = mdevs.definitions_path / "mtty"
    directory.mkdir()
    (directory / UUID).write_text(json.dumps({"mdev_type": "mtty-1", "start": "manual", "attrs": []}))
    made = mdevs.start(UUID)
    assert (made.type, made.defined) == ("mtty-1", True)
    mdevs.destroy(UUID)
    # An attribute that the kernel refuses: the device goes again.
    (directory / UUID).write_text(json.dumps({"mdev_type": "mtty-1", "attrs": [{"vendor/sample_mdev_dev": "x"}]}))
    with pytest.raises(HostError, match=r"sample_mdev_dev.*was removed again"):
        mdevs.start(UUID)
    assert list(mdevs.devices()) == []


def test_no_more_room(mdevs: KernelMdevs) -> None:
    made = []
    while next(one for one in mdevs.types("mtty") if one.type == "mtty-2").available_instances:
        made.append(mdevs.create("mtty", "mtty-2").uuid)
    with pytest.raises(HostError, match="has no room for another mtty-2"):
        mdevs.create("mtty", "mtty-2", UUID)
    # Refused before anything; and the kernel says the same.
    with pytest.raises(OSError, match="No space"):
        Path("/sys/class/mdev_bus/mtty/mdev_supported_types/mtty-2/create").write_text(UUID)
    for uuid in made:
        mdevs.destroy(uuid)


# --- mtty, held by vfiod ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ADD)
def test_data_and_interrupts_of_mtty(mdevs: KernelMdevs, vm: Vm, way: str) -> None:
    ADD[way](vm, mdevs.create("mtty", "mtty-2", UUID), "tty")
    [info] = vm.client.query_devices()
    assert (info.vendor_id, info.device_id, info.backend) == (0x4348, 0x3253, f"kernel-{way}")
    regions = {one.name: one.size for one in vm.client.query_regions(device="tty")}
    assert (regions["bar0"], regions["bar1"], regions["bar2"]) == (8, 8, 0)
    irqs = {one.name: one.count for one in vm.client.query_irqs(device="tty")}
    assert (irqs["intx"], irqs["msi"], irqs["msix"]) == (1, 1, 0)
    with vm.client.irq_start(device="tty", index="intx", mode="relayed") as started:
        trigger = trigger_of(started)
        for region in ("bar0", "bar1"):
            port = Port(vm, "tty", region)
            port.set(SCR, 0xA5)
            assert port.get(SCR) == 0xA5
            port.set(FCR, 0x01)
            port.set(IER, 0x01)
            heard = bytearray()
            for value in b"mtty gives back what it got":
                port.set(RBR, value)
                assert select.select([trigger], [], [], 60)[0], "received data raises the interrupt"
                assert os.eventfd_read(trigger) == 1
                assert port.get(IIR) & 0x0F == 0x04
                assert port.get(LSR) & 1
                heard.append(port.get(RBR))
                vm.client.irq_eoi(device="tty", index="intx")
            assert heard == b"mtty gives back what it got"
            assert not port.get(LSR) & 1
            port.set(IER, 0)
    assert vm.remove("tty")
    mdevs.destroy(UUID)


def test_two_cards_on_two_interfaces(mdevs: KernelMdevs, vm: Vm) -> None:
    add_by_group(vm, mdevs.create("mtty", "mtty-1", UUID), "one")
    add_by_cdev(vm, mdevs.create("mtty", "mtty-1", OTHER), "two")
    Port(vm, "one").set(SCR, 1)
    Port(vm, "two").set(SCR, 2)
    assert (Port(vm, "one").get(SCR), Port(vm, "two").get(SCR)) == (1, 2)
    assert vm.remove("one")
    assert vm.remove("two")
    vm.client.object_del(id="iommufd0")


def test_destroyed_while_vfiod_has_it(mdevs: KernelMdevs, vm: Vm) -> None:
    """mtty has no REQ interrupt, so nobody is told; the kernel waits, the host tool says for whom, and it ends."""
    add_by_group(vm, mdevs.create("mtty", "mtty-1", UUID), "tty")
    with pytest.raises(HostError, match=r"is in use.*device_del"):
        mdevs.destroy(UUID, timeout_s=0.5)
    with vm.client.events("DEVICE_DELETED") as events:
        vm.client.device_del(id="tty")
        assert told(events.get(timeout=60), DeviceDeleted).released
    os.waitpid(-1, 0)
    assert list(mdevs.devices()) == []


def test_what_is_no_mediated_device(mdevs: KernelMdevs, vm: Vm) -> None:
    device = mdevs.create("mtty", "mtty-1", UUID)
    with opened(f"/dev/vfio/{device.group}") as group, opened("/dev/vfio/vfio") as container:
        for sysfsdev, driver, words in (
            (f"/sys/bus/mdev/devices/{OTHER}", "vfio-pci", "cannot be found"),
            ("/tmp", "vfio-pci", "is not a device in sysfs"),
            (device.sysfsdev, "vfio-ccw", "vfio-pci"),
        ):
            with pytest.raises(RemoteError, match=words):
                vm.client.device_add(driver=driver, sysfsdev=sysfsdev, group_fd=group, container_fd=container)
    assert vm.client.query_devices() == []


# --- displays: a region with mmap ------------------------------------------------------------------------------


@contextmanager
def mapped(vm: Vm, name: str, region: str) -> Iterator[mmap.mmap]:
    """A region, mapped by its receiver, as a hypervisor shows a display."""
    with vm.client.region_map(device=name, region=region) as given, ExitStack() as stack:
        fd = given.map_fd
        assert isinstance(fd, FileDescriptor)
        view = mmap.mmap(fd.number, given.size, offset=given.offset)
        stack.callback(view.close)
        yield view


@pytest.mark.parametrize("way", ADD)
def test_mdpys_picture(mdevs: KernelMdevs, vm: Vm, way: str) -> None:
    """A gray gradient of 640x480 in 32 bits (``mdpy_reset``): what is mapped is what vfiod reads."""
    ADD[way](vm, mdevs.create("mdpy", "mdpy-vga", UUID), "display")
    [bar0] = [one for one in vm.client.query_regions(device="display") if one.name == "bar0"]
    assert (bar0.size, bar0.mappable) == (2 << 20, True)
    with mapped(vm, "display", "bar0") as view:
        for line in (0, 100, 479):
            gray = line * 255 // 480
            assert view[line * 640 * 4 : line * 640 * 4 + 8] == bytes([gray] * 8)
        view[:4] = b"\x11\x22\x33\x44"
        value = vm.client.region_read(device="display", region="bar0", offset=0, size=4).value
        assert value == 0x44332211


@pytest.mark.parametrize("way", ADD)
def test_mbochs_has_a_region_of_its_own_type(mdevs: KernelMdevs, vm: Vm, way: str) -> None:
    ADD[way](vm, mdevs.create("mbochs", "mbochs-small", UUID), "display")
    regions = {one.name: one for one in vm.client.query_regions(device="display")}
    assert regions["bar0"].mappable
    assert regions["bar2"].size == 4096
    edid = regions["region9"]
    assert (edid.type, edid.subtype) == (1, 1), "VFIO_REGION_TYPE_GFX, VFIO_REGION_SUBTYPE_GFX_EDID"
    offset = vm.client.region_read(device="display", region="region9", offset=0, size=4).value
    assert offset, "struct vfio_region_gfx_edid begins with where the EDID is"
