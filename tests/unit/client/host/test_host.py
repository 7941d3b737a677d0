"""`vfiod host` on a tree of files laid out as sysfs is.

Files do not answer as a kernel does: a bind that has to be carried out ends here in "did not take", and what is tested
is that everything is put back. The kernel lab (tests/lab) binds for real.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pexpect  # type: ignore[import-untyped]
import pytest

from vfiod.client.host import binding
from vfiod.client.host.names import PciNames, system_names
from vfiod.client.host.program import main
from vfiod.client.host.sysfs import HostError, Sysfs, normal_address

PCI_IDS = """\
# comment
8086  Intel Corporation
\t1533  I210 Gigabit Network Connection
\t\t0001 0001  a subsystem
10de  NVIDIA Corporation
\t1eb8  TU104GL
C 02  Network controller
\t00  Ethernet controller
C 03  Display controller
\t02  3D controller
X nonsense
"""

DEVICES: dict[str, dict[str, Any]] = {
    "0000:00:01.0": {"vendor": 0x8086, "device": 0x1901, "class": 0x060400, "driver": "pcieport", "group": 1},
    "0000:01:00.0": {
        "vendor": 0x10DE, "device": 0x1EB8, "class": 0x030200, "driver": "vfio-pci", "group": 1,
        "reset_method": "flr bus\n", "override": "vfio-pci", "vfio-dev": "vfio0", "numa_node": "1\n",
    },
    "0000:01:00.1": {"vendor": 0x10DE, "device": 0x10F8, "class": 0x040300, "driver": "snd_hda_intel", "group": 1},
    "0000:02:00.0": {
        "vendor": 0x8086, "device": 0x1533, "class": 0x020000, "driver": "igb", "group": 2, "iommu": "dmar1",
    },
    "0000:03:00.0": {"vendor": 0x1234, "device": 0x11E8, "class": 0x00FF00, "group": 3, "reset": True},
}  # fmt: skip


@pytest.fixture
def root(tmp_path: Path) -> Path:
    bus, groups = tmp_path / "bus/pci", tmp_path / "kernel/iommu_groups"
    for driver in ("vfio-pci", "pcieport", "snd_hda_intel", "igb"):
        (bus / "drivers" / driver).mkdir(parents=True)
        (bus / "drivers" / driver / "unbind").touch()
    (bus / "drivers_probe").touch()
    for address, facts in DEVICES.items():
        path = tmp_path / "devices/pci0000:00" / address
        path.mkdir(parents=True)
        for name, digits in (("vendor", 4), ("device", 4), ("class", 6)):
            (path / name).write_text(f"0x{facts[name]:0{digits}x}\n")
        (path / "driver_override").write_text(facts.get("override", "(null)") + "\n")
        (path / "numa_node").write_text(facts.get("numa_node", "-1\n"))
        if "reset_method" in facts:
            (path / "reset_method").write_text(facts["reset_method"])
        if "reset" in facts:
            (path / "reset").touch()
        if "vfio-dev" in facts:
            (path / "vfio-dev" / facts["vfio-dev"]).mkdir(parents=True)
        if "driver" in facts:
            (path / "driver").symlink_to(bus / "drivers" / facts["driver"])
        if "iommu" in facts:
            (path / "iommu").symlink_to(tmp_path / "class/iommu" / facts["iommu"])
        group = groups / str(facts["group"])
        (group / "devices").mkdir(parents=True, exist_ok=True)
        (group / "type").write_text("DMA\n")
        (group / "devices" / address).symlink_to(path)
        (path / "iommu_group").symlink_to(group)
        (bus / "devices").mkdir(exist_ok=True)
        (bus / "devices" / address).symlink_to(path)
    return tmp_path


@pytest.fixture
def sysfs(root: Path) -> Sysfs:
    return Sysfs(root, names=PciNames(PCI_IDS.splitlines()))


def snapshot(root: Path) -> dict[str, str]:
    """Every file and link, except the two write-only ones, with what it says."""
    found = {}
    for path in sorted(root.rglob("*")):
        if path.is_symlink():
            found[str(path)] = os.readlink(path)
        elif path.is_file() and path.name not in ("unbind", "drivers_probe"):
            found[str(path)] = path.read_text().strip().replace("(null)", "")
    return found


class TestAddresses:
    @pytest.mark.parametrize(
        ("text", "address"),
        [
            ("0000:03:00.0", "0000:03:00.0"),
            ("03:00.0", "0000:03:00.0"),
            ("3:0.7", "0000:03:00.7"),
            ("1f.7", "0000:00:1f.7"),
            ("10000:E1:00.0", "10000:e1:00.0"),
        ],
    )
    def test_short_forms(self, text: str, address: str) -> None:
        assert normal_address(text) == address

    @pytest.mark.parametrize(
        "text", ["", "nic0", "00:20.0", "00:00.8", "../../etc", "0000:00:00", "1:2:3:4.0", "0:0:0.0/"]
    )
    def test_others(self, text: str) -> None:
        with pytest.raises(HostError, match="A PCI address is"):
            normal_address(text)


class TestReading:
    def test_a_device(self, sysfs: Sysfs) -> None:
        gpu = sysfs.device("01:00.0")
        assert gpu.name == "NVIDIA Corporation TU104GL"
        assert gpu.kind == "3D controller"
        assert (gpu.driver, gpu.override, gpu.group) == ("vfio-pci", "vfio-pci", 1)
        assert gpu.reset_methods == ("flr", "bus")
        assert (gpu.numa_node, gpu.vfio_device) == (1, "vfio0")

    def test_what_is_not_there(self, sysfs: Sysfs) -> None:
        edu = sysfs.device("0000:03:00.0")
        assert (edu.driver, edu.override, edu.numa_node, edu.iommu) == (None, None, None, None)
        assert edu.name == "1234 11e8"
        assert edu.reset_methods == ("unknown",), "an old kernel says that it can, and not how"
        assert sysfs.device("0000:02:00.0").reset_methods == ()
        assert sysfs.device("0000:02:00.0").iommu == "dmar1"

    def test_viability(self, sysfs: Sysfs) -> None:
        first, second, third = sysfs.groups()
        assert first.blockers == ("0000:01:00.1 (snd_hda_intel)",), "neither the bridge nor the one bound to VFIO"
        assert second.blockers == ("0000:02:00.0 (igb)",)
        assert third.blockers == ()

    def test_in_use(self, root: Path) -> None:
        net = root / "devices/pci0000:00/0000:02:00.0/net/eth0"
        net.mkdir(parents=True)
        (net / "operstate").write_text("up\n")
        disk = root / "devices/pci0000:00/0000:03:00.0/nvme/nvme0/nvme0n1/nvme0n1p1"
        disk.mkdir(parents=True)
        (disk / "dev").write_text("259:1\n")
        (root / "mountinfo").write_text("22 1 259:1 / /home rw - ext4 /dev/nvme0n1p1 rw\n")
        sysfs = Sysfs(root, mountinfo=root / "mountinfo")
        assert sysfs.device("02:00.0").used_by == ("network interface eth0 (up)",)
        assert sysfs.device("03:00.0").used_by == ("/home is mounted from nvme0n1p1",)

    def test_vanishing_devices_are_passed_over(self, root: Path, sysfs: Sysfs) -> None:
        (root / "bus/pci/devices/0000:09:00.0").symlink_to(root / "devices/gone")
        (root / "devices/pci0000:00/0000:03:00.0/vendor").unlink()
        assert [device.address for device in sysfs.devices()] == list(DEVICES)[:4]

    def test_no_sysfs(self, tmp_path: Path) -> None:
        with pytest.raises(HostError, match="ENOENT"):
            list(Sysfs(tmp_path).devices())

    def test_this_host(self) -> None:
        """Whatever machine this is: it can be read without an error."""
        sysfs = Sysfs()
        if not (sysfs.bus / "devices").is_dir():
            pytest.skip("this machine has no PCI bus in /sys")
        for device in sysfs.devices():
            assert sysfs.device(device.address).vendor_id == device.vendor_id


class TestNames:
    def test_without_the_file(self) -> None:
        names = PciNames()
        assert names.vendor(0x8086) is None
        assert names.kind(0x010802) == "NVMe controller"
        assert names.kind(0xAB3456) == "class ab34"

    def test_places(self, tmp_path: Path) -> None:
        (tmp_path / "pci.ids").write_text(PCI_IDS)
        names = system_names((str(tmp_path / "none"), str(tmp_path / "pci.ids")))
        assert names.device(0x8086, 0x1533) == "I210 Gigabit Network Connection"
        assert names.device(0x8086, 0x0001) is None, "a subsystem is no device"


class TestBinding:
    def test_bound_already(self, root: Path, sysfs: Sysfs) -> None:
        before = snapshot(root)
        assert binding.bind(sysfs, "01:00.0") == binding.Bound("0000:01:00.0", "vfio-pci", "vfio-pci")
        assert snapshot(root) == before

    def test_what_is_written(self, root: Path, sysfs: Sysfs) -> None:
        """A device without a driver: the override, then a probe. The files do not probe, so all of it is undone."""
        before = snapshot(root)
        with pytest.raises(HostError, match=r"'vfio-pci' did not take 0000:03:00\.0: it is bound to nothing now"):
            binding.bind(sysfs, "03:00.0")
        assert (root / "bus/pci/drivers_probe").read_text() == "0000:03:00.0"
        assert snapshot(root) == before

    def test_a_driver_that_does_not_let_go(self, root: Path, sysfs: Sysfs) -> None:
        before = snapshot(root)
        with pytest.raises(HostError, match=r"bound to igb now\. It has igb, as before"):
            binding.bind(sysfs, "02:00.0")
        assert (root / "bus/pci/drivers/igb/unbind").read_text() == "0000:02:00.0"
        assert snapshot(root) == before

    def test_unbind_that_fails(self, root: Path, sysfs: Sysfs) -> None:
        before = snapshot(root)
        with pytest.raises(HostError, match="stays with 'vfio-pci'"):
            binding.unbind(sysfs, "01:00.0")
        assert snapshot(root) == before

    def test_unbind_without_a_driver(self, sysfs: Sysfs) -> None:
        assert binding.unbind(sysfs, "03:00.0") == binding.Bound("0000:03:00.0", None, None)

    @pytest.mark.parametrize(
        ("address", "driver", "said"),
        [
            ("00:01.0", "vfio-pci", "is a bridge"),
            ("02:00.0", "vfio_ap", "modprobe vfio_ap"),
            ("07:00.0", "vfio-pci", "no PCI device 0000:07:00.0"),
            ("nonsense", "vfio-pci", "A PCI address is"),
        ],
    )
    def test_refused(self, root: Path, sysfs: Sysfs, address: str, driver: str, said: str) -> None:
        before = snapshot(root)
        with pytest.raises(HostError, match=said):
            binding.bind(sysfs, address, driver)
        assert snapshot(root) == before

    def test_in_use(self, root: Path, sysfs: Sysfs) -> None:
        net = root / "devices/pci0000:00/0000:02:00.0/net/eth0"
        net.mkdir(parents=True)
        (net / "operstate").write_text("up\n")
        with pytest.raises(HostError, match=r"eth0 \(up\)\. --force"):
            binding.bind(sysfs, "02:00.0")
        assert not (root / "bus/pci/drivers_probe").read_text()
        with pytest.raises(HostError, match="did not take"):
            binding.bind(sysfs, "02:00.0", force=True)

    def test_not_root(self, root: Path, sysfs: Sysfs) -> None:
        """An attribute that cannot be written, as for anybody but root (root itself is stopped by a directory)."""
        override = root / "devices/pci0000:00/0000:03:00.0/driver_override"
        override.unlink()
        override.mkdir()
        with pytest.raises(HostError, match="driver_override failed with EISDIR"):
            binding.bind(sysfs, "03:00.0")
        assert not (root / "bus/pci/drivers_probe").read_text()


def on_a_terminal(columns: int, term: str, *arguments: str) -> list[str]:
    """The lines that ``vfiod`` writes to a real terminal of this width, without colours."""
    kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    child = pexpect.spawn(
        sys.executable, ["-m", "vfiod.client.program", *arguments], dimensions=(24, columns), timeout=120,
        env=kept | {"TERM": term, "NO_COLOR": "1", "LC_ALL": "C.UTF-8"}, encoding="utf-8",
    )  # fmt: skip
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0, child.before
    return [re.sub("\x1b\\[[0-9;]*m", "", line).rstrip() for line in child.before.split("\r\n")]


class TestProgram:
    def run(self, capsys: pytest.CaptureFixture[str], root: Path, *arguments: str) -> tuple[int, str, str]:
        state = ["--state", str(root / "state")] if arguments[0] in ("bind", "unbind", "recover") else []
        status = main([*arguments, "--sysfs", str(root), *state])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    def test_list(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        status, out, _ = self.run(capsys, root, "list")
        assert status == 0
        lines = [line.split() for line in out.splitlines()]
        assert lines[0][0] == "Address"
        assert [line[0] for line in lines[1:]] == list(DEVICES)[1:], "bridges only with --all"
        assert "0000:00:01.0" in self.run(capsys, root, "list", "--all")[1]

    def test_list_json(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        devices = json.loads(self.run(capsys, root, "list", "--json", "--driver", "vfio-pci")[1])
        (gpu,) = devices
        assert gpu["address"] == "0000:01:00.0"
        assert gpu["group-mates"] == ["0000:00:01.0", "0000:01:00.1"]
        assert gpu["reset-methods"] == ["flr", "bus"]

    def test_groups(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = self.run(capsys, root, "groups")[1]
        assert "not viable: 0000:01:00.1 (snd_hda_intel)" in out
        groups = json.loads(self.run(capsys, root, "groups", "--json")[1])
        assert [(group["number"], group["viable"]) for group in groups] == [(1, False), (2, False), (3, True)]

    @pytest.mark.parametrize(("columns", "term"), [(20, "xterm"), (80, "dumb"), (200, "dumb")])
    @pytest.mark.parametrize("verb", ["list", "groups"])
    def test_on_a_terminal_nothing_is_left_out(self, root: Path, verb: str, columns: int, term: str) -> None:
        """Every address is whole, and nothing ends in an ellipsis; what is too wide for a table is records."""
        lines = on_a_terminal(columns, term, "host", verb, "--sysfs", str(root))
        assert "\N{HORIZONTAL ELLIPSIS}" not in "".join(lines)
        shown = [line for line in lines if any(address in line for address in DEVICES)]
        assert {word for line in shown for word in line.split()} >= set(DEVICES) - {"0000:00:01.0"}
        # Sentences on standard error are the terminal's to wrap.
        assert all(len(line.rstrip()) <= max(columns, len("Address 0000:00:00.0")) for line in shown)
        record = {"list": "Address 0000:01:00.0", "groups": "Group 1"}[verb]
        assert (record in lines) is (columns < {"list": 200, "groups": 80}[verb])

    def test_records_of_a_narrow_terminal(self, root: Path) -> None:
        lines = on_a_terminal(80, "xterm", "host", "list", "--sysfs", str(root), "--driver", "vfio-pci")
        assert lines[:10] == [
            "Address 0000:01:00.0",
            "  Device      10de 1eb8" if system_names().place is None else lines[1],
            "  Class       3D controller" if system_names().place is None else lines[2],
            "  Driver      vfio-pci",
            "  Group       1",
            "  With        0000:00:01.0 (pcieport), 0000:01:00.1 (snd_hda_intel)",
            "  Reset       flr bus",
            "  NUMA        1",
            "  VFIO        vfio0",
            "  Assignable  bind: 0000:01:00.1 of its group is bound to snd_hda_intel",
        ]

    def test_bind_each_for_itself(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        status, out, err = self.run(capsys, root, "bind", "02:00.0", "01:00.0")
        assert status == 1
        assert out == "0000:01:00.0: vfio-pci already\n"
        assert "did not take 0000:02:00.0" in err

    def test_bind_a_group(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        _, out, err = self.run(capsys, root, "bind", "--group", "01:00.0", "--json")
        assert json.loads(out) == [{"address": "0000:01:00.0", "before": "vfio-pci", "after": "vfio-pci"}]
        assert "did not take 0000:01:00.1" in err
        assert "bridge" not in err, "the bridge of the group is left alone"

    def test_nothing_there(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        status, out, err = self.run(capsys, tmp_path, "list")
        assert (status, out) == (1, "")
        assert "ENOENT" in err
        assert self.run(capsys, tmp_path, "groups")[0] == 0
