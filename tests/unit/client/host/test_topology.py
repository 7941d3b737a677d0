"""``vfiod host groups --tree | --dot | --svg``: groups, and the reset domains that cross them."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from vfiod.client.host.program import main
from vfiod.client.host.sysfs import Sysfs
from vfiod.client.host.topology import reset_domains

#: Address: (directory of the parent, class, group).
DEVICES = {
    "0000:00:1f.0": ("pci0000:00", 0x060100, 9),
    "0000:00:01.0": ("pci0000:00", 0x060400, 1),
    "0000:01:00.0": ("pci0000:00/0000:00:01.0", 0x020000, 2),
    "0000:01:00.1": ("pci0000:00/0000:00:01.0", 0x020000, 3),
    "0000:01:10.0": ("pci0000:00/0000:00:01.0", 0x020000, 4),
    "0000:01:01.0": ("pci0000:00/0000:00:01.0", 0x060400, 5),
    "0000:02:00.0": ("pci0000:00/0000:00:01.0/0000:01:01.0", 0x030000, 6),
    "10000:e1:00.0": ("pci10000:e0", 0x010802, None),
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "bus/pci/devices").mkdir(parents=True)
    for address, (parent, code, group) in DEVICES.items():
        path = tmp_path / "devices" / parent / address
        path.mkdir(parents=True, exist_ok=True)
        (path / "vendor").write_text("0x8086\n")
        (path / "device").write_text("0x10c9\n")
        (path / "class").write_text(f"0x{code:06x}\n")
        (path / "reset_method").write_text("flr bus\n" if address == "0000:01:00.0" else "\n")
        (tmp_path / "bus/pci/devices" / address).symlink_to(path)
        if group is not None:
            members = tmp_path / "kernel/iommu_groups" / str(group) / "devices"
            members.mkdir(parents=True)
            (members / address).symlink_to(path)
            (path / "iommu_group").symlink_to(members.parent)
    return tmp_path


def run(root: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = main(["groups", "--sysfs", str(root), *arguments])
    return status, *capsys.readouterr()


def test_reset_domains(root: Path) -> None:
    assert reset_domains(Sysfs(root)) == {
        "0000:00:01.0": ("0000:01:00.0", "0000:01:00.1", "0000:01:01.0", "0000:01:10.0"),
        "0000:01:01.0": ("0000:02:00.0",),
    }


def test_tree(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(root, capsys, "--tree")
    assert status == 0
    lines = out.splitlines()
    assert lines[0] == "IOMMU groups of this host"
    assert "├── group:2  (viable yes)" in lines
    assert any(line.startswith("│   └── 0000:01:00.0  (device ") and "reset flr bus" in line for line in lines)
    start = lines.index("reset of the bus behind 0000:00:01.0")
    assert [line.split("(")[0].rstrip() for line in lines[start:]] == [
        "reset of the bus behind 0000:00:01.0",
        "├── 0000:01:00.0",
        "├── 0000:01:00.1",
        "├── reset of the bus behind 0000:01:01.0",
        "│   └── 0000:02:00.0",
        "└── 0000:01:10.0",
    ]
    assert "only with its bus" in lines[start + 2]


def test_pictures(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, svg, _ = run(root, capsys, "--svg")
    ids = [group.attrib["id"] for group in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}g")]
    assert {"group:6", "host:0000:02:00.0", "reset:0000:01:01.0"} <= set(ids)
    assert len(ids) == len(set(ids))
    _, dot, _ = run(root, capsys, "--dot")
    assert '"host:0000:01:00.0" -> "reset:0000:00:01.0" [dir=back, style=dashed];' in dot


def test_a_drawing_is_no_json(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, error = run(root, capsys, "--json", "--tree")
    assert (status, out) == (1, "")
    assert "exclude each other" in error
    with pytest.raises(SystemExit):
        run(root, capsys, "--dot", "--tree")


def test_a_host_without_iommu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bus/pci/devices").mkdir(parents=True)
    assert run(tmp_path, capsys, "--tree") == (0, "IOMMU groups of this host\n", "")
