"""``vfiod host`` and ``examples/manager.py`` on a real kernel: real drivers let go, take over, and refuse."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.lab.guest import pci
from tests.lab.topologies import EDU_FUNCTIONS, EDU_PORT, EDU_ROOT, EDU_SHARED, SHARED_NEIGHBOUR

from vfiod.client.host import binding
from vfiod.client.host.sysfs import HostError, Sysfs

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
