"""The manager library where docs/manager.md does not go."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from vfiod.client.errors import ClientError
from vfiod.client.host.journal import Journal
from vfiod.client.host.sysfs import HostError, Sysfs
from vfiod.client.manager import Manager
from vfiod.protocol.errors import RemoteError


class TestManager:
    @pytest.fixture
    def host(self, tmp_path: Path) -> Path:
        """One device in a group of its own, which nobody answers for: `/dev/vfio` has no such group."""
        device = tmp_path / "sys/bus/pci/devices/0000:03:00.0"
        device.mkdir(parents=True)
        for name in ("vendor", "device", "class"):
            (device / name).write_text("0x1234\n")
        members = tmp_path / "sys/kernel/iommu_groups/987654/devices"
        members.mkdir(parents=True)
        (members / device.name).symlink_to(device)
        (device / "iommu_group").symlink_to(members.parent)
        return tmp_path

    @pytest.fixture
    def vm(self, host: Path) -> Iterator[Manager]:
        with Manager.start("vm1", sysfs=Sysfs(host / "sys"), journal=Journal(host / "state")) as running:
            yield running
        assert not running.directory.exists()

    def test_two_devices_go_with_it(self, vm: Manager) -> None:
        assert [vm.add_mediated("primer-pci", id=id).id for id in ("a", "b")] == ["a", "b"]
        vm.export("b")
        vm.close()
        assert vm.process.returncode == 0
        vm.close()

    def test_a_device_that_cannot_be_added_leaves_nothing(self, vm: Manager) -> None:
        vm.add_mediated("primer-pci", id="a")
        with pytest.raises(RemoteError):
            vm.add_mediated("primer-pci", id="a")
        with pytest.raises(ClientError, match=r"There is no mdev type 'none': .*primer-pci of primer"):
            vm.add_mediated("none", id="b")
        assert [len(one.devices) for one in vm.client.query_mdev_types() if one.type == "primer-pci"] == [1]

    def test_a_host_that_says_no(self, vm: Manager, host: Path) -> None:
        with pytest.raises(HostError, match=r"There is no PCI device 0000:09:00\.0"):
            vm.add_device("09:00.0", id="a")
        with pytest.raises(HostError, match="Cannot open /dev/vfio/987654: ENOENT: is vfio-pci loaded"):
            vm.add_device("03:00.0", id="a", interface="group")
        with pytest.raises(HostError, match="has no cdev: it is bound to no driver"):
            vm.add_device("03:00.0", id="a", interface="cdev")
        (host / "sys/bus/pci/devices/0000:03:00.0/iommu_group").unlink()
        with pytest.raises(HostError, match="is in no IOMMU group"):
            vm.add_device("03:00.0", id="a")
        assert vm.client.query_devices() == []

    def test_vfiod_dies(self, vm: Manager) -> None:
        vm.add_mediated("primer-pci", id="a")
        os.kill(vm.process.pid, signal.SIGKILL)
        vm.process.wait()
        with pytest.raises(ClientError, match="vfiod was ended by signal 9"):
            vm.close()

    def test_what_came_first_is_raised(self) -> None:
        with pytest.raises(ZeroDivisionError) as raised, Manager.start("vm1") as vm:
            vm.process.kill()
            vm.process.wait()
            raise ZeroDivisionError
        assert raised.value.__notes__ == ["and then: vfiod was ended by signal 9"]

    def test_a_vfiod_that_cannot_start(self) -> None:
        with pytest.raises(ClientError, match="ended with status"):
            Manager.start("vm1", arguments=["--trace"])
