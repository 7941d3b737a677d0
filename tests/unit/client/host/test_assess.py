"""What `vfiod host list` says of a host: what is assignable, what has to be done first, and why not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vfiod.client.host.program import main

PF, VF, BLOCKED, BARE = "0000:01:00.0", "0000:01:10.0", "0000:02:00.0", "0000:03:00.0"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    bus = tmp_path / "bus"
    for address, driver, group in (
        (PF, "vfio-pci", 1), (VF, "vfio-pci", 2), (BLOCKED, None, 3), ("0000:02:00.1", "snd", 3), (BARE, None, None),
    ):  # fmt: skip
        path = tmp_path / "devices/pci0000:00" / address
        path.mkdir(parents=True)
        for name, value in (("vendor", 0x8086), ("device", 0x10C9), ("class", 0x020000)):
            (path / name).write_text(f"{value:#x}\n")
        (path / "reset_method").write_text("flr\n" if address != BARE else "")
        if driver is not None:
            (bus / "pci/drivers" / driver).mkdir(parents=True, exist_ok=True)
            (path / "driver").symlink_to(bus / "pci/drivers" / driver)
        if group is not None:
            members = tmp_path / f"kernel/iommu_groups/{group}/devices"
            members.mkdir(parents=True, exist_ok=True)
            (members / address).symlink_to(path)
            (path / "iommu_group").symlink_to(members.parent)
        (bus / "pci/devices").mkdir(parents=True, exist_ok=True)
        (bus / "pci/devices" / address).symlink_to(path)
    function = tmp_path / "devices/pci0000:00"
    (function / PF / "sriov_totalvfs").write_text("7\n")
    (function / PF / "sriov_numvfs").write_text("1\n")
    (function / VF / "physfn").symlink_to(function / PF)
    (function / VF / "vfio-dev/vfio3").mkdir(parents=True)
    (tmp_path / "class/iommu/dmar0").mkdir(parents=True)
    return tmp_path


def listed(root: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, dict[str, object]]:
    assert main(["list", "--json", "--sysfs", str(root), *arguments]) == 0
    return {one["address"]: one for one in json.loads(capsys.readouterr().out)}


def test_verdicts(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = listed(root, capsys)
    assert {address: one["verdict"] for address, one in found.items()} == {
        PF: "yes", VF: "yes", BLOCKED: "bind", "0000:02:00.1": "bind", BARE: "no",
    }  # fmt: skip
    assert found[BLOCKED]["reasons"] == ["bound to no driver", "0000:02:00.1 of its group is bound to snd"]
    assert found[BARE]["reasons"] == ["no IOMMU stands before it", "bound to no driver"]
    assert found[BARE]["notes"] == ["cannot be reset alone"]
    assert found[PF]["notes"] == ["1 of 7 virtual functions", "needs a VF token (vf-token)"]
    assert found[VF]["notes"] == [f"a virtual function of {PF}", "needs a VF token (vf-token)"]
    assert found[VF]["vfio-device"] == "vfio3"


@pytest.mark.parametrize(
    ("chip", "remapping"), [("IR-PCI-MSI-0000:00:1f.0", "on"), ("IO-APIC", "off"), ("GICv3", "unknown")]
)
def test_interrupt_remapping(root: Path, capsys: pytest.CaptureFixture[str], chip: str, remapping: str) -> None:
    (root / "kernel/irq/9").mkdir(parents=True)
    (root / "kernel/irq/9/chip_name").write_text(chip + "\n")
    refused = listed(root, capsys)[PF]["verdict"] == "no"
    assert refused == (remapping == "off")
    main(["list", "--sysfs", str(root)])
    assert f"interrupt remapping: {remapping}" in capsys.readouterr().err
    parameters = root / "module/vfio_iommu_type1/parameters"
    parameters.mkdir(parents=True)
    (parameters / "allow_unsafe_interrupts").write_text("Y\n")
    assert listed(root, capsys)[PF]["verdict"] == "yes"


def test_no_iommu(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "kernel/iommu_groups/1/name").write_text("vfio-noiommu\n")
    (root / "module/vfio/parameters").mkdir(parents=True)
    (root / "module/vfio/parameters/enable_unsafe_noiommu_mode").write_text("Y\n")
    (root / "class/iommu/dmar0").rmdir()
    found = listed(root, capsys)
    assert found[PF]["verdict"] == "no" and "x-noiommu" in str(found[PF]["reasons"])
    assert "x-noiommu" in str(found[BARE]["reasons"])
    main(["list", "--sysfs", str(root)])
    said = capsys.readouterr().err
    assert "IOMMU: none" in said and "no-IOMMU mode is enabled" in said


def test_other_buses(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Platform devices behind an IOMMU, subchannels, and crypto queues; not the clock, and not the card."""
    devices = root / "bus"
    group = root / "kernel/iommu_groups/9/devices"
    group.mkdir(parents=True)
    ethernet = devices / "platform/devices/fff51000.ethernet"
    (ethernet / "of_node").mkdir(parents=True)
    (ethernet / "of_node/compatible").write_bytes(b"calxeda,hb-xgmac\0")
    (ethernet / "iommu_group").symlink_to(group.parent)
    (devices / "platform/devices/rtc0").mkdir()
    channel = devices / "css/devices/0.0.0313"
    channel.mkdir(parents=True)
    (channel / "type").write_text("0\n")
    (channel / "driver").symlink_to(devices / "css/drivers/vfio_ccw")
    card = root / "devices/ap/card04"
    (card / "04.0042").mkdir(parents=True)
    (card / "type").write_text("CEX7C\n")
    (devices / "ap/devices").mkdir(parents=True)
    for path in (card, card / "04.0042"):
        (devices / "ap/devices" / path.name).symlink_to(path)
    found = {address: one for address, one in listed(root, capsys).items() if one["bus"] != "pci"}
    assert {(one["bus"], address, one["kind"], one["verdict"]) for address, one in found.items()} == {
        ("platform", "fff51000.ethernet", "calxeda,hb-xgmac", "bind"),
        ("css", "0.0.0313", "I/O subchannel", "yes"),
        ("ap", "04.0042", "CEX7C", "bind"),
    }
    assert found["fff51000.ethernet"]["group"] == 9
    assert "rtc0" in listed(root, capsys, "--all")
    main(["list", "--sysfs", str(root)])
    assert "0.0.0313" in capsys.readouterr().out


def test_names_are_missed_aloud(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from vfiod.client.host.names import PciNames, system_names

    assert system_names((str(root / "none"),)).place is None
    (root / "pci.ids").write_text("8086  Intel\n")
    assert system_names((str(root / "pci.ids"),)).place == str(root / "pci.ids")
    main(["list", "--sysfs", str(root)])
    assert ("no pci.ids here" in capsys.readouterr().err) == (system_names().place is None)
    assert PciNames().place is None
