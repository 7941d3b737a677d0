"""``vfiod host``, ``vfiod run`` and ``examples/manager.py`` on a real kernel: drivers let go, take over, and refuse."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.lab.guest import pci
from tests.lab.topologies import EDU_FUNCTIONS, EDU_PORT, EDU_ROOT, EDU_SHARED, SHARED_NEIGHBOUR

from vfiod.client.host import binding
from vfiod.client.host.journal import Entry, Journal
from vfiod.client.host.sysfs import HostError, Sysfs
from vfiod.client.manager import Manager

MACHINE = "edu"

REPO = Path(__file__).parents[3]
UNPRIVILEGED_UID = 65533


@pytest.fixture
def sysfs() -> Iterator[Sysfs]:
    addresses = (EDU_ROOT, EDU_PORT, *EDU_FUNCTIONS, EDU_SHARED, SHARED_NEIGHBOUR)
    before = {address: pci.driver_of(address) for address in addresses}
    yield Sysfs()
    assert {address: pci.driver_of(address) for address in addresses} == before


def override(address: str) -> str:
    return (pci.device_path(address) / "driver_override").read_text().strip()


def test_there_and_back_without_a_driver(sysfs: Sysfs) -> None:
    assert binding.bind(sysfs, EDU_ROOT) == binding.Bound(EDU_ROOT, None, "vfio-pci")
    assert pci.driver_of(EDU_ROOT) == "vfio-pci"
    assert binding.unbind(sysfs, EDU_ROOT) == binding.Bound(EDU_ROOT, "vfio-pci", None)
    assert override(EDU_ROOT) in ("", "(null)")


def test_there_and_back_from_a_driver(sysfs: Sysfs) -> None:
    """The kernel gives the device back to the driver it had."""
    assert sysfs.group(pci.group_of(EDU_SHARED)).blockers == (f"{SHARED_NEIGHBOUR} (virtio-pci)",)
    assert binding.bind(sysfs, SHARED_NEIGHBOUR) == binding.Bound(SHARED_NEIGHBOUR, "virtio-pci", "vfio-pci")
    assert sysfs.group(pci.group_of(EDU_SHARED)).blockers == ()
    assert binding.unbind(sysfs, SHARED_NEIGHBOUR) == binding.Bound(SHARED_NEIGHBOUR, "vfio-pci", "virtio-pci")


def test_a_driver_that_refuses(sysfs: Sysfs) -> None:
    """The device was taken from its driver by then: it gets it back."""
    with pytest.raises(HostError, match=r"'pcieport' did not take .* It has virtio-pci again"):
        binding.bind(sysfs, SHARED_NEIGHBOUR, "pcieport")
    assert pci.driver_of(SHARED_NEIGHBOUR) == "virtio-pci"
    assert override(SHARED_NEIGHBOUR) in ("", "(null)")


def test_a_whole_group(sysfs: Sysfs) -> None:
    for verb in ("bind", "unbind"):
        command = [sys.executable, "-m", "vfiod.client.program", "host", verb, "--group", EDU_FUNCTIONS[0]]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert all(address in done.stdout for address in EDU_FUNCTIONS)


def test_facts(sysfs: Sysfs) -> None:
    assert sysfs.device(EDU_ROOT).reset_methods == ()
    assert "bus" in sysfs.device(EDU_PORT).reset_methods
    assert (sysfs.device(EDU_ROOT).iommu or "").startswith("dmar")
    with pci.bound(EDU_ROOT):
        assert sysfs.device(EDU_ROOT).override == "vfio-pci"


@pytest.mark.parametrize("address", [EDU_ROOT, EDU_PORT])
def test_the_manager_example(sysfs: Sysfs, address: str) -> None:
    """A root manager, an unprivileged vfiod, a real device: and everything is as it was."""
    del sysfs  # looks at the drivers before and after
    done = subprocess.run(
        [sys.executable, str(REPO / "examples/manager.py"), address, "--bind", "--uid", str(UNPRIVILEGED_UID)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    assert f"uid {UNPRIVILEGED_UID}" in done.stdout
    assert "it is 1234:11e8" in done.stdout
    assert "msi works, direct: 1 interrupt" in done.stdout
    assert ("it was reset" in done.stdout) == (address == EDU_PORT)
    assert "released: True" in done.stdout


def test_the_manager_names_what_is_in_the_way(sysfs: Sysfs) -> None:
    del sysfs
    done = subprocess.run(
        [sys.executable, str(REPO / "examples/manager.py"), EDU_SHARED, "--bind"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert f"is not viable: {SHARED_NEIGHBOUR} (virtio-pci)" in done.stderr


def vfiod(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vfiod.client.program", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_what_is_assignable(sysfs: Sysfs) -> None:
    """The verdict comes true: what is said to be missing, and nothing else, has to be done."""
    del sysfs
    found = {one["address"]: one for one in json.loads(vfiod("host", "list", "--json").stdout)}
    assert found[EDU_ROOT]["verdict"] == "bind"
    assert found[EDU_ROOT]["notes"] == ["cannot be reset alone"]
    assert f"{SHARED_NEIGHBOUR} of its group is bound to virtio-pci" in found[EDU_SHARED]["reasons"]
    with pci.bound(EDU_ROOT):
        found = {one["address"]: one for one in json.loads(vfiod("host", "list", "--json").stdout)}
        assert (found[EDU_ROOT]["verdict"], found[EDU_ROOT]["reasons"]) == ("yes", [])
    said = vfiod("host", "list")
    assert "IOMMU: dmar" in said.stderr and "interrupt remapping: on" in said.stderr


def test_a_crash_between_two_drivers(sysfs: Sysfs, tmp_path: Path) -> None:
    """As a killed `bind` leaves it: noted, taken from its driver, and no further. `recover` gives it back."""
    state = tmp_path / "state"
    begun = Entry(address=SHARED_NEIGHBOUR, phase="binding", driver="vfio-pci", original="virtio-pci", step="unbind")
    Journal(state).put(begun)
    sysfs.write(pci.device_path(SHARED_NEIGHBOUR) / "driver_override", "vfio-pci")
    pci.unbind(SHARED_NEIGHBOUR)
    done = vfiod("host", "recover", "--state", str(state))
    assert done.stdout == f"{SHARED_NEIGHBOUR}: binding had been cut short; it has virtio-pci now\n", done.stderr
    assert override(SHARED_NEIGHBOUR) in ("", "(null)")


@pytest.mark.parametrize("interface", ["group", "cdev"])
def test_run_gives_a_real_device_to_a_hypervisor(sysfs: Sysfs, tmp_path: Path, interface: str) -> None:
    """One command: bound, opened, passed to an unprivileged vfiod, exported; a vfio-user client reads its registers."""
    del sysfs  # the other vfiod plays a hypervisor: root, and in no sandbox
    program = (
        "import sys, tempfile; from pathlib import Path; from vfiod.client.spawn import own_server;"
        "from vfiod.client.sync import Client; d = tempfile.mkdtemp(dir=sys.argv[2]);"
        "s = own_server(Path(d), ['--sandbox', 'off']); server = s.__enter__(); c = Client.connect(server.path);"
        "c.device_add(driver='vfio-pci', id='d', socket=sys.argv[1]);"
        "c.region_write(device='d', region='config', offset=4, size=2, value=6);"
        "print(hex(c.region_read(device='d', region='bar0', offset=0, size=4).value));"
        "c.close(); s.__exit__(None, None, None); sys.exit(7)"
    )
    done = vfiod(
        "run", "--host", EDU_PORT, "--bind", "--user", str(UNPRIVILEGED_UID), "--interface", interface,
        "--state", str(tmp_path / "state"), "--", sys.executable, "-c", program, "{export}", str(tmp_path),
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (7, f"{pci.EDU_IDENTITY:#x}\n"), done.stderr
    assert [line.partition(": ")[2] for line in done.stderr.splitlines()] == [
        "starting vfiod",
        f"{EDU_PORT}: binding to vfio-pci",
        f"{EDU_PORT}: opening and passing it",
        f"starting {sys.executable} with host0",
        "host0: removing it",
        f"{EDU_PORT}: giving it back",
    ]


def test_a_manager_resets_a_bus_with_a_neighbour_nobody_added(sysfs: Sysfs, tmp_path: Path) -> None:
    with Manager.start("vm1", sysfs=sysfs, journal=Journal(tmp_path / "state")) as vm:
        for address in EDU_FUNCTIONS[1:]:
            binding.bind(sysfs, address, journal=Journal(tmp_path / "state"))
        assert vm.add_device(EDU_FUNCTIONS[0], id="e0", bind=True).state == "running"
        assert vm.hot_reset("e0").possible
        assert vm.remove("e0")
    for address in EDU_FUNCTIONS[1:]:
        binding.unbind(sysfs, address, journal=Journal(tmp_path / "state"))
