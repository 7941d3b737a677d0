"""What the host says of itself.

Rules are those of behaviour.md, section 1.
"""

from __future__ import annotations

import pytest
from tests.unit.server.fake_kernel import FakeKernel

from vfiod.protocol.errors import InvalidArgument
from vfiod.server.kernel.syscalls import Syscalls
from vfiod.server.kernel.sysfs import HostDevice, Sysfs, normalise_address


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("0000:01:00.0", "0000:01:00.0"),
        ("01:00.0", "0000:01:00.0"),
        ("1f.7", "0000:00:1f.7"),
        ("A:b:C.3", "000a:0b:0c.3"),
        ("10000:e1:00.0", "10000:e1:00.0"),
        ("20.0", None),
        ("00:00.8", None),
        ("00:100:00.0", None),
        ("0000:01:00", None),
        ("0000:01:00.0 ", None),
        ("0000:01:00.0\n", None),
        ("x", None),
        ("", None),
    ],
)
def test_addresses(text: str, address: str | None) -> None:
    assert normalise_address(text) == address


@pytest.fixture
def kernel() -> FakeKernel:
    kernel = FakeKernel()
    kernel.add_device("0000:01:00.0", 7)
    kernel.add_device("0000:01:00.1", 7, driver="nvme", reset_method=None)
    kernel.add_device("LNRO0005:00", 9, bus="platform", driver="vfio-platform", reset_method=None)
    return kernel


def test_compatible_of_a_platform_device(kernel: FakeKernel) -> None:
    kernel.add_platform_device("fff51000.ethernet", 11, compatible="calxeda,hb-xgmac\0snps,dwmac\0")
    sysfs = Sysfs(kernel)
    assert sysfs.compatible("fff51000.ethernet") == ("calxeda,hb-xgmac", "snps,dwmac")
    assert sysfs.compatible("LNRO0005:00") is None, "by ACPI: there is no node"
    assert sysfs.compatible("0000:01:00.0") is None
    kernel.sysfs = False
    assert sysfs.compatible("fff51000.ethernet") is None


@pytest.mark.parametrize(
    ("host", "errno", "words"),
    [
        ("a/b", "EINVAL", "'a/b' is not the name of a device"),
        ("..", "EINVAL", "is not the name"),
        ("", "EINVAL", "is not the name"),
        ("a\0b", "EINVAL", "is not the name"),
        ("a\ud800", "EINVAL", "is not the name"),
        ("x" * 256, "ENAMETOOLONG", "longer than 255 bytes"),
        ("é" * 128, "ENAMETOOLONG", "longer than 255 bytes"),
        ("0000:09:00.0", "ENOENT", "no host device 0000:09:00.0"),
        ("nothing", "ENOENT", r"neither a PCI address \(\[\[DDDD:\]BB:\]DD.F"),
    ],
)
def test_hosts_that_are_none(kernel: FakeKernel, host: str, errno: str, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words) as caught:
        Sysfs(kernel).find(host=host, sysfsdev=None)
    assert caught.value.errno == errno


@pytest.mark.parametrize(
    ("path", "errno"),
    [
        ("devices/x", "EINVAL"),
        ("/sys/bus/pci/devices/0000:09:00.0", "ENOENT"),
        ("/" + "x" * 4095, "ENAMETOOLONG"),
        ("/sys/kernel/iommu_groups", "ENODEV"),
        ("/sys\0", "EINVAL"),
        ("/sys\udfff", "EINVAL"),
    ],
)
def test_sysfsdevs_that_are_none(kernel: FakeKernel, path: str, errno: str) -> None:
    with pytest.raises(InvalidArgument, match="sysfsdev") as caught:
        Sysfs(kernel).find(host=None, sysfsdev=path)
    assert caught.value.errno == errno


def test_real_paths_outside_sysfs_and_loops() -> None:
    sysfs = Sysfs(Syscalls())
    for path in ("/etc", "/proc/self/fd/none"):
        with pytest.raises(InvalidArgument):
            sysfs.find(host=None, sysfsdev=path)


@pytest.mark.parametrize(("host", "sysfsdev"), [(None, None), ("01:00.0", "/sys/x")])
def test_exactly_one_of_host_and_sysfsdev(kernel: FakeKernel, host: str | None, sysfsdev: str | None) -> None:
    with pytest.raises(InvalidArgument, match="exactly one"):
        Sysfs(kernel).find(host=host, sysfsdev=sysfsdev)


def test_a_device_found(kernel: FakeKernel) -> None:
    found = Sysfs(kernel).find(host="01:00.0", sysfsdev=None)
    assert found == HostDevice(
        "0000:01:00.0", "pci", "/sys/bus/pci/devices/0000:01:00.0", driver="vfio-pci", group=7, device_api=""
    )
    platform = Sysfs(kernel).find(host="LNRO0005:00", sysfsdev=None)
    assert (platform.bus, platform.group) == ("platform", 9)
    kernel.sysfs = False
    assert Sysfs(kernel).find(host="1:0.0", sysfsdev=None) == HostDevice("0000:01:00.0")


def test_members_and_culprits(kernel: FakeKernel) -> None:
    sysfs = Sysfs(kernel)
    assert [str(member) for member in sysfs.members(7)] == [
        "0000:01:00.0 (driver vfio-pci)",
        "0000:01:00.1 (driver nvme)",
    ]
    assert [member.name for member in sysfs.culprits(7)] == ["0000:01:00.1"]
    kernel.sysfs = False
    assert sysfs.members(7) == ()


def test_reset_methods(kernel: FakeKernel) -> None:
    sysfs = Sysfs(kernel)
    assert sysfs.reset_methods(sysfs.find(host="01:00.0", sysfsdev=None)) == "flr bus"
    assert sysfs.reset_methods(sysfs.find(host="01:00.1", sysfsdev=None)) == ""
    assert sysfs.reset_methods(sysfs.find(host="LNRO0005:00", sysfsdev=None)) is None


def test_interrupt_remapping_on_x86(kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert Sysfs(kernel).interrupt_remapping().ok
    kernel.interrupt_remapping = False
    found = Sysfs(kernel).interrupt_remapping()
    assert not found.ok
    assert "allow_unsafe_interrupts" in found.detail
    kernel.sysfs = False
    assert "not known" in Sysfs(kernel).interrupt_remapping().detail
    monkeypatch.setattr("platform.machine", lambda: "s390x")
    assert Sysfs(kernel).interrupt_remapping().ok
