"""`vfiod host mdev` on a tree laid out as sysfs is, with a small kernel behind its two files that act.

`create` and `remove` are FIFOs; a thread reads them and does what the kernel would. The kernel lab has the real one.
Rules are those of behaviour.md, section 8.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vfiod.client.host.mdev import HostMdev, KernelMdevs, normal_uuid
from vfiod.client.host.program import main
from vfiod.client.host.sysfs import HostError

UUID = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
OTHER = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1002"
TYPES = {"mtty": {"mtty-1": 24, "mtty-2": 12}, "0000:00:02.0": {"i915-GVTg_V5_4": 0}}


class SmallKernel:
    """Makes and removes device directories, as told through the FIFOs of a tree."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.busy: set[str] = set()
        self._threads: list[threading.Thread] = []
        self._creating: list[Path] = []
        (root / "bus/mdev/devices").mkdir(parents=True)
        for parent, types in TYPES.items():
            (root / "devices/virtual" / parent).mkdir(parents=True)
            (root / "class/mdev_bus").mkdir(parents=True, exist_ok=True)
            (root / "class/mdev_bus" / parent).symlink_to(root / "devices/virtual" / parent)
            for name, room in types.items():
                path = root / "devices/virtual" / parent / "mdev_supported_types" / name
                (path / "devices").mkdir(parents=True)
                (path / "available_instances").write_text(f"{room}\n")
                (path / "device_api").write_text("vfio-pci\n")
                (path / "name").write_text(f"The {name}\n")
                self._creating.append(path / "create")
                self._serve(path / "create", lambda uuid, path=path: self.make(path, uuid))

    def _serve(self, fifo: Path, act: Any) -> None:
        os.mkfifo(fifo)

        def work() -> None:
            while fifo.exists() and (text := fifo.read_text()) != "end":
                act(text)

        self._threads.append(threading.Thread(target=work, daemon=True))
        self._threads[-1].start()

    def end(self) -> None:
        """No more devices are made. A thread that removes one may still be at it: nothing here walks the tree."""
        for fifo in self._creating:
            fifo.write_text("end")

    def make(self, kind: Path, uuid: str) -> None:
        path = kind.parents[1] / uuid
        path.mkdir()
        (path / "mdev_type").symlink_to(kind)
        (path / "iommu_group").symlink_to(self.root / "kernel/iommu_groups/11")
        (path / "driver").symlink_to(self.root / "bus/mdev/drivers/vfio_mtty")
        (path / "vfio-dev/vfio3").mkdir(parents=True)
        (path / "assign_adapter").touch()
        (kind / "devices" / uuid).symlink_to(path)
        self._serve(path / "remove", lambda _: self.remove(path))
        (self.root / "bus/mdev/devices" / uuid).symlink_to(path)

    def remove(self, path: Path) -> None:
        (self.root / "bus/mdev/devices" / path.name).unlink()
        (path / "mdev_type").resolve().joinpath("devices", path.name).unlink()
        shutil.rmtree(path)


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    kernel = SmallKernel(tmp_path / "sys")
    yield tmp_path / "sys"
    kernel.end()


@pytest.fixture
def mdevs(root: Path, tmp_path: Path) -> KernelMdevs:
    (tmp_path / "etc").mkdir()
    return KernelMdevs(root, definitions=tmp_path / "etc")


def until_there(mdevs: KernelMdevs, uuid: str) -> None:
    while not (mdevs.root / "bus/mdev/devices" / uuid).exists():
        pass


def make(mdevs: KernelMdevs, uuid: str = UUID, kind: str = "mtty-2") -> None:
    """As the kernel itself: it is there before the write returns."""
    (mdevs.root / "class/mdev_bus/mtty/mdev_supported_types" / kind / "create").write_text(uuid)
    until_there(mdevs, uuid)


def define(mdevs: KernelMdevs, parent: str, uuid: str, told: object) -> None:
    path = mdevs.definitions_path / parent
    path.mkdir(exist_ok=True)
    (path / uuid).write_text(told if isinstance(told, str) else json.dumps(told))


def test_types(mdevs: KernelMdevs) -> None:
    assert mdevs.parents() == ("0000:00:02.0", "mtty")
    told = {one.type: one for one in mdevs.types()}
    assert list(told) == ["i915-GVTg_V5_4", "mtty-1", "mtty-2"]
    one = told["mtty-2"]
    assert (one.parent, one.name, one.description, one.device_api) == ("mtty", "The mtty-2", None, "vfio-pci")
    assert (one.available_instances, one.devices) == (12, ())
    with pytest.raises(HostError, match=r"no mdev parent 'x'; there is 0000:00:02.0, mtty"):
        list(mdevs.types("x"))


def test_a_device(mdevs: KernelMdevs) -> None:
    make(mdevs)
    assert list(mdevs.devices()) == [mdevs.device(UUID.upper())]
    assert mdevs.device(UUID) == HostMdev(
        uuid=UUID,
        parent="mtty",
        type="mtty-2",
        device_api="vfio-pci",
        driver="vfio_mtty",
        group=11,
        vfio_device="vfio3",
        sysfsdev=str(mdevs.root / "devices/virtual/mtty" / UUID),
        defined=False,
    )
    define(mdevs, "mtty", UUID, {"mdev_type": "mtty-2"})
    assert mdevs.device(UUID).defined


def test_destroy(mdevs: KernelMdevs) -> None:
    make(mdevs)
    assert mdevs.destroy(UUID).type == "mtty-2"
    while (mdevs.root / "devices/virtual/mtty" / UUID).exists():
        pass
    with pytest.raises(HostError, match="There is no mediated device"):
        mdevs.destroy(UUID)


def test_a_destroy_that_waits_says_so(mdevs: KernelMdevs) -> None:
    """A FIFO that nobody reads is a kernel that waits for the device's user."""
    make(mdevs)
    path = mdevs.root / "bus/mdev/devices" / UUID / "remove"
    held = path.with_name("held")
    path.rename(held)
    os.mkfifo(path)
    with pytest.raises(HostError, match=r"is in use.*device_del"):
        mdevs.destroy(UUID, timeout_s=0.01)
    assert path.read_text() == "1", "it was not taken back: it goes on"
    os.waitpid(-1, 0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("x", "mtty-2"), "no mdev parent 'x'"),
        (("mtty", "mtty-3"), "has no type 'mtty-3'; it has mtty-1, mtty-2"),
        (("mtty", "../mtty/mtty-2"), "has no type"),
        (("mtty", "mtty-2", "no"), "named by a UUID"),
        (("mtty", "mtty-2", UUID + "\n"), "named by a UUID"),
        (("0000:00:02.0", "i915-GVTg_V5_4"), "has no room for another"),
    ],
)
def test_what_cannot_be_made_is_refused_before_anything(
    mdevs: KernelMdevs, arguments: tuple[str, ...], words: str
) -> None:
    with pytest.raises(HostError, match=words):
        mdevs.create(*arguments)
    assert list(mdevs.devices()) == []


def test_a_second_one_of_that_name(mdevs: KernelMdevs) -> None:
    make(mdevs)
    with pytest.raises(HostError, match="already, of parent mtty"):
        mdevs.create("mtty", "mtty-1", UUID)


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../remove", "a/../../b", "a//b", "."])
def test_an_attribute_stays_in_the_devices_directory(mdevs: KernelMdevs, name: str) -> None:
    with pytest.raises(HostError, match="own directory"):
        mdevs.create("mtty", "mtty-2", UUID, attributes=((name, "1"),))
    assert list(mdevs.devices()) == []


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ("{", "is not JSON"),
        ([], "no definition of mdevctl"),
        ({}, "'mdev_type', a text"),
        ({"mdev_type": 1}, "'mdev_type', a text"),
        ({"mdev_type": "mtty-2", "start": "now"}, "'start'"),
        ({"mdev_type": "mtty-2", "attrs": {"a": "b"}}, "'attrs', a list"),
        ({"mdev_type": "mtty-2", "attrs": [{"a": 1}]}, "'attrs', a list"),
        ({"mdev_type": "mtty-9"}, "has no type 'mtty-9'"),
        ({"mdev_type": "mtty-2", "attrs": [{"../x": "1"}]}, "own directory"),
    ],
)
def test_a_bad_definition(mdevs: KernelMdevs, told: object, words: str) -> None:
    define(mdevs, "mtty", UUID, told)
    with pytest.raises(HostError, match=words):
        mdevs.start(UUID)


def test_definitions(mdevs: KernelMdevs) -> None:
    with pytest.raises(HostError, match="mdevctl has no definition"):
        mdevs.start(UUID)
    attributes = [{"assign_adapter": "5"}, {"assign_domain": "0x47"}]
    define(mdevs, "mtty", UUID, {"mdev_type": "mtty-2", "start": "auto", "attrs": attributes})
    define(mdevs, "mtty", "README", "not a UUID: not one of its")
    [told] = mdevs.definitions()
    assert (told.uuid, told.parent, told.type, told.start, told.active) == (UUID, "mtty", "mtty-2", "auto", False)
    assert told.attributes == (("assign_adapter", "5"), ("assign_domain", "0x47"))
    define(mdevs, "0000:00:02.0", UUID, {"mdev_type": "i915-GVTg_V5_4"})
    with pytest.raises(HostError, match=r"several .* --parent 0000:00:02.0 or mtty"):
        mdevs.start(UUID)
    with pytest.raises(HostError, match=r"definition of .* of parent x"):
        mdevs.start(UUID, "x")


def test_the_program(mdevs: KernelMdevs, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--sysfs", str(mdevs.root), "--definitions", str(mdevs.definitions_path)]
    assert main(["mdev", "types", *where, "--json"]) == 0
    types = json.loads(capsys.readouterr().out)
    assert [one["type"] for one in types] == ["i915-GVTg_V5_4", "mtty-1", "mtty-2"]
    assert types[1]["available-instances"] == 24
    assert main(["mdev", "types", *where]) == 0
    assert "The mtty-2" in capsys.readouterr().out
    assert main(["mdev", "list", *where]) == 0
    assert "no mediated devices" in capsys.readouterr().err
    make(mdevs)
    make(mdevs, OTHER, "mtty-1")
    assert main(["mdev", "list", *where, "--json"]) == 0
    assert [(one["uuid"], one["vfio-device"]) for one in json.loads(capsys.readouterr().out)] == [
        (UUID, "vfio3"),
        (OTHER, "vfio3"),
    ]
    define(mdevs, "mtty", UUID, {"mdev_type": "mtty-2", "attrs": [{"a": "b"}]})
    assert main(["mdev", "list", "--defined", *where]) == 0
    assert "a=b" in capsys.readouterr().out
    assert main(["mdev", "list", "--defined", *where, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["attributes"] == [["a", "b"]]
    assert main(["mdev", "destroy", UUID, normal_uuid("0" * 8 + UUID[8:]), OTHER, *where]) == 1
    said = capsys.readouterr()
    assert said.out.count("removed from mtty") == 2, "one that fails does not keep the others from theirs"
    assert "There is no mediated device 00000000" in said.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["create"], "Say what to make"),
        (["create", "--type", "mtty-1"], "--parent is missing; type 'mtty-1' is of mtty"),
        (["create", "--uuid", UUID, "--attr", "a=b"], "a definition has its own"),
        (["create", "--type", "mtty-1", "--parent", "mtty", "--attr", "a"], "NAME=VALUE"),
        (["create", "--uuid", UUID], "mdevctl has no definition"),
        (["destroy", "x"], "named by a UUID"),
    ],
)
def test_bad_commands(mdevs: KernelMdevs, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    where = ["--sysfs", str(mdevs.root), "--definitions", str(mdevs.definitions_path)]
    assert main(["mdev", *arguments, *where]) == 1
    assert words in capsys.readouterr().err
